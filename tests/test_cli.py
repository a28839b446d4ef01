"""The command line: help, the road, what is printed, and one clear line for every bad input."""

import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import forbid_models, save_stranger, tiny_config
from families import family_config
from released_layouts import random_tensors, save_released
from strangers import edit_manifest
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

from memlm.cli import app, main
from memlm.cli import measure as cli_measure
from memlm.cli import road as cli_road
from memlm.cli import use as cli_use
from memlm.cli.options import by_name
from memlm.corpus.build import build_corpus
from memlm.corpus.config import CorpusConfig
from memlm.errors import ConfigError
from memlm.manifest import MANIFEST, read_manifest
from memlm.text import without_controls

COMMANDS = [
    ("fetch",),
    ("corpus",),
    ("datastore",),
    ("targets",),
    ("train",),
    ("write",),
    ("adapt",),
    ("convert",),
    ("evaluate", "perplexity"),
    ("evaluate", "generation"),
    ("gate",),
    ("generate",),
    ("explain",),
    ("chat",),
    ("run",),
    ("compare",),
    ("bench",),
    ("info",),
    ("list",),
    ("repair",),
    ("demo",),
]


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def memlm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Result]]:
    """`memlm ARGUMENTS` in this process; output is piped, as far as the command can tell."""
    level = logging.get_verbosity()

    def run(*arguments: Any) -> Result:
        monkeypatch.setattr(sys, "argv", ["memlm", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    yield run
    logging.set_verbosity(level)
    logging.enable_progress_bar()


def shell(*arguments: Any, stdin: str = "", cwd: Path | None = None, program: Path | None = None) -> Result:
    """`python -m memlm ARGUMENTS` as a process of its own, or a fork of one that has imported all of it."""
    found = subprocess.run(
        [*([sys.executable, "-m", "memlm"] if program is None else [program]), *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    return Result(found.returncode, found.stdout, found.stderr)


# --- help ---------------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, memlm.cli\n"
        "try: memlm.cli.app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'faiss', 'transformers', 'datasets', 'pyarrow', 'matplotlib', 'tokenizers'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in found.stdout
    for name in ("fetch", "corpus", "datastore", "targets", "train", "evaluate", "generate", "chat", "run", "info"):
        assert re.search(rf"^\s+{name}\s", found.stdout, re.MULTILINE), name


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself_with_an_example(memlm: Callable[..., Result], command: tuple[str, ...]) -> None:
    found = memlm(*command, "--help")
    assert found.code == 0
    examples = found.out.partition("\nExamples:\n")[2].partition("\n\n")[0].splitlines()
    assert examples
    assert all(line.startswith(f"  memlm {' '.join(command)}") for line in examples), "each whole in one line"


def test_the_first_screen_shows_every_command_whole(memlm: Callable[..., Result]) -> None:
    found = memlm("-h")
    assert len(found.out.splitlines()) <= 40
    assert "..." not in found.out.partition("Options:")[2]
    for name in {command[0] for command in COMMANDS} | {"version"}:
        assert re.search(rf"^  {name} +\S", found.out, re.MULTILINE)
    positions = [found.out.index(f"\n{group}:") for group in ("Options", "The road", "Use", "Folders", "More")]
    assert positions == sorted(positions)


def test_options_are_grouped_and_those_of_a_kind_stand_together(memlm: Callable[..., Result]) -> None:
    out = memlm("train", "-h").out
    start, settings = out.index("Start of the memory, by its kind:"), out.index("\nSettings:")
    assert all(start < out.index(f"  {flag} ") < settings for flag in ("--kind", "--layers", "--like", "--head"))
    assert out.index("  --kl-weight ") > settings > out.index("  --init ")
    assert "Live retrieval:\n" in memlm("generate", "-h").out


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_the_version_is_an_option_too(memlm: Callable[..., Result], flag: str) -> None:
    assert memlm(flag).out == memlm("version").out


@pytest.mark.parametrize(
    ("command", "flag", "meant"),
    [
        (("train", "t/"), "--lr", "--learning-rate"),
        (("train", "t/"), "--beta", "--kl-weight"),
        (("generate", "x"), "--alpha", "--mix-weight"),
        (("targets", "d/"), "--knn-temp", "--target-temperature"),
        (("generate", "x"), "--max-tokens", "--max-new-tokens"),
    ],
)
def test_an_option_called_as_elsewhere_is_answered_with_its_name_here(
    memlm: Callable[..., Result], command: tuple[str, ...], flag: str, meant: str
) -> None:
    found = memlm(*command, flag, "1")
    assert found.code == 2
    assert re.search(rf"No such option: {flag} .*{meant}\b", found.err)


def test_shells_can_complete_commands(memlm: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_MEMLM_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "memlm da")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert memlm().out.split() == ["datastore"]


def test_the_list_of_commands_here_is_complete() -> None:
    plain = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback is not None}
    assert plain | {"evaluate"} == {command[0] for command in COMMANDS} | {"version"}


def test_options_carry_their_fields_docstring_and_default(memlm: Callable[..., Result]) -> None:
    text = " ".join(memlm("targets", "--help").out.split())
    assert "Neighbours per position, self-matches already removed. [default: 1024]" in text
    assert "--exclude-document" in text
    assert "τ in the papers" in text


def test_the_version_is_printed(memlm: Callable[..., Result]) -> None:
    from memlm import __version__

    assert memlm("version") == Result(0, __version__ + "\n", "")


# --- the road -----------------------------------------------------------------------------------------------------


def ok(result: Result) -> dict[str, Any]:
    """The one JSON object on stdout of a command that went well; stderr says at most that its work was done before."""
    assert result.code == 0, result
    assert re.fullmatch(r"(.* is there already: nothing to do\n)?", result.err)
    assert len(result.out.splitlines()) == 1
    found = json.loads(result.out)
    assert isinstance(found, dict)
    return found


@pytest.mark.slow
def test_the_road_by_hand(
    memlm: Callable[..., Result], model_folder: str, documents: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(documents, "documents.txt")
    made = ok(
        memlm(
            *("corpus", "documents.txt", "--document-separator", r"\n\n", "--tokenizer", model_folder),
            *("--block-size", 32, "--out", "c/", "--json"),
        )
    )
    assert (made["kind"], made["documents_read"]) == ("corpus", 80)
    made = ok(
        memlm(
            *("train", "c/", "--init", model_folder, "--kl-weight", 0, "--max-steps", 2, "--out", "teacher/", "--json")
        )
    )
    assert (made["kind"], made["steps"]) == ("memory", 2)
    made = ok(memlm("datastore", "c/", "--teacher", "teacher/", "--out", "d/", "--json"))
    corpus = json.loads(Path("c/manifest.json").read_text())
    assert made["entries"] == corpus["facts"]["splits"]["train"]["positions"]
    made = ok(memlm("targets", "d/", "--k", 16, "--target-temperature", 4, "--out", "t/", "--json"))
    assert 0 < made["mean_top1"] <= 1
    made = ok(
        memlm(
            *("train", "t/", "--init", model_folder, "--layers", 1, "--epochs", 0.1, "--learning-rate", "5e-4"),
            *("--out", "m/", "--json"),
        )
    )
    assert json.loads(Path("m/config.json").read_text())["num_hidden_layers"] == 1
    report = ok(memlm("evaluate", "perplexity", "c/", "--base", model_folder, "--memory", "m/", "--json"))
    assert {"base", "memory", "mixture", "tokens"} <= set(report)
    for name in ("base", "memory", "mixture"):
        low, high = report[name]["interval"]
        assert low <= report[name]["perplexity"] <= high
    assert 0 <= report["mixture"]["fixed"]["mix_weight"] <= 1
    assert report["mixture"]["gate"] == "posterior"
    assert report["tokens"] > 0
    answer = ok(
        memlm(
            *("generate", "What is asthma?", "--base", model_folder, "--memory", "m/"),
            *("--max-new-tokens", 4, "--json"),
        )
    )
    assert set(answer) == {"prompt", "text", "gate", "mix_weight"}
    assert answer["prompt"] == "What is asthma?"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "d", "documents.txt", "m", "t", "teacher"]


def test_extending_says_how_much_was_reused(
    memlm: Callable[..., Result], corpus_folder: Path, datastore_folder: Path, tmp_path: Path
) -> None:
    found = memlm("datastore", corpus_folder, "--extend", datastore_folder, "--out", tmp_path / "d2")
    assert (found.code, found.err) == (0, "")
    assert found.out.splitlines()[1] == (
        f"  5,560 entries (54 documents) from {datastore_folder}, 0 entries (0 documents) read by the teacher;"
        " 0 entries (0 documents) left out"
    )


def test_each_stage_says_in_words_what_it_made(
    memlm: Callable[..., Result], corpus_folder: Path, model_folder: str, memory_folder: Path, targets_folder: Path
) -> None:
    """The stages are finished, so this is what a repeated command prints; stderr says that they were."""
    found = memlm(
        *("train", targets_folder, "--init", model_folder, "--epochs", 1, "--batch-size", 4, "--dtype", "float32"),
        *("--out", memory_folder),
    )
    assert (found.code, found.err) == (0, f"{memory_folder} is there already: nothing to do\n")
    assert (
        f"\nnext: memlm evaluate perplexity {corpus_folder} --base {model_folder} --memory {memory_folder}\n"
        in found.out
    )
    assert re.search(
        r"parameters, \d+ steps; perplexity on [\d,]+ validation tokens: base [\d.]+, memory [\d.]+, mixed", found.out
    )
    found = memlm("evaluate", "perplexity", corpus_folder, "--base", model_folder, "--memory", memory_folder)
    assert (found.code, found.err) == (0, "")
    assert "base alone" in found.out
    assert "1,094 test tokens of 9 documents; mix_weight chosen on validation" in found.out


def test_an_evaluation_shows_passages_where_they_are_asked_for(
    memlm: Callable[..., Result], corpus_folder: Path, model_folder: str, memory_folder: Path
) -> None:
    command = ("evaluate", "perplexity", corpus_folder, "--base", model_folder, "--memory", f"law={memory_folder}")
    out = memlm(*command, "--passages").out
    gains = re.findall(r"^\[(helped most|typical|helped least)\] ([+-]\d+\.\d\d) nats a token", out, re.MULTILINE)
    assert [title for title, _ in gains] == ["helped most", "typical", "helped least"]
    assert len(re.findall(r"^    (lifted|sank): '", out, re.MULTILINE)) == 6
    assert out.splitlines()[-1] == f"next: memlm generate PROMPT --base {model_folder} --memory law={memory_folder}"
    assert "helped" not in memlm(*command).out


def test_an_explanation_is_written_as_a_page_and_coloured_for_a_terminal_alone(
    memlm: Callable[..., Result], model_folder: str, memory_folder: Path, tmp_path: Path
) -> None:
    mixed = ("--base", model_folder, "--memory", memory_folder, "--max-new-tokens", 2)
    found = memlm("explain", "the <memory>", *mixed, "--html", tmp_path / "answer.html")
    assert (found.code, "\x1b" in found.out) == (0, False)
    page = (tmp_path / "answer.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert "the &lt;memory&gt;" in page
    assert page.count("<span ") == 2


def test_adapt_names_the_command_to_go_on_with(
    memlm: Callable[..., Result], memory_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    AutoTokenizer.from_pretrained(memory_folder).train_new_from_iterator(["asthma"], 300).save_pretrained(other)
    command = ("adapt", memory_folder, "--tokenizer", other, "--out", tmp_path / "m2")
    found = memlm(*command)
    assert (found.code, found.err) == (0, "")
    assert f"memlm train TARGETS --init {tmp_path / 'm2'} --base {other} --epochs 0.1 --out" in found.out
    assert ok(memlm(*command, "--json"))["tokens"]["shared"] > 200
    assert "not trained since it was given a new tokenizer" in memlm("info", tmp_path / "m2").out
    found = memlm("adapt", memory_folder, "--tokenizer", memory_folder, "--out", tmp_path / "m3")
    assert (found.code, len(found.err.splitlines())) == (2, 1)
    assert "use it as it is" in found.err


def test_special_tokens_that_a_prompt_spells_are_told(
    memlm: Callable[..., Result], model_folder: str, memory_folder: Path, tmp_path: Path
) -> None:
    mixed = ("--base", model_folder, "--memory", memory_folder, "--dtype", "float32")
    (tmp_path / "p.txt").write_text("the </s> memory", encoding="utf-8")
    for command in (("generate", "the </s> memory"), ("explain", "--passages", tmp_path / "p.txt")):
        found = memlm(*command, *mixed, "--max-new-tokens", 2)
        assert "special tokens spelled in the prompt (</s> 1 times) are text like any; --special-tokens" in found.err
        found = memlm(*command, *mixed, "--max-new-tokens", 2, "--special-tokens")
        assert found.code == 0
        assert "(</s> 1 times) are those tokens" in found.err
    assert "special tokens" not in memlm("generate", "the memory", *mixed, "--max-new-tokens", 2).err


def test_convert_makes_a_memory_of_a_released_checkpoint(
    memlm: Callable[..., Result], model_folder: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = family_config("llama", len(tokenizer), layers=2)
    tensors = random_tensors(config)
    released = save_released(tmp_path / "released", tensors, config)
    command = ("convert", released, "--base", model_folder, "--out", tmp_path / "mlp")
    found = memlm(*command)
    assert found.code == 0
    assert "reads model.layers.1.mlp of" in found.out
    assert ok(memlm(*command, "--json"))["layout"] == "llama"
    assert "converted from a released checkpoint of layout llama" in memlm("info", tmp_path / "mlp").out
    mixed = ("--base", model_folder, "--memory", tmp_path / "mlp", "--mix-weight", 0.25)
    assert ok(memlm("generate", "the memory", *mixed, "--max-new-tokens", 2, "--json"))["mix_weight"] == 0.25
    del tensors["norm.weight"]
    lacking = save_released(tmp_path / "lacking", tensors, config)
    refusals = {
        "lacks 1 tensor, the first is norm.weight": (*command[:1], lacking, *command[2:5], tmp_path / "other"),
        "convert it: memlm convert": ("generate", "x", "--base", model_folder, "--memory", released, *mixed[4:]),
    }
    for line, arguments in refusals.items():
        found = memlm(*arguments)
        assert (found.code, len(found.err.splitlines())) == (2, 1)
        assert line in found.err


@pytest.mark.slow
def test_a_plan_is_a_table_or_one_object(
    memlm: Callable[..., Result], documents: str, model_folder: str, tmp_path: Path
) -> None:
    recipe, out = tmp_path / "small.yaml", tmp_path / "runs" / "small"
    corpus = {"documents": documents, "tokenizer": model_folder, "block_size": 32}
    sections = {"corpus": corpus, "datastore": {"teacher": model_folder}, "train": {"init": model_folder}}
    recipe.write_text(json.dumps(sections))
    planned = memlm("run", recipe, "--out", out, "--plan")
    assert planned.code == 0, planned.err
    lines = [line.split() for line in planned.out.splitlines()]
    assert [line[0] for line in lines] == [
        "step",
        "corpus",
        "datastore",
        "targets",
        "memory",
        "evaluation-memory",
        "to",
        "models",
    ]
    assert lines[1][1:4] == ["to", "be", "made"]
    assert lines[1][-1] == str(out / "corpus")
    steps = json.loads(memlm("run", recipe, "--out", out, "--plan", "--json").out)["steps"]
    assert {step["state"] for step in steps} == {"to be made"}
    assert steps[0].keys() == {"step", "state", "folder", "tokens", "seconds", "bytes", "memory", "operations"}
    assert not out.parent.exists()


@pytest.mark.slow
def test_work_is_quiet_when_piped(corpus_folder: Path, model_folder: str, program: Path, tmp_path: Path) -> None:
    """Training shows bars on a terminal; a pipe gets results on stdout and nothing on stderr."""
    found = shell(
        *("train", corpus_folder, "--init", model_folder, "--kl-weight", 0, "--max-steps", 2, "--json"),
        *("--out", tmp_path / "m"),
        program=program,
    )
    assert ok(found)["steps"] == 2


def test_generate_streams_text_and_obeys_its_options(
    memlm: Callable[..., Result], model_folder: str, memory_folder: Path
) -> None:
    both = ("--base", model_folder, "--memory", memory_folder, "--dtype", "float32")
    few = ("--max-new-tokens", 12)
    plain = memlm("generate", "the memory", *both, *few)
    as_json = ok(memlm("generate", "the memory", *both, *few, "--json"))
    assert (plain.code, plain.err) == (0, "")
    assert plain.out.strip() == without_controls(as_json["text"]).strip()
    assert ok(memlm("generate", "the memory", *both, *few, "--mix-weight", 0.25, "--json"))["mix_weight"] == 0.25
    assert ok(memlm("generate", "the memory", *both, *few, "--temperature", 1e-50, "--json"))["text"] == as_json["text"]
    sampled = [
        ok(memlm("generate", "the memory", *both, *few, "--temperature", 1, "--seed", seed, "--json"))["text"]
        for seed in (0, 0, 1)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    for drafting in ("off", "3", "auto"):
        told = memlm("generate", "the memory", *both, *few, "--drafting", drafting, "--json")
        assert ok(told)["text"] == as_json["text"]
        assert told.err == ""
    for wrong in ("often", "0", "33"):
        told = memlm("generate", "the memory", *both, *few, "--drafting", wrong)
        assert told.code != 0
        assert f"--drafting {wrong}: give a number of tokens from 1 to 32, auto or off" in told.err


def test_a_memory_that_cannot_draft_says_nothing_of_it(
    memlm: Callable[..., Result], model_folder: str, mlp_folder: Path
) -> None:
    told = memlm("generate", "the memory", "--base", model_folder, "--memory", mlp_folder, "--max-new-tokens", 4)
    assert (told.code, told.err) == (0, "")


def test_generate_mixes_several_memories_by_name(
    memlm: Callable[..., Result], model_folder: str, memory_folder: Path, datastore_folder: Path
) -> None:
    named = ("--memory", f"law={memory_folder}", "--memory", f"facts={datastore_folder}", "--k", 8)
    command = ("generate", "the memory", "--base", model_folder, *named, "--dtype", "float32", "--max-new-tokens", 6)
    recorded = json.loads((memory_folder / "memory.json").read_text())["mix_weight"]
    found = ok(memlm(*command, "--mix-weight", f"facts={1 - recorded}", "--json"))
    assert found["mix_weight"] == {"law": recorded, "facts": pytest.approx(1 - recorded)}
    weights = ("--mix-weight", "facts=0", "--mix-weight", "law=0.5", "--json")
    found = ok(memlm(*command, *weights))
    assert found["mix_weight"] == {"law": 0.5, "facts": 0.0}
    alone = ("generate", "the memory", "--base", model_folder, "--dtype", "float32", "--max-new-tokens", 6)
    single = ok(memlm(*alone, "--memory", memory_folder, "--mix-weight", 0.5, "--json"))
    assert (single["mix_weight"], single["text"]) == (0.5, found["text"])


def test_explain_shows_passages_of_a_file(
    memlm: Callable[..., Result], model_folder: str, memory_folder: Path, datastore_folder: Path, tmp_path: Path
) -> None:
    file, page = tmp_path / "cases.txt", tmp_path / "cases.html"
    file.write_text("the memory\nof doctors\n\n \npatients say that\n", encoding="utf-8")
    command = ("explain", "--base", model_folder, "--memory", memory_folder, "--passages", file)
    told = memlm(*command, "--html", page)
    assert told.code == 0, told
    assert told.out.count("helped most: ") == told.out.count("hurt most: ") == 2
    assert page.read_text(encoding="utf-8").count("for the base alone") == 2
    assert "by how often the training text has the token" not in told.out
    assert "the long tail" in memlm(*command, "--datastore", datastore_folder).out
    found = ok(memlm(*command, "--json"))["passages"]
    assert len(found) == 2
    assert "give a prompt to go on from, or --passages" in memlm(*command, "the memory").err
    assert "give a prompt to go on from, or --passages" in memlm(*command[:-2]).err
    file.write_text(" \n", encoding="utf-8")
    assert "there is no text in it" in memlm(*command).err


def test_explain_prints_tokens_with_snippets_or_one_object(
    memlm: Callable[..., Result], model_folder: str, memory_folder: Path, datastore_folder: Path
) -> None:
    both = ("--base", model_folder, "--memory", memory_folder, "--dtype", "float32", "--max-new-tokens", 3)
    command = ("explain", "the memory", *both, "--datastore", datastore_folder, "--neighbors", 2)
    plain = memlm(*command)
    as_json = ok(memlm(*command, "--json"))
    assert (plain.code, plain.err) == (0, "")
    assert as_json["text"] == ok(memlm("generate", "the memory", *both, "--json"))["text"]
    assert [len(token["neighbors"]) for token in as_json["tokens"]] == [2, 2, 2]
    for token in as_json["tokens"]:
        assert f"{token['base_prob']:.4f}" in plain.out
        for near in token["neighbors"]:
            assert f"{near['distance']:.1f}  {near['document']} " in plain.out
    assert "not proof that they caused" in " ".join(plain.out.split())
    assert as_json["note"] == " ".join(plain.out.split("\n\n")[-1].split())
    bare = memlm("explain", "the memory", *both)
    assert (bare.code, bare.err) == (0, "")
    assert "No snippets: give the datastore (--datastore)" in bare.out
    live = ("--base", model_folder, "--memory", datastore_folder, "--mix-weight", 0.25, "--k", 8)
    found = ok(memlm("explain", "the memory", *live, "--max-new-tokens", 2, "--json"))
    assert found["mix_weights"] == {"memory": 0.25}
    assert [len(token["neighbors"]) for token in found["tokens"]] == [3, 3]


@pytest.mark.slow
def test_a_base_whose_own_config_asks_for_more_than_tokens_is_given_them(
    memlm: Callable[..., Result], model_folder: str, memory_folder: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(model_folder, tmp_path / "base")
    (base / "generation_config.json").write_text('{"return_dict_in_generate": true, "output_scores": true}')
    asked = ("the memory", "--memory", memory_folder, "--max-new-tokens", 4, "--json")
    found, plain = (ok(memlm("generate", *asked, "--base", which))["text"] for which in (base, model_folder))
    assert found == plain


@pytest.mark.slow
def test_chat_reads_lines_from_a_pipe(model_folder: str, memory_folder: Path, program: Path) -> None:
    both = ("--base", model_folder, "--memory", memory_folder, "--dtype", "float32", "--temperature", 0)
    lines = "hello\n/weight 0.3\n/weight 7\n/clear\nagain\n\nnever read\n"
    found = shell("chat", *both, "--max-new-tokens", 5, stdin=lines, program=program)
    assert found.code == 0
    assert len(found.out.splitlines()) >= 2  # an answer per turn
    assert "mix_weight = 7: must be in [0, 1]" in found.err
    assert "no chat template" in found.err
    assert "Traceback" not in found.err


def test_chat_forgets_on_clear_and_obeys_the_weight(
    memlm: Callable[..., Result], model_folder: str, memory_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import memlm.cli.use as cli

    seen = []

    def generate(model: Any, tokenizer: Any, prompt: str, *args: Any, **kwargs: Any) -> str:
        seen.append((prompt, model.mix_weights["memory"]))
        return "answer"

    lines = iter(["one", "two", "/clear", "/weight 0.25", "three"])
    monkeypatch.setattr(cli, "generate_text", generate)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, ""))
    assert memlm("chat", "--base", model_folder, "--memory", memory_folder, "--mix-weight", 0.5).code == 0
    assert seen == [("one\n", 0.5), ("one\nanswer\ntwo\n", 0.5), ("three\n", 0.25)]


def test_chat_changes_weights_by_name(
    memlm: Callable[..., Result],
    model_folder: str,
    memory_folder: Path,
    datastore_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import memlm.cli.use as cli

    seen = []

    def generate(model: Any, tokenizer: Any, prompt: str, *args: Any, **kwargs: Any) -> str:
        seen.append((model.mix_weights, model.named_memories()["facts"].settings.retrieval.k))
        return "answer"

    lines = iter(["one", "/weight facts=0.5", "two", "/weight 0.1", "/weight bio=0.1", "/weight law=0.9", "three"])
    monkeypatch.setattr(cli, "generate_text", generate)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, ""))
    named = ("--memory", f"law={memory_folder}", "--memory", f"facts={datastore_folder}", "--k", 8)
    found = memlm("chat", "--base", model_folder, *named, "--mix-weight", "law=0.25", "--mix-weight", "facts=0.125")
    assert found.code == 0
    after = ({"law": 0.25, "facts": 0.5}, 8)
    assert seen == [({"law": 0.25, "facts": 0.125}, 8), after, after]
    assert "mix_weight law=0.25, facts=0.125; /weight W" in found.err
    errors = [line for line in found.err.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: --mix-weight '0.1': with several memories write --mix-weight NAME=VALUE for each",
        "error: mix_weight names bio; the memories are law, facts",
        "error: mix_weight: the weights 0.9, 0.5 sum to 1.4, above 1",
    ]


def test_lines_that_are_no_utf_8_end_a_chat_in_one_line(
    memlm: Callable[..., Result], model_folder: str, memory_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    found = memlm("chat", "--base", model_folder, "--memory", memory_folder)
    assert found.code == 2
    assert found.err.splitlines()[-1] == (
        "memlm: error: what was typed or piped is not utf-8; see to the encoding of the terminal"
    )


KINDS = ("corpus", "datastore", "targets", "memory")


@pytest.mark.parametrize("kind", KINDS)
def test_info_says_what_a_folder_is(
    memlm: Callable[..., Result], request: pytest.FixtureRequest, kind: str, model_folder: str
) -> None:
    folder = request.getfixturevalue(f"{kind}_folder")
    found = memlm("info", folder)
    assert (found.code, found.err) == (0, "")
    named = "decoder memory" if kind == "memory" else kind
    made = r"made \d{4}-\d\d-\d\d \d\d:\d\d; its last run took \d+ (s|min)\n"
    assert re.match(rf"{folder}: {named}, [\d.]+ [kM]B in \d+ files\n{made}", found.out)
    assert model_folder in found.out  # from what
    manifest = json.loads((folder / MANIFEST).read_text())
    assert ("mixed" in found.out) == (kind == "memory")
    for name, value in manifest["config"].items():
        if isinstance(value, int) and not isinstance(value, bool):
            assert re.search(rf"^  {name} +{value:,}$", found.out, re.MULTILINE)
    as_json = ok(memlm("info", folder, "--json"))
    assert {name: as_json[name] for name in manifest} == manifest
    assert as_json["finished"] > 1.7e9
    assert as_json["folder"] == str(folder)


def test_info_tells_of_a_memorys_confidence(memlm: Callable[..., Result], memory_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(memory_folder, folder)
    assert "confidence" not in memlm("info", folder).out
    facts = {"domain_tokens": 12000, "domain_gate_perplexity": 9.7512, "domain_fixed_perplexity": 10.4}
    (folder / "gate.json").write_text(json.dumps({"base": "smollm2", "facts": facts}))
    told = "beside smollm2; on 12,000 held-out tokens perplexity 9.75 with it, 10.40 with a fixed weight"
    assert told in memlm("info", folder).out
    (folder / "gate.json").write_text("[]")
    one_line(memlm("info", folder), "holds no confidence head")


def test_info_knows_scores_and_evaluations_too(
    memlm: Callable[..., Result],
    corpus_folder: Path,
    model_folder: str,
    memory_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MEMLM_HOME", str(tmp_path / "home"))
    assert (
        memlm(
            *("evaluate", "perplexity", corpus_folder, "--base", model_folder, "--memory", memory_folder),
            *("--out", tmp_path / "e"),
        ).code
        == 0
    )
    assert ": evaluation, " in memlm("info", tmp_path / "e").out
    assert ": scores, " in memlm("info", next((tmp_path / "home" / "scores").iterdir())).out


def test_list_shows_every_folder_below_with_its_kind_origin_quality_and_size(
    memlm: Callable[..., Result], tmp_path: Path, corpus_folder: Path, datastore_folder: Path, memory_folder: Path
) -> None:
    for name, folder in {"c": corpus_folder, "deep/er/d": datastore_folder, "m": memory_folder}.items():
        shutil.copytree(folder, tmp_path / name)
    (tmp_path / "u").mkdir()
    (tmp_path / "u" / "plan.json").write_text("{}")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / MANIFEST).write_text("{")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = ok(memlm("list", tmp_path, "--json"))["folders"]
    kinds = {str(Path(entry["folder"]).relative_to(tmp_path)): entry["kind"] for entry in found}
    # a datastore's own copy of its corpus is no folder of its own
    expected = {"c": "corpus", "deep/er/d": "datastore", "m": "memory", "u": "unfinished", "x": "damaged"}
    assert kinds == expected
    memory = next(entry for entry in found if entry["kind"] == "memory")
    manifest = read_manifest(memory_folder)
    assert memory["bytes"] == sum(file.bytes for file in manifest.payload.values())
    assert memory["from"] == manifest.sources["base"]
    best, base = manifest.facts["validation"]["best"], manifest.facts["validation"]["base_perplexity"]
    assert memory["good"] == f"validation {best['mixture_perplexity']:.2f} of base {base:.2f} at {best['mix_weight']:g}"
    shown = memlm("list", tmp_path)
    assert (shown.code, shown.err, len(shown.out.splitlines())) == (0, "", 6)


def test_list_says_where_there_is_nothing(memlm: Callable[..., Result], tmp_path: Path) -> None:
    assert memlm("list", tmp_path).out == f"no memlm folder lies in {tmp_path}\n"
    assert ok(memlm("list", tmp_path, "--json")) == {"folders": []}
    one_line(memlm("list", tmp_path / "none"), "none is no folder")


def test_fetch_prints_the_folder_of_a_fetched_model_last(
    memlm: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMLM_HOME", str(tmp_path))
    (tmp_path / "models" / "smollm2").mkdir(parents=True)
    found = memlm("fetch", "smollm2")
    assert (found.code, found.out.splitlines()[-1]) == (0, str(tmp_path / "models" / "smollm2"))


def test_a_damaged_folder_is_repaired_and_then_finished_by_its_command(
    memlm: Callable[..., Result], targets_folder: Path, datastore_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "t"
    shutil.copytree(targets_folder, folder)
    assert f"{folder} is whole" in memlm("repair", folder).out
    shard = folder / "train-00001.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(b"\0" * len(whole))
    found = memlm("repair", folder)
    assert found.code == 0
    assert f"run the command that made {folder} again" in found.out
    ok(memlm("targets", datastore_folder, "--k", 16, "--target-temperature", 4, "--out", folder, "--json"))
    assert shard.read_bytes() == whole


def test_what_a_stranger_wrote_moves_no_cursor(
    memlm: Callable[..., Result], corpus_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(corpus_folder, tmp_path / "c")
    edit_manifest(folder, lambda manifest: manifest["sources"].update(documents="\x1b[2Jgone\nmore"))
    out = memlm("info", folder).out
    assert re.search(r"^  documents +\\x1b\[2Jgone\\nmore$", out, re.MULTILINE)


def test_facts_that_no_memory_has_are_refused(
    memlm: Callable[..., Result], memory_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(memory_folder, tmp_path / "m")
    edit_manifest(folder, lambda manifest: manifest["facts"].update(parameters="many"))
    one_line(memlm("info", folder), "its facts are not those of a memory")


# --- bad input ----------------------------------------------------------------------------------------------------


def one_line(found: Result, match: str) -> None:
    """Exit code 2, nothing on stdout, and one line on stderr that says what is wrong."""
    assert found.code == 2, found
    assert found.out == ""
    lines = found.err.splitlines()
    assert len(lines) == 1, found.err
    assert lines[0].startswith("memlm: error: ")
    assert re.search(match, lines[0]), lines[0]


def snapshot(*roots: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for root in roots for p in [root, *root.rglob("*")]}


class World(NamedTuple):
    """Where a case finds its inputs; `tmp` is its own."""

    tmp: Path
    documents: str
    model: str
    corpus: Path
    datastore: Path
    targets: Path
    memory: Path
    tokenizer: PreTrainedTokenizerFast

    def copy(self, name: str) -> Path:
        return shutil.copytree(getattr(self, name), self.tmp / f"copy-of-{name}")

    def corpus_of(self, *arguments: Any) -> tuple[Any, ...]:
        return ("corpus", *arguments, "--tokenizer", self.model, "--out", self.tmp / "out")

    def datastore_of(self, corpus: Path, teacher: str | None = None, *arguments: Any) -> tuple[Any, ...]:
        return ("datastore", corpus, "--teacher", teacher or self.model, "--out", self.tmp / "out", *arguments)

    def targets_of(self, datastore: Path, *arguments: Any) -> tuple[Any, ...]:
        return ("targets", datastore, "--out", self.tmp / "out", *arguments)

    def train_on(self, data: Path, *arguments: Any, init: str | None = None) -> tuple[Any, ...]:
        return ("train", data, "--init", init or self.model, "--out", self.tmp / "out", *arguments)

    def evaluate(self, *arguments: Any, base: str | None = None, memory: Any = None) -> tuple[Any, ...]:
        pair = ("--base", base or self.model, "--memory", memory or self.memory)
        return ("evaluate", "perplexity", self.corpus, *pair, *arguments)

    def generate(self, *arguments: Any, base: str | None = None, memory: Any = None) -> tuple[Any, ...]:
        return ("generate", "x", "--base", base or self.model, "--memory", memory or self.memory, *arguments)

    def explain(self, datastore: Path, *, base: str | None = None) -> tuple[Any, ...]:
        return ("explain", "x", "--base", base or self.model, "--memory", self.memory, "--datastore", datastore)

    def recipe(self, text: str) -> Path:
        (self.tmp / "recipe.yaml").write_text(text)
        return self.tmp / "recipe.yaml"


@pytest.fixture
def world(
    tmp_path: Path,
    documents: str,
    model_folder: str,
    corpus_folder: Path,
    datastore_folder: Path,
    targets_folder: Path,
    memory_folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> World:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEMLM_HOME", str(tmp_path / "home"))
    return World(
        tmp_path, documents, model_folder, corpus_folder, datastore_folder, targets_folder, memory_folder, tokenizer
    )


def empty_corpus(w: World) -> tuple[Any, ...]:
    (w.tmp / "blank.txt").write_text("\n \n\n")
    return w.corpus_of("blank.txt")


def not_utf8(w: World) -> tuple[Any, ...]:
    (w.tmp / "latin.txt").write_bytes("naïve".encode("latin-1"))
    return w.corpus_of("latin.txt")


def unknown_format(w: World) -> tuple[Any, ...]:
    (w.tmp / "thesis.docx").write_bytes(b"PK")
    return w.corpus_of("thesis.docx")


def bad_separator(w: World) -> tuple[Any, ...]:
    return w.corpus_of(w.documents, "--document-separator", "\\")


def small_vocabulary(w: World) -> tuple[Any, ...]:
    tiny_config(300).save_pretrained(w.tmp / "small")
    return w.datastore_of(w.corpus, "small")


def missing_shard(w: World) -> tuple[Any, ...]:
    folder = w.copy("datastore")
    (folder / "keys" / "00001.npy").unlink()
    return w.targets_of(folder, "--k", 8)


def truncated_shard(w: World) -> tuple[Any, ...]:
    folder = w.copy("targets")
    shard = folder / "train-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-1])
    return w.train_on(folder)


def truncated_weights(w: World) -> tuple[Any, ...]:
    folder = w.copy("memory")
    (folder / "model.safetensors").write_bytes(b"short")
    return w.generate(memory=folder)


def other_version(w: World) -> tuple[Any, ...]:
    folder = w.copy("corpus")
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format_version": 99}))
    return w.datastore_of(folder)


def broken_manifest(w: World) -> tuple[Any, ...]:
    folder = w.copy("corpus")
    (folder / MANIFEST).write_text("{")
    return ("info", folder)


def other_tokenizer(w: World) -> str:
    return save_stranger(w.tmp / "other", w.tokenizer)


def extending(w: World, *arguments: Any, corpus: Path | None = None) -> tuple[Any, ...]:
    return ("datastore", corpus or w.corpus, "--extend", w.datastore, "--out", w.tmp / "out", *arguments)


def extended_by_another_teacher(w: World) -> tuple[Any, ...]:
    folder = shutil.copytree(w.model, w.tmp / "teacher")
    (folder / "model.safetensors").write_bytes(b"other")
    return extending(w, "--teacher", folder)


def extended_by_other_blocks(w: World) -> tuple[Any, ...]:
    settings = CorpusConfig(document_separator="\n\n", block_size=24)
    build_corpus([w.documents], tokenizer=w.model, out=w.tmp / "c2", config=settings)
    return extending(w, corpus=w.tmp / "c2")


def taken_by_a_file(w: World) -> tuple[Any, ...]:
    (w.tmp / "out").write_text("years of work")
    return w.corpus_of(w.documents)


def taken_by_a_folder(w: World) -> tuple[Any, ...]:
    (w.tmp / "out").mkdir()
    (w.tmp / "out" / "thesis.txt").write_text("years of work")
    return w.datastore_of(w.corpus)


def taken_by_another_run(w: World) -> tuple[Any, ...]:
    shutil.copytree(w.targets, w.tmp / "out")
    return w.targets_of(w.datastore, "--k", 8, "--target-temperature", 4)


def another_unfinished_run(w: World) -> tuple[Any, ...]:
    (w.tmp / "out").mkdir()
    (w.tmp / "out" / "plan.json").write_text('{"kind": "corpus"}')
    (w.tmp / "out" / "train.tokens.npy").write_text("work")
    (w.tmp / "out" / "lock").touch()
    return w.targets_of(w.datastore, "--k", 8)


def recipe(text: str, *arguments: str) -> Callable[[World], tuple[Any, ...]]:
    return lambda w: ("run", w.recipe(text), "--out", w.tmp / "out", *arguments)


def two_memories(*arguments: str) -> Callable[[World], tuple[Any, ...]]:
    """A generation with memories called law and bio."""
    return lambda w: w.generate("--memory", f"bio={w.memory}", *arguments, memory=f"law={w.memory}")


WHOLE = """
corpus: {documents: [documents.txt], tokenizer: tiny}
datastore: {teacher: tiny}
targets: {k: 8}
train: {init: tiny}
"""

BAD: dict[str, tuple[Callable[[World], tuple[Any, ...]], str]] = {
    "empty corpus": (empty_corpus, "the corpus is empty"),
    "not UTF-8": (not_utf8, r"latin\.txt is not utf-8 .*--encoding"),
    "unknown format": (unknown_format, r"thesis\.docx has an unknown format; known: \.txt"),
    "no such document": (lambda w: w.corpus_of("no/such.txt"), "no/such.txt does not exist"),
    "separator that cannot be read": (bad_separator, "--document-separator"),
    "stride not below block": (
        lambda w: w.corpus_of(w.documents, "--block-size", 8, "--stride", 8),
        "stride 8 must be below block_size 8",
    ),
    "ids outside the vocabulary": (small_vocabulary, "outside the 300 of"),
    "missing shard": (
        missing_shard,
        r"keys/00001\.npy is missing; run `memlm repair .*/copy-of-datastore`, then the command that made it",
    ),
    "truncated shard": (truncated_shard, r"train-00000\.arrow has \d+ bytes, its manifest says \d+"),
    "truncated weights": (truncated_weights, r"model\.safetensors has 5 bytes"),
    "other version": (other_version, "format version 99, this memlm reads 1; rebuild"),
    "broken manifest": (broken_manifest, r"manifest\.json cannot be read"),
    "no manifest": (lambda w: ("info", w.model), r"has no manifest\.json; expected a memlm folder"),
    "folder of another kind": (
        lambda w: w.targets_of(w.targets),
        "is a targets folder, expected datastore or corpus",
    ),
    "a corpus without a teacher": (
        lambda w: w.targets_of(w.corpus),
        "has no neighbours, so its targets are what a model says: give --teacher",
    ),
    "teacher with another tokenizer": (
        lambda w: w.datastore_of(w.corpus, other_tokenizer(w)),
        "different tokenizers .320 and 321 tokens.",
    ),
    "start with another tokenizer": (
        lambda w: w.train_on(w.targets, init=other_tokenizer(w)),
        "different tokenizers .320 and 321 tokens.",
    ),
    "base with another tokenizer": (
        lambda w: w.evaluate(base=other_tokenizer(w)),
        "different tokenizers .320 and 321 tokens.",
    ),
    "generation with another tokenizer": (
        lambda w: w.generate(base=other_tokenizer(w)),
        "different tokenizers .321 and 320 tokens.",
    ),
    "snippets of another tokenizer": (
        lambda w: w.explain(w.datastore, base=other_tokenizer(w)),
        "different tokenizers .321 and 320 tokens.; build a corpus and a datastore with this model's",
    ),
    "snippets from a folder of another kind": (
        lambda w: w.explain(w.corpus),
        "is a corpus folder, expected datastore",
    ),
    "k too large": (
        lambda w: w.targets_of(w.datastore, "--k", 100_000),
        r"k = 100000 is larger than the 5559 other entries .* lower --k",
    ),
    "k of 0": (lambda w: w.targets_of(w.datastore, "--k", 0), "k = 0: input should be greater than or equal to 1"),
    "temperature of 0": (
        lambda w: w.targets_of(w.datastore, "--target-temperature", 0),
        r"target_temperature = 0\.0: input should be greater than 0",
    ),
    "temperature below 0": (
        lambda w: w.targets_of(w.datastore, "--target-temperature", -4),
        r"target_temperature = -4\.0: input should be greater than 0",
    ),
    "temperature not a number": (
        lambda w: w.targets_of(w.datastore, "--target-temperature", "nan"),
        "target_temperature = nan: ",
    ),
    "mix_weight above 1": (lambda w: w.evaluate("--mix-weight", 1.5), r"mix_weight = 1\.5: "),
    "mix_weight below 0": (lambda w: w.generate("--mix-weight", -0.1), r"mix_weight = -0\.1: must be in \[0, 1\]"),
    "prompt that is no UTF-8": (
        lambda w: ("generate", "caf\udce9", "--base", w.model, "--memory", w.memory),
        "the prompt is not UTF-8",
    ),
    "prompt to explain that is no UTF-8": (
        lambda w: ("explain", "caf\udce9", "--base", w.model, "--memory", w.memory),
        "the prompt is not UTF-8",
    ),
    "recipe nested too deeply": (recipe("[" * 5000), r"recipe\.yaml is not valid YAML: nested too deeply"),
    "mix_weight not a number": (lambda w: w.generate("--mix-weight", "nan"), r"mix_weight = nan: must be in \[0, 1\]"),
    "weights of two memories above 1": (
        two_memories("--mix-weight", "law=0.3", "--mix-weight", "bio=0.9"),
        r"mix_weight: the weights 0\.3, 0\.9 sum to 1\.2, above 1$",
    ),
    "two memories without names": (
        lambda w: w.generate("--memory", w.memory),
        "--memory '.*': with several memories write --memory NAME=VALUE for each",
    ),
    "one name for two memories": (
        lambda w: w.generate("--memory", f"law={w.memory}", memory=f"law={w.memory}"),
        "--memory names 'law' twice",
    ),
    "weight without a name": (
        two_memories("--mix-weight", "0.3"),
        "--mix-weight '0.3': with several memories write --mix-weight NAME=VALUE for each",
    ),
    "weight of an unknown memory": (
        two_memories("--mix-weight", "lwa=0.3"),
        "mix_weight names lwa; the memories are law, bio",
    ),
    "weight that is no number": (
        two_memories("--mix-weight", "law=much"),
        r"--mix-weight law=much: give a number in \[0, 1\]",
    ),
    "datastore without a weight": (
        lambda w: w.generate("--gate", "none", memory=w.datastore),
        "mix_weight of 'memory' is missing: the memory records none from validation data; give one",
    ),
    "gate of no name": (lambda w: w.generate("--gate", "posterio"), "gate = 'posterio': "),
    "confidence without a head": (
        lambda w: w.generate("--gate", "both"),
        "memory 'memory' has no confidence head; fit one with memlm gate",
    ),
    "prior above 1": (lambda w: w.generate("--prior", 2), r"prior = 2\.0: "),
    "gate of a model": (
        lambda w: ("gate", w.model, "--corpus", w.corpus, "--base", w.model),
        "has no manifest.json; expected a memory or datastore folder",
    ),
    "kl_weight above 1": (lambda w: w.train_on(w.targets, "--kl-weight", 2), r"kl_weight = 2\.0: "),
    "corpus without targets": (
        lambda w: w.train_on(w.corpus, "--kl-weight", 0.5),
        "is a corpus without targets.* or leave out --kl-weight",
    ),
    "too many layers": (lambda w: w.train_on(w.targets, "--layers", 10), "layers = 10: .* has 2"),
    "layers that are no numbers": (
        lambda w: w.train_on(w.targets, "--layers", "first"),
        "--layers 'first': give a number",
    ),
    "unknown dtype": (lambda w: w.generate("--dtype", "float17"), "dtype = 'float17': known are auto"),
    "a page that is a folder": (
        lambda w: ("explain", "hi", "--base", w.model, "--memory", w.memory, "--html", "/"),
        "/ is a folder; name a file",
    ),
    "a page of a folder that is a folder": (lambda w: ("info", w.corpus, "--html", w.tmp), "is a folder; name a file"),
    "a report that cannot be written": (
        lambda w: ("evaluate", "tasks", "x", "--base", w.model, "--memory", w.memory, "--out", "/proc/no/report.json"),
        "/proc/no/report.json cannot be written: /proc is no folder that one may write to",
    ),
    "output is a file": (taken_by_a_file, "out exists and is no memlm folder; choose another output or delete it"),
    "output is someone's folder": (taken_by_a_folder, "out exists and is no memlm folder"),
    "output of another run": (
        taken_by_another_run,
        r"out exists and was made otherwise \(config\.k: 16 there, 8 here\)",
    ),
    "unfinished run of another stage": (
        another_unfinished_run,
        r"unfinished run of something else \(kind: 'corpus' there",
    ),
    "unreachable teacher": (lambda w: w.datastore_of(w.corpus, "no/such"), "model 'no/such' cannot be loaded; tried: "),
    "no teacher": (lambda w: ("datastore", w.corpus, "--out", w.tmp / "out"), "teacher is missing: give --teacher, "),
    "extending by another teacher": (extended_by_another_teacher, "is not the model that made datastore .*; give that"),
    "extending by other blocks": (extended_by_other_blocks, "c2 has block_size 24, datastore .* 32; make the corpus"),
    "extending in another precision": (
        lambda w: extending(w, "--dtype", "bfloat16"),
        "dtype = 'bfloat16', but datastore .* has keys made with 'float32'; leave out --dtype",
    ),
    "unreachable memory": (lambda w: w.evaluate(memory="no/such"), "'no/such' cannot be loaded; tried: "),
    "unreachable tokenizer": (
        lambda w: ("corpus", w.documents, "--tokenizer", "no/such", "--out", w.tmp / "out"),
        "no tokenizer could be loaded from 'no/such'",
    ),
    "unknown packaged model": (lambda w: ("fetch", "smollm3"), "no packaged model is called 'smollm3'; known: smollm2"),
    "no such recipe": (lambda w: ("run", "no.yaml"), r"cannot read recipe no\.yaml: No such file"),
    "recipe that is no YAML": (recipe("a: ["), "is not valid YAML"),
    "recipe that is a list": (recipe("- a"), "must hold one mapping per stage"),
    "unknown section": (recipe("target: {k: 8}"), "unknown section 'target'; did you mean 'targets'?"),
    "unknown key": (
        recipe(WHOLE, "--set", "targets.target_temprature=4"),
        "unknown setting 'targets.target_temprature'; did you mean 'target_temperature'?",
    ),
    "wrong type": (recipe(WHOLE, "--set", "targets.k=many"), "targets.k = 'many': input should be a valid integer"),
    "documents of a wrong type": (recipe(WHOLE, "--set", "corpus.documents=5"), "corpus.documents = 5: give a path"),
    "model of a wrong type": (recipe(WHOLE, "--set", "train.init=[a, b]"), r"train.init = \['a', 'b'\]: give a path"),
    "override without a value": (
        recipe(WHOLE, "--set", "targets.k"),
        "'targets.k' is not of the form section.key=value",
    ),
    "missing key": (recipe("corpus: {tokenizer: tiny}"), "corpus.documents is missing"),
    "teacher with targets": (
        recipe(WHOLE + "teacher: {init: tiny, kl_weight: 0.5}"),
        r"teacher\.kl_weight = 0\.5: a teacher is trained without targets",
    ),
    "unknown training argument": (
        recipe(WHOLE, "--set", "train.trainer={adam_beta3: 0.9}"),
        r"unknown setting 'train\.trainer\.adam_beta3'; did you mean 'adam_beta",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_clear_line_and_harms_nothing(
    memlm: Callable[..., Result], world: World, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    prepare, match = BAD[case]
    arguments = prepare(world)
    out = world.tmp / "out"
    before = snapshot(world.corpus.parent, Path(world.documents).parent, Path(world.model))
    here = snapshot(out) if out.exists() else {}

    forbid_models(monkeypatch)
    one_line(memlm(*arguments), match)
    assert snapshot(world.corpus.parent, Path(world.documents).parent, Path(world.model)) == before
    assert (snapshot(out) if out.exists() else {}) == here


@pytest.mark.parametrize(
    "arguments",
    [
        ("corpus",),
        ("corpus", "x.txt", "--tokenizer", "y"),
        ("targets", "d/", "--out", "t/", "--k", "many"),
        ("targets", "d/", "--out", "t/", "--kk", "8"),
        ("generate", "x", "--base", "b", "--memory", "m", "--max-new-tokens", "0"),
        ("nonsense",),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2_and_says_why(memlm: Callable[..., Result], arguments: tuple[str, ...]) -> None:
    found = memlm(*arguments)
    assert (found.code, found.out) == (2, "")
    assert "Error: " in found.err
    assert re.match(r"Usage: memlm .*\nTry 'memlm .*-h' for help", found.err)


NEEDED = {
    ("gate",): ("m", "--corpus", "c", "--base", "b"),
    ("corpus",): ("x", "--out", "o", "--tokenizer", "t"),
    ("datastore",): ("x", "--out", "o"),
    ("targets",): ("x", "--out", "o"),
    ("write",): ("x", "--out", "o"),
    ("train",): ("x", "--out", "o"),
    ("adapt",): ("x", "--tokenizer", "t", "--out", "o"),
    ("evaluate", "perplexity"): ("x", "--base", "b", "--memory", "m"),
    ("evaluate", "generation"): ("x", "--base", "b", "--memory", "m"),
    ("generate",): ("x", "--base", "b", "--memory", "m"),
    ("explain",): ("x", "--base", "b", "--memory", "m"),
    ("chat",): ("--base", "b", "--memory", "m"),
    ("bench",): ("b", "--memory", "m", "--prompts", "p"),
    ("demo",): (),
}
"""Commands with options that are numbers, and what else they are to be given."""


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_number_of_a_command_has_bounds(
    memlm: Callable[..., Result], command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for shell in (cli_measure, cli_road, cli_use):
        monkeypatch.setattr(shell, "quiet", lambda: pytest.fail("the command began"))
    options = re.findall(r"--([\w-]+)[ \n]+<?(?:int|float)", memlm(*command, "--help").out, re.IGNORECASE)
    assert bool(options) == (command in NEEDED)
    values = ("1" + 20 * "0", "-1" + 20 * "0", "inf", "nan", "1" + 5000 * "0")
    for option, value in itertools.product(options, values):
        found = memlm(*command, *NEEDED[command], f"--{option}", value)
        assert (found.code, found.out) == (2, ""), option
        assert re.fullmatch(r"memlm: error: [^\n]*|(?s:Usage: .*)\nError: [^\n]*", found.err.strip()), found.err
        assert option in found.err.replace("_", "-")


def test_a_folder_whose_name_looks_like_a_named_memory_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=5e-4").mkdir()
    assert by_name(["lr=5e-4"], ["0.5"]) == ({"memory": "lr=5e-4"}, {"memory": 0.5})
    assert by_name(["law=lr=5e-4"], None)[0] == {"law": "lr=5e-4"}
    assert by_name(["lr=elsewhere"], None)[0] == {"lr": "elsewhere"}
    with pytest.raises(ConfigError, match="with several memories write --memory NAME=VALUE"):
        by_name(["lr=5e-4", "law=m"], None)


@pytest.mark.slow
def test_a_process_exits_with_2_on_bad_input(corpus_folder: Path, tmp_path: Path) -> None:
    one_line(shell("datastore", corpus_folder, "--teacher", "no/such", "--out", tmp_path / "d"), "'no/such' cannot be")
    assert not list(tmp_path.iterdir())


def test_an_interrupt_says_that_work_goes_on(
    memlm: Callable[..., Result], corpus_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("memlm.cli.folders.read_manifest", stopped)
    found = memlm("info", corpus_folder)
    assert found.code == 130
    assert "the same command goes on where this one was" in found.err


def test_an_interrupt_before_a_command_begins_is_one_line(
    memlm: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(**given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("memlm.cli.app", stopped)
    found = memlm("info", "c/")
    assert (found.code, found.out) == (130, "")
    assert found.err == "\nmemlm: stopped; the same command goes on where this one was\n"


@pytest.mark.parametrize("command", ["generate", "explain"])
def test_what_keeps_nothing_goes_on_nowhere(
    command: str, memlm: Callable[..., Result], model_folder: str, memory_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("memlm.mix.mixed_lm.MixedLM.on_default_device", stopped)
    found = memlm(command, "hello", "--base", model_folder, "--memory", memory_folder)
    assert (found.code, found.err.strip()) == (130, "memlm: stopped")


def test_json_numbers_are_those_of_the_arrays_in_the_cache(memlm: Callable[..., Result], world: World) -> None:
    report = ok(memlm(*world.evaluate("--json", "--mix-weight", 0, "--dtype", "float32")))
    folders = (world.tmp / "home" / "scores").iterdir()
    found = [np.load(f / "label.npy") for f in folders if read_manifest(f).config["split"] == "test"]
    assert len(found) == 2
    perplexities = sorted(float(np.exp(-values.astype(np.float64).mean())) for values in found)
    ours = sorted([report["base"]["perplexity"], report["memory"]["perplexity"]])
    assert ours == pytest.approx(perplexities, abs=1e-4)  # the report rounds to four digits
    assert report["mixture"]["perplexity"] == report["base"]["perplexity"]


def test_targets_of_a_corpus_tell_what_the_teacher_foresees(
    memlm: Callable[..., Result], corpus_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    made = memlm("targets", corpus_folder, "--teacher", model_folder, "--out", tmp_path / "t")
    assert made.code == 0
    assert re.search(r"the teacher gives this text perplexity [\d.]+, and validation [\d.]+\n", made.out)
    nobody = memlm("targets", corpus_folder, "--out", tmp_path / "t2")
    assert nobody.code == 2
    assert "has no neighbours, so its targets are what a model says: give --teacher" in nobody.err


def test_a_teacher_writes_more_documents(
    memlm: Callable[..., Result], corpus_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    how = ["--times", 1, "--document-tokens", 20, "--teacher", model_folder]
    made = memlm("write", corpus_folder, *how, "--out", tmp_path / "c")
    assert made.code == 0
    assert re.search(r"[\d,]+ documents of [\d,]+ tokens were written; the training split has", made.out)
    nobody = memlm("write", corpus_folder, "--out", tmp_path / "c2")
    assert nobody.code == 2
    assert "who is to write? give --teacher, or a --fold-teacher for each fold" in nobody.err
