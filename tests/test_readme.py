"""Commands of README and docs run: blocks marked `<!-- tested -->`, as they stand, on tiny models under their names."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import save_model, sentences
from tiny_tokenizers import sentencepiece_like
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(language, block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, (language, block) in enumerate(
        re.findall(r"<!-- tested -->\n+```(bash|python)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    )
]


def test_the_readme_has_commands_to_test() -> None:
    road = " ".join(str(block.values[1]) for block in BLOCKS)
    names = "corpus datastore targets train generate info explain adapt".split()
    for command in (*names, "evaluate perplexity"):
        assert f"memlm {command} " in road


@pytest.mark.slow
@pytest.mark.parametrize(("language", "block"), BLOCKS)
def test_commands_of_the_pages_run(
    language: str, block: str, tokenizer: PreTrainedTokenizerFast, program: Path, python: str, tmp_path: Path
) -> None:
    """`smollm2` is already fetched, so to say: a model of 10 thin layers lies where the command would put it."""
    model = tmp_path / "home" / "models" / "smollm2"
    save_model(model, tokenizer, layers=10, width=16, positions=512)
    work, documents = tmp_path / "work", sentences(60, seed=3)
    (work / "DOCS").mkdir(parents=True)
    for number, text in enumerate(documents):
        (work / "DOCS" / f"{number}.txt").write_text(text)
    foreign = sentencepiece_like(documents)
    save_model(work / "OTHER", foreign, width=16)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    shell = [shutil.which("bash") or "bash", "-euo", "pipefail", "-c"]
    found = subprocess.run(
        [*(shell if language == "bash" else [python, "-c"]), block],
        cwd=work,
        env={**os.environ, "PATH": path, "MEMLM_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "Traceback" not in found.stderr
    made = {p.name for p in work.iterdir()} - {"DOCS", "OTHER"}
    assert made == {
        (option or keyword).rstrip("/") for option, keyword in re.findall(r"--out (\S+)|out=\"(\S+)\"", block)
    }
