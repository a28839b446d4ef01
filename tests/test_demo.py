"""The demo: its documents, its recipe, and the whole of it on a tiny model."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from conftest import sentences

from memlm import demo
from memlm.errors import ArtifactError
from memlm.manifest import read_manifest
from memlm.runs.recipe import Recipe

pytestmark = pytest.mark.slow


def test_documents_are_read_without_importing_the_packages() -> None:
    """A fresh interpreter, in which only the demo's own imports are allowed to have happened."""
    code = (
        "import sys\n"
        "from itertools import islice\n"
        "from memlm import demo\n"
        "before = set(sys.modules)\n"
        "texts = list(islice(demo.docstrings(), 12))\n"
        "print(len(texts), sorted(set(sys.modules) - before))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, _, modules = found.stdout.strip().partition(" ")
    assert count == "12"
    assert not re.search(r"'(torch|transformers)", modules), modules


def test_documents_hold_a_modules_name_signatures_and_documentation() -> None:
    texts = list(islice(demo.docstrings(), 40))
    assert len(set(texts)) == len(texts) == 40
    for text in texts:
        name, blank, _ = text.split("\n", 2)
        assert re.fullmatch(r"transformers(\.\w+)*", name)
        assert blank == ""
        assert demo._SHORTEST <= len(text) <= demo._LONGEST
    assert any("\ndef " in text and "(self" in text for text in texts)


def test_a_module_becomes_its_documented_definitions(tmp_path: Path) -> None:
    long = "What it does, at length. " * 20
    (tmp_path / "m.py").write_text(
        f'"""{long}"""\n\n\nclass Box:\n    """Holds things."""\n\n    def put(self, thing: int = 3) -> None:\n'
        '        """Put one in."""\n\n    def bare(self): ...\n'
    )
    text = demo._module_text("pack.m", tmp_path / "m.py")
    assert text.startswith("pack.m\n\nWhat it does, at length.")
    assert "class Box\nHolds things." in text
    assert "def put(self, thing: int=3)\nPut one in." in text
    assert "bare" not in text
    (tmp_path / "broken.py").write_text("def (")
    assert demo._module_text("pack.broken", tmp_path / "broken.py") == ""


def test_the_recipe_of_the_demo_parses() -> None:
    recipe = Recipe(demo.demo_recipe("docs.jsonl", 100_000))
    assert recipe.configs["corpus"].max_tokens == 100_000
    assert recipe.configs["corpus"].near_duplicate_ngram > 0
    assert recipe.places["train"]["init"] == demo.MODEL


def test_a_fast_machine_takes_all_tokens_and_a_slow_one_as_many_as_fit() -> None:
    assert demo.tokens_within(600, demo.Speed(reading=3000, training=600)) == demo.MOST
    slow = demo.Speed(reading=300, training=80)
    tokens = demo.tokens_within(600, slow)
    assert demo.FEWEST < tokens < demo.MOST
    taken = [sum(demo.seconds_by_part(count, slow).values()) for count in (tokens, tokens + 500)]
    assert taken[0] <= 600 < taken[1]


def test_a_machine_that_is_too_slow_still_gets_a_table() -> None:
    assert demo.tokens_within(600, demo.Speed(reading=30, training=8)) == demo.FEWEST
    assert demo.tokens_within(-5, demo.Speed(reading=30, training=8)) == demo.FEWEST


def test_every_pass_over_the_splits_is_in_the_expected_time() -> None:
    reader, trainer = demo.Speed(reading=100, training=1e12), demo.Speed(reading=1e12, training=100)
    read = demo.seconds_by_part(24_000, reader)
    passes = 1 + 3 / 8 + 2 / 6  # the training split once; validation by the base, and by the memory twice; test by both
    fixed = [sum(demo.seconds_by_part(0, speed).values()) for speed in (reader, trainer)]
    assert sum(read.values()) - fixed[0] == pytest.approx(passes * 24_000 * demo._BLOCK_TOKENS / 100)
    trained = demo.seconds_by_part(24_000, trainer)
    assert sum(trained.values()) - fixed[1] == pytest.approx(24_000 * demo._BLOCK_TOKENS / 100)


def test_the_time_left_follows_the_pace_of_what_was_done() -> None:
    now = [0.0]
    left = demo.TimeLeft({"reading": 100.0, "training": 300.0}, clock=lambda: now[0])
    assert left.seconds == 400
    left.hear("reading", 0, 100)
    now[0] = 100.0
    left.hear("reading", 50, 100)  # twice as slow as expected
    assert left.seconds == pytest.approx(350 * (100 + 100) / (50 + 100))
    left.hear("unknown", 1, 1)
    assert left.seconds == pytest.approx(350 * (100 + 100) / (50 + 100))
    now[0] = 200.0
    left.hear("training", 0, 2)
    now[0] = 500.0
    left.hear("training", 1, 2)
    assert left.seconds == pytest.approx(150 * (500 + 100) / (250 + 100))


def test_what_an_earlier_run_did_says_nothing_of_the_pace() -> None:
    now = [0.0]
    left = demo.TimeLeft({"reading": 100.0, "training": 300.0}, clock=lambda: now[0])
    left.hear("training", 1, 3)  # goes on there
    assert left.seconds == 200
    now[0] = 50.0
    left.hear("training", 2, 3)
    assert left.seconds == pytest.approx(100 * (50 + 100) / (100 + 100))


def test_more_than_was_asked_for_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(demo, "fetch", lambda name: Path(name))
    monkeypatch.setattr(demo, "docstrings", lambda: iter(["text"]))
    monkeypatch.setattr(demo, "measured_speed", lambda: demo.Speed(reading=30, training=8))
    monkeypatch.setattr(demo, "run_recipe", lambda *args, **kwargs: sys.exit())
    with pytest.raises(SystemExit):
        demo.run_demo(tmp_path, minutes=10, say=said.append)
    assert "6,000 training tokens, about 30 minutes" in said[-2]
    assert "more than 10 minutes" in said[-1]


@pytest.fixture(scope="module")
def walked(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any], str]]:
    """Folder, report and text of a demo on random documents of up to 360 words."""
    folder = tmp_path_factory.mktemp("demo")

    def docstrings() -> Iterator[str]:
        parts = iter(sentences(480, seed=7))
        while chunk := list(islice(parts, 6)):
            yield " ".join(chunk)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMLM_HOME", str(folder / "home"))
        patch.setattr(demo, "MODEL", model_folder)
        patch.setattr(demo, "fetch", lambda name: Path(name))
        patch.setattr(demo, "docstrings", docstrings)
        said: list[str] = []
        patch.setattr(demo, "FEWEST", 4000)
        patch.setattr(demo, "MOST", 4000)
        heard: list[str] = []
        hear = demo.TimeLeft.hear
        patch.setattr(demo.TimeLeft, "hear", lambda left, part, *done: heard.append(part) or hear(left, part, *done))
        report, text = demo.run_demo(folder / "out", say=said.append)
        assert any("reading documentation strings" in line for line in said)
        assert any(re.search(r"reads [\d,]+ and trains [\d,]+ tokens/s: 4,000 training tokens", line) for line in said)
        assert any(re.fullmatch(r"memory -> .* \(about \d+ (s|min) left\)", line) for line in said)
        assert set(heard) >= set(demo.seconds_by_part(4000, demo.Speed(1, 1)))  # the stages' bars are called so
        shutil.rmtree(folder / "home" / "scores")
        patch.setattr(demo, "docstrings", lambda: pytest.fail("documents are read once"))
        patch.setattr(demo, "measured_speed", lambda: pytest.fail("a demo keeps the size it was begun with"))
        patch.setattr(demo, "MOST", 8000)
        again, text_again = demo.run_demo(folder / "out", say=said.append)
        assert (again, text_again) == (report, text)
        yield folder / "out", report, text


