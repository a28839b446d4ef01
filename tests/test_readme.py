"""The README's commands run. Blocks marked `<!-- tested -->` are run as they stand, on a tiny model under its name."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import sentences, tiny_model
from transformers import PreTrainedTokenizerFast

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"<!-- tested -->\n+```bash\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_readme_has_commands_to_test() -> None:
    assert BLOCKS
    road = " ".join(BLOCKS)
    for command in ("corpus", "datastore", "targets", "train", "evaluate perplexity", "generate", "info"):
        assert f"memlm {command} " in road


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n", 1)[0])
def test_commands_of_the_readme_run(block: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """`smollm2` is already fetched, so to say: a model of 10 thin layers lies where the command would put it."""
    model = tmp_path / "home" / "models" / "smollm2"
    small = tiny_model(len(tokenizer), layers=10, width=16)
    small.config.max_position_embeddings = 512
    small.save_pretrained(model)
    tokenizer.save_pretrained(model)
    work = tmp_path / "work"
    (work / "DOCS").mkdir(parents=True)
    for number, text in enumerate(sentences(60, seed=3)):
        (work / "DOCS" / f"{number}.txt").write_text(text)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "memlm").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m memlm "$@"\n')
    (programs / "memlm").chmod(0o755)
    found = subprocess.run(
        [shutil.which("bash") or "bash", "-euo", "pipefail", "-c", block],
        cwd=work,
        env={
            **os.environ,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "MEMLM_HOME": str(tmp_path / "home"),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "Traceback" not in found.stderr
    made = {p.name for p in work.iterdir()} - {"DOCS"}
    assert made == {match.rstrip("/") for match in re.findall(r"--out (\S+)", block)}
