"""Timing of a base and its memories."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from memlm.cli import app
from memlm.errors import ConfigError, InputError, ModelError
from memlm.evaluate import bench as bench_module
from memlm.evaluate.bench import bench, bench_table
from memlm.evaluate.config import BenchConfig, PassageConfig

pytestmark = pytest.mark.slow

QUICK = BenchConfig(new_tokens=4, prompt_tokens=6, score_tokens=16, rounds=2, dtype="float32")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_way_is_timed_beside_the_base(
    model_folder: str, memory_folder: Path, datastore_folder: Path, batch_size: int
) -> None:
    config = QUICK.model_copy(update={"batch_size": batch_size})
    memories = {"m": str(memory_folder), "knn": str(datastore_folder)}
    found = bench(model_folder, memories, ["one two three", "four five"], gate="posterior", config=config)
    drawn = ["m drawn"] if batch_size == 1 else []
    assert list(found) == ["base", "m", "m drafted", *drawn, "knn", "knn drafted", "machine"]
    for name in set(found) - {"machine"}:
        assert found[name]["tokens_per_s"] > 0
        assert found[name]["ttft_ms"] > 0
        assert found[name]["peak_bytes"] is None or found[name]["peak_bytes"] > 0
    ratio = found["base"]["tokens_per_s"] / found["m"]["tokens_per_s"]
    assert found["m"]["ratio"] == pytest.approx(ratio, rel=1e-2)
    assert bench_table(found).splitlines()[1].startswith("base ")
    assert 0 <= found["m drafted"]["acceptance"] <= 1
    assert all("acceptance" not in found[name] for name in drawn)
    scored = {name for name, row in found.items() if "scored_tokens_per_s" in row}
    assert scored == {"base", "m", "knn"}
    for name in scored - {"base"}:
        expected = found["base"]["scored_tokens_per_s"] / found[name]["scored_tokens_per_s"]
        assert found[name]["scoring_ratio"] == pytest.approx(expected, rel=1e-2)
    assert not bench_table(found).splitlines()[-1].startswith("knn")


@pytest.mark.parametrize(("first", "whole", "expected"), [(1.0, 4.0, 1.0), (3.0, 2.0, 0.5)])
def test_no_token_takes_less_than_nothing(first: float, whole: float, expected: float) -> None:
    assert bench_module._per_token(first, whole, 4) == expected


def test_scoring_is_left_out_where_no_text_is_asked_for(model_folder: str, memory_folder: Path) -> None:
    config = QUICK.model_copy(update={"score_tokens": 0})
    found = bench(model_folder, {"m": str(memory_folder)}, ["one two three"], gate="posterior", config=config)
    assert not any("scor" in key for row in found.values() for key in row)
    assert "scored" not in bench_table(found)


def test_the_command(model_folder: str, memory_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one two three\n\nfour\n", encoding="utf-8")
    arguments = ["bench", model_folder, "--memory", str(memory_folder), "--prompts", str(prompts)]
    arguments += [
        "--new-tokens",
        "4",
        "--rounds",
        "1",
        "--score-tokens",
        "16",
        "--dtype",
        "float32",
        "--gate",
        "posterior",
    ]
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 0, told.output
    assert "tokens/s" in told.stdout
    drawn = tmp_path / "bench.png"
    told = CliRunner().invoke(app, [*arguments, "--json", "--plot", str(drawn)])
    assert {"base", "memory", "machine"} <= json.loads(told.stdout).keys()
    assert drawn.read_bytes().startswith(b"\x89PNG")
    missing = CliRunner().invoke(app, [*arguments[:-6], "--prompts", str(tmp_path / "none")])
    assert missing.exit_code != 0
    assert isinstance(missing.exception, InputError | SystemExit)


def test_the_base_with_passages_is_timed_too(
    model_folder: str, memory_folder: Path, corpus_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bm25s")
    prompts, given = ["one two three", "four five"], {"gate": "posterior", "in_context": corpus_folder}
    passages = PassageConfig(passage_tokens=8, stride=2)
    for batch_size in (1, 2):
        config = QUICK.model_copy(update={"batch_size": batch_size})
        found = bench(model_folder, {"m": str(memory_folder)}, prompts, config=config, passages=passages, **given)
        assert list(found)[-2:] == ["in-context", "machine"]
        assert found["in-context"]["tokens_per_s"] > 0
        assert found["in-context"]["ttft_ms"] > 0
        assert "scoring_ratio" not in found["in-context"]
    with pytest.raises(ConfigError, match="cannot be called 'in-context' here"):
        bench(model_folder, {"in-context": str(memory_folder)}, prompts, config=QUICK)
    with pytest.raises(ConfigError, match="add --in-context"):
        bench(model_folder, {"m": str(memory_folder)}, prompts, passages=passages, config=QUICK)
    file = tmp_path / "prompts.txt"
    file.write_text("one two\n", encoding="utf-8")
    arguments = ["bench", model_folder, "--memory", str(memory_folder), "--prompts", str(file), "--new-tokens", "4"]
    arguments += ["--rounds", "1", "--score-tokens", "0", "--in-context", str(corpus_folder), "--passage-tokens", "8"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert any(line.startswith("in-context ") for line in result.output.splitlines())


def test_what_cannot_be_timed_is_one_line(model_folder: str) -> None:
    with pytest.raises(InputError, match="there is no prompt to time"):
        bench(model_folder, {}, [], config=QUICK)
    with pytest.raises(ConfigError, match="are more than the 256 of the base: lower prompt_tokens or new_tokens"):
        bench(model_folder, {}, ["a b"], config=QUICK.model_copy(update={"new_tokens": 256}))


def test_a_base_that_gives_no_numbers_is_not_timed(nan_base: str) -> None:
    with pytest.raises(ModelError, match=r"^the base gives no finite scores$"):
        bench(nan_base, {}, ["one two three"], config=QUICK)