def test_the_demo_ends_with_a_table(walked: tuple[Path, dict[str, Any], str]) -> None:
    _, report, text = walked
    for row in ("base alone", "memory alone", "mixture, weight"):
        assert len(re.findall(rf"^{row}.* \d+\.\d\d +\d+\.\d\d to \d+\.\d\d$", text, re.MULTILINE)) == 1
    assert f"{report['tokens']:,} test tokens" in text
    assert "mix_weight chosen on validation" in text
    assert f"{report['base']['perplexity']:.2f} with the base alone" in text


def test_the_demo_ends_with_the_gates_figures_and_its_harm_elsewhere(walked: tuple[Path, dict[str, Any], str]) -> None:
    out, report, text = walked
    fixed = report["mixture"]["fixed"]["perplexity"]
    assert f"weighed token by token; {fixed:.2f} with one weight for all" in text.splitlines()[0]
    figure = r"\d[\d,.]* \([+-]\d+\.\d%\)"
    ways = f"{figure} with the gate, {figure} with the fixed weight"
    told = rf"^On licence texts, .*: \d[\d,.]* with the base alone, {ways}\.$"
    assert len(re.findall(told, text, re.MULTILINE)) == 1
    assert read_manifest(out / "elsewhere", "corpus").facts["splits"]["test"]["positions"] > 500


