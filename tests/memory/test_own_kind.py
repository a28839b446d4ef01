"""To add a memory takes its file (here `tests/bigram_memory.py`) and one line in `KINDS`: every stage then knows it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bigram_memory import BigramMemory, BigramStart

import memlm
from memlm.memory.config import KINDS, Kind

LINE = Kind("bigram_memory:BigramMemory", BigramStart)
SHELL = """
import json, sys
from bigram_memory import BigramStart
from memlm.memory.config import KINDS, Kind
KINDS["bigram"] = Kind("bigram_memory:BigramMemory", BigramStart)
from memlm.cli import main
for line in json.loads(sys.argv[1]):
    sys.argv[1:] = line
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
"""


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "bigram", LINE)


def test_it_is_trained_loaded_evaluated_and_mixed(
    listed: None, targets_folder: Path, corpus_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    quick: dict[str, Any] = {"dtype": "float32", "epochs": 2, "batch_size": 4, "learning_rate": 0.05}
    made = memlm.train_memory(
        targets_folder, base=model_folder, out=tmp_path / "m", kind="bigram", embedding=4, **quick
    )
    assert made.config["embedding"] == 4
    assert "| start | fresh |" in (tmp_path / "m" / "README.md").read_text()
    memory = memlm.load_memory(tmp_path / "m")
    assert isinstance(memory, BigramMemory)
    assert memory.embed.embedding_dim == 4
    report = memlm.evaluate_perplexity(
        corpus_folder, base=model_folder, memory=str(tmp_path / "m"), dtype="float32", bootstrap=0
    )
    assert report["mixture"]["perplexity"] < report["base"]["perplexity"]
    mixed = memlm.MixedLM.from_pretrained(model_folder, memory=tmp_path / "m")
    assert mixed.mix_weights == {"memory": made.facts["validation"]["best"]["mix_weight"]}


def test_its_settings_belong_to_it_alone(listed: None) -> None:
    with pytest.raises(
        memlm.ConfigError, match=r"^embedding = 4: only a memory of kind bigram has it; add --kind bigr"
    ):
        memlm.TrainConfig.parse({"embedding": 4})
    with pytest.raises(memlm.ConfigError, match=r"^tap = '0\.5': only a memory of kind mlp has it"):
        memlm.TrainConfig.parse({"kind": "bigram", "tap": "0.5"})
    with pytest.raises(memlm.ConfigError, match="embedding = 0: "):
        memlm.TrainConfig.parse({"kind": "bigram", "embedding": 0})


@pytest.mark.slow
def test_the_command_line_has_its_options(targets_folder: Path, model_folder: str, tmp_path: Path) -> None:
    """Options are made at import, so the line is there before the command line is imported, in its own process."""

    train = ["train", str(targets_folder), "--kind", "bigram", "--embedding", "4", "--base", model_folder]
    lines = [["train", "--help"], [*train, "--max-steps", "1", "--out", str(tmp_path / "m"), "--json"]]
    command = [sys.executable, "-c", SHELL, json.dumps(lines)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    found = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert found.returncode == 0, found.stderr
    told, _, made = found.stdout.rstrip().rpartition("\n")
    assert "bigram: Numbers that a token is kept in. [default: 16]" in " ".join(told.split())
    assert json.loads(made)["steps"] == 1
    assert json.loads((tmp_path / "m" / "memory.json").read_text())["embedding"] == 4