def test_licences_are_told_apart_by_more_than_their_holders() -> None:
    found = list(demo.licences())
    assert len(found) >= 5
    assert len({text[-150:] for text in found}) == len(found)


def test_the_demo_shows_three_passages_with_lifted_and_sunk_tokens(walked: tuple[Path, dict[str, Any], str]) -> None:
    text = walked[2]
    gains = re.findall(r"^\[(helped most|typical|helped least)\] ([+-]\d+\.\d\d) nats a token", text, re.MULTILINE)
    assert [title for title, _ in gains] == ["helped most", "typical", "helped least"]
    values = [float(gain) for _, gain in gains]
    assert values == sorted(values, reverse=True)
    change = r"'.*?' \d+\.\d% -> \d+\.\d%"
    assert len(re.findall(rf"^    lifted: {change}(, .*)?$", text, re.MULTILINE)) == 3
    assert len(re.findall(rf"^    sank: {change}(, .*)?$", text, re.MULTILINE)) == 3
    assert text.count("    | ") >= 3


def test_the_demo_leaves_a_plot_and_a_command_that_fits(
    walked: tuple[Path, dict[str, Any], str], model_folder: str
) -> None:
    out, report, text = walked
    (plot,) = re.findall(r"^plot: (.*)$", text, re.MULTILINE)
    assert matplotlib.image.imread(plot).std() > 0.01
    (command,) = re.findall(r"^  (memlm generate .*)$", text, re.MULTILINE)
    assert f"--base {model_folder} --memory {out / 'memory'}" in command
    assert json.loads((out / "evaluation-memory" / "report.json").read_text())["base"] == report["base"]


def test_the_demos_report_has_the_keys_the_command_line_promises(walked: tuple[Path, dict[str, Any], str]) -> None:
    report = walked[1]
    for name in ("base", "memory", "mixture"):
        low, high = report[name]["interval"]
        assert low <= report[name]["perplexity"] <= high
    assert 0 <= report["mixture"]["fixed"]["mix_weight"] <= 1
    assert report["mixture"]["gate"] == "posterior"
    assert report["tokens"] > 0


@pytest.mark.parametrize(
    "content",
    [
        *(
            "[]",
            "{}",
            '{"reading": 1, "training": 2}',
            '{"reading": "1", "training": 2, "train_tokens": 3000}',
            "{",
            "",
        ),
        *(
            '{"reading": 0, "training": 2, "train_tokens": 3000}',
            '{"reading": 1, "training": NaN, "train_tokens": 3000}',
        ),
    ],
)
def test_a_size_that_no_demo_wrote_is_one_line(tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docstrings.jsonl").write_text('{"text": "x"}')
    (tmp_path / "size.json").write_text(content)
    monkeypatch.setattr(demo, "fetch", lambda name: None)
    with pytest.raises(ArtifactError, match=r"size\.json") as caught:
        demo.run_demo(tmp_path, say=lambda line: None)
    assert len(str(caught.value).splitlines()) == 1
