"""Benchmarks: what they measure is proven first, both sides are timed in turns, and all of them run on tiny models."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

from benchmarks import __main__ as command
from benchmarks import (
    accelerator,
    distillation_loss,
    help_time,
    knn_decoding,
    machine,
    mixture,
    mlp_decoding,
    mlp_quality,
    mlp_scoring,
    training_step,
    votes_to_targets,
)
from benchmarks.decoding import decoder, prove_mixture
from benchmarks.models import (
    bytes_per_step,
    llama_config,
    parameter_count,
    random_model,
    random_tokens,
    untrained_mlp,
)
from benchmarks.report import WrongAnswerError, bar_line
from benchmarks.synthetic_store import write_store
from benchmarks.timing import Timing, interleave
from memlm.datastore.config import DatastoreConfig
from memlm.datastore.store import Datastore
from memlm.errors import ConfigError
from memlm.memory.decoder import MemoryDecoder
from memlm.memory.protocol import Memory
from memlm.memory.retrieval import RetrievalMemory
from memlm.mix import components
from memlm.mix.mixed_lm import MixedLM
from memlm.targets.config import RetrievalConfig

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def config(layers: int = 2) -> LlamaConfig:
    return llama_config(32, layers, 4, kv_heads=2, vocab_size=96)


@pytest.fixture
def base() -> PreTrainedModel:
    return random_model(config(), dtype=torch.float32, device=CPU)


# --- the command ------------------------------------------------------------------------------------------------------


def test_help_lists_every_benchmark_with_its_claim_and_loads_no_torch() -> None:
    code = """
import sys
from benchmarks.__main__ import main
try:
    main(["--help"])
finally:
    assert "torch" not in sys.modules
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    for name in command.NAMES:
        assert f"{name} " in found.stdout
        assert command.describe(name) in found.stdout
        assert command.describe(name).endswith(".")


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["knn_decodin"])
    assert stop.value.code == 2
    assert "knn_decoding" in capsys.readouterr().err


@pytest.mark.slow
def test_a_quick_run_of_all_proves_answers_judges_nothing_and_leaves_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    assert command.main(["--quick", "--out", str(out)]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["name"].split("/")[0] for line in printed} == set(command.NAMES)
    assert all({"name", "ratio", "bar", "ok"} <= line.keys() and line["ok"] is None for line in printed)
    report = json.loads(out.read_text())
    assert report["lines"] == printed
    assert all(len(line["load_average"][when]) == 3 for line in printed for when in ("before", "after"))
    assert report["command"] == "python -m benchmarks --quick"
    assert report["hardware"]["cores"] >= 1
    assert "torch" in report["versions"]


def test_a_wrong_answer_fails_the_run_and_not_the_other_benchmarks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(quick: bool) -> Any:
        raise WrongAnswerError("off by 1")
        yield

    monkeypatch.setattr(mlp_decoding, "run", run)
    assert command.main(["mlp_decoding", "mlp_quality", "--quick"]) == 1
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first["ok"], first["error"]) == (False, "off by 1")
    assert second["name"] == "mlp_quality"


@pytest.mark.parametrize(
    ("ratio", "bars", "ok"),
    [
        (1.04, {"at_most": 1.05}, True),
        (1.06, {"at_most": 1.05}, False),
        (1.31, {"at_least": 1.3}, True),
        (1.29, {"at_least": 1.3}, False),
        (9.0, {}, None),
        (None, {"at_least": 1.3}, None),
        (9.0, {"at_most": 1.05, "judged": False}, None),
    ],
)
def test_a_line_says_whether_its_bar_is_reached(ratio: float | None, bars: dict[str, Any], ok: bool | None) -> None:
    assert bar_line("name", ratio, **bars)["ok"] is ok


# --- timing -----------------------------------------------------------------------------------------------------------


def test_sides_are_timed_in_turns() -> None:
    calls: list[str] = []
    sides: dict[str, Callable[[], None]] = {name: lambda name=name: calls.append(name) for name in "ab"}
    timing = interleave(sides, device=CPU, rounds=3, warmup=1)
    assert calls == list("abababab")
    assert {name: len(seconds) for name, seconds in timing.seconds.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_the_middle_one_of_the_rounds() -> None:
    timing = Timing({"a": [2.0, 9.0, 10.0], "b": [1.0, 3.0, 4.0]})
    assert timing.ratio("a", "b") == 2.5
    assert timing.spread("a", "b") == [2.0, 3.0]


# --- models -----------------------------------------------------------------------------------------------------------


def test_bytes_of_a_step_leave_out_embeddings_unless_they_are_the_head() -> None:
    tied = random_model(config(), dtype=torch.bfloat16, device=CPU)
    assert bytes_per_step(tied) == 2 * parameter_count(tied)
    settings = config()
    settings.tie_word_embeddings = False
    untied = random_model(settings, dtype=torch.float32, device=CPU)
    assert bytes_per_step(untied) == 4 * (parameter_count(untied) - 96 * 32)


def test_parameters_outside_embeddings(base: PreTrainedModel) -> None:
    memory = untrained_mlp(base, 3)
    assert parameter_count(base) - parameter_count(base, embeddings=False) == 96 * 32
    assert parameter_count(memory) - parameter_count(memory, embeddings=False) == 96 * 32


def test_decoding_with_a_cache_gives_the_logits_of_one_pass_each_time(base: PreTrainedModel) -> None:
    tokens = random_tokens(2, 9, 96, CPU)
    with torch.no_grad():
        whole = base(tokens).logits[:, 6:]
    decode = decoder(base, tokens[:, :6], tokens[:, 6:])
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(torch.stack(decode(), 1), whole, rtol=0, atol=1e-5)  # float32 logits below 1


def memories(base: PreTrainedModel, folder: Path) -> dict[str, Memory]:
    store = write_store(folder / "store", base, entries=300, config=DatastoreConfig(recall_k=8), centres=16)
    small = MemoryDecoder(random_model(config(1), dtype=torch.float32, device=CPU, seed=3))
    return {"mlp": untrained_mlp(base, 2), "decoder": small, "knn": RetrievalMemory(store, RetrievalConfig(k=8))}


def test_the_proof_accepts_the_library_and_refuses_a_wrong_memory(
    base: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = random_tokens(2, 9, 96, CPU)
    for memory in memories(base, tmp_path).values():
        prove_mixture(MixedLM(base, memory, 0.3), tokens[:, :6], tokens[:, 6:])
    mixed = MixedLM(base, untrained_mlp(base, 2), 0.3)
    right = components.mix_log_probs
    monkeypatch.setattr(
        components, "mix_log_probs", lambda base, votes, weights, normaliser: right(base, votes, [0.31], normaliser)
    )
    with pytest.raises(WrongAnswerError, match="nothing was timed"):
        prove_mixture(mixed, tokens[:, :6], tokens[:, 6:])


# --- the benchmarks ---------------------------------------------------------------------------------------------------


def test_decoding_is_compared_with_bytes(base: PreTrainedModel) -> None:
    found = mlp_decoding.measure(base, untrained_mlp(base, 2), batch=2, context=5, steps=2, rounds=1)
    assert found["expected_slowdown"] == round(1 + found["memory_bytes"] / found["base_bytes"], 4)
    assert found["slowdown"] > 0
    assert (found["batch"], found["dtype"]) == (2, "float32")


def test_a_third_of_qwens_blocks_is_eleven() -> None:
    with torch.device("meta"):
        base = random_model(mlp_decoding.qwen_config(), dtype=torch.bfloat16, device=torch.device("meta"))
    assert parameter_count(base, embeddings=False) == 1_310_340_608
    assert mlp_decoding.third_of(base) == 11  # 11 * 3 * 1536 * 8960 = 454M


@pytest.mark.slow
@pytest.mark.parametrize("name", mlp_scoring.SHAPES)
def test_the_decoders_beside_a_pair_have_as_many_parameters(name: str) -> None:
    shape, meta = mlp_scoring.SHAPES[name], torch.device("meta")
    with meta:
        base = random_model(shape.config(), dtype=torch.float32, device=meta)
        ffn, head = 3 * shape.width * base.config.intermediate_size, shape.width * shape.vocab_size
        memory = mlp_scoring.memory_blocks(base) * ffn + head
        twins = mlp_scoring.twin_configs(shape, base, memory)
        sizes = {name: parameter_count(random_model(c, dtype=torch.float32, device=meta)) for name, c in twins.items()}
    pair = parameter_count(base) + memory
    assert all(abs(size / pair - 1) < 0.03 for size in sizes.values()), (sizes, pair)
    assert twins["deep"].hidden_size == shape.width < twins["wide"].hidden_size
    assert abs(twins["wide"].num_hidden_layers - shape.layers) <= 3 < twins["deep"].num_hidden_layers - shape.layers


def test_scores_that_are_timed_are_checked(base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, tokens = untrained_mlp(base, 2), random_tokens(1, 12, 96, CPU)
    mlp_scoring.prove_scores(base, memory, [base], tokens)
    right = mlp_scoring.score_pair
    monkeypatch.setattr(mlp_scoring, "score_pair", lambda *arguments: right(*arguments) + 0.01)
    with pytest.raises(WrongAnswerError, match="the pair"):
        mlp_scoring.prove_scores(base, memory, [base], tokens)


def test_a_synthetic_store_is_a_datastore_that_finds_its_clusters(base: PreTrainedModel, tmp_path: Path) -> None:
    settings = DatastoreConfig(index="ivf-flat", nlist=8, recall_k=8, recall_sample=32)
    folder = write_store(tmp_path / "store", base, entries=400, config=settings, centres=8)
    store = Datastore(folder)
    assert (store.n_entries, len(store.values), store.manifest.facts["key_width"]) == (400, 400, 32)
    assert store.manifest.facts["recall"]["value"] >= 0.95
    assert store.manifest.facts["index"]["nprobe"] < 8  # neighbours are in few lists, so keys are clustered
    assert write_store(tmp_path / "store", base, entries=400, config=settings, centres=8) == folder
    knn_decoding.prove_search(RetrievalMemory(folder, RetrievalConfig(k=8)))


def test_decoding_is_measured_beside_a_store(base: PreTrainedModel, tmp_path: Path) -> None:
    given = memories(base, tmp_path)
    del given["knn"]
    row = knn_decoding.measure(base, given, tmp_path / "store", k=8, context=4, steps=2, rounds=1)
    assert set(row["seconds_per_token"]) == {"base", "mlp", "decoder", "knn", "search"}
    assert (row["entries"], row["compared"]) == (300, 300)


def row(entries: int, search: float, **index: Any) -> dict[str, Any]:
    index = {"kind": "ivf-flat", "nlist": 100, "nprobe": 10, **index}
    seconds = {"base": 0.01, "mlp": 0.011, "decoder": 0.012, "knn": 0.01 + search, "search": search}
    return {
        "entries": entries,
        "index": index,
        "compared": knn_decoding.compared(entries, index),
        "seconds_per_token": seconds,
        "slowdown": {"mlp": 1.1, "decoder": 1.5},
    }


def test_growth_is_fitted_over_what_is_compared_and_projected() -> None:
    rows = [row(1000, 5.0, kind="exact"), row(1000, 2e-4), row(9000, 1e-3)]  # 200 and 1,000 compared
    line = knn_decoding.growth(rows)
    assert line["ratio"] == 5.0
    assert line["slope_seconds"] == pytest.approx(1e-6)
    assert line["intercept_seconds"] == pytest.approx(0, abs=1e-12)
    projected = knn_decoding.projection(rows, ["mlp", "decoder"])
    assert projected["memory"] == "mlp"
    paper = projected["projections"][1]
    searched = (4096 + 32 * 500e6 / 4096) * 1e-6
    assert paper["search_seconds_per_token"] == pytest.approx(searched)
    assert paper["ratio"] == pytest.approx((0.01 + searched) / 0.011, abs=1e-4)


def test_nothing_is_projected_from_a_search_that_did_not_grow() -> None:
    line = knn_decoding.projection([row(1000, 2e-3), row(9000, 1e-3)], ["mlp", "decoder"])
    assert line["ratio"] is None
    assert "did not grow" in line["note"]


def test_a_line_through_two_sizes_has_no_interval_and_one_through_three_has_that_of_their_pairs() -> None:
    rows = [row(1000, 2e-4), row(9000, 1e-3), row(19000, 3e-3)]  # 200, 1,000 and 2,000 compared
    assert knn_decoding.slopes(rows[:2]) is None
    assert knn_decoding.slopes(rows) == pytest.approx([1e-6, 2e-6])
    assert knn_decoding.with_lists([{**rows[0], "column": "released"}, *rows[1:]]) == rows[1:]


def test_the_slowdown_that_is_told_is_that_of_the_worst_memory() -> None:
    line = knn_decoding.parametric([row(1000, 1e-3), row(9000, 1e-3)], ["mlp", "decoder"])
    assert (line["ratio"], line["ok"]) == (1.5, None)


def test_sizes_of_stores_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMLM_BENCH_ENTRIES", "2000,1000")
    assert knn_decoding.sizes_wanted() == (1000, 2000)
    monkeypatch.setenv("MEMLM_BENCH_ENTRIES", "1M")
    with pytest.raises(ConfigError, match="MEMLM_BENCH_ENTRIES = '1M'"):
        knn_decoding.sizes_wanted()


def test_the_share_of_the_gap() -> None:
    def report(base: float, mixture: float) -> dict[str, Any]:
        parts = {"base": base, "memory": 30.0, "mixture": mixture}
        return {**{name: {"perplexity": value} for name, value in parts.items()}, "tokens": 100}

    reports = {"memory": report(20.0, 12.5), "retrieval": report(20.0, 10.0), "decoder": report(20.0, 8.0)}
    line = mlp_quality.compare(reports)
    assert (line["ratio"], line["ok"]) == (0.75, True)
    assert line["ratio_in_nats"] == round(0.6780719, 4)  # log2(1.6)
    assert {name: found["share_of_gap"] for name, found in line["rows"].items()} == {
        "mlp": 0.75,
        "retrieval": 1.0,
        "decoder": 1.2,
    }


def test_without_the_corpus_quality_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMLM_DATA", str(tmp_path))
    (line,) = mlp_quality.run(quick=False)
    assert line["ok"] is None
    assert "MEMLM_DATA" in line["note"]


@pytest.mark.slow
def test_both_recipes_of_quality_run_and_share_what_is_the_same(
    documents: str, model_folder: str, tmp_path: Path
) -> None:
    quick = {"dtype": "float32", "max_steps": 2, "batch_size": 4}
    shared = {
        "corpus": {"documents": documents, "tokenizer": model_folder, "document_separator": "\n\n", "block_size": 32},
        "datastore": {"teacher": model_folder, "dtype": "float32"},
        "targets": {"k": 8, "target_temperature": 4.0},
        "evaluate": {"dtype": "float32", "bootstrap": 10},
        "twin": {},
    }
    mlp = {"kind": "mlp", "base": model_folder, "activations": "datastore", "layers": 1, **quick}
    decoder = {"init": model_folder, "layers": 1, **quick}
    first = {**shared, "train": mlp, "retrieval": {"k": 8, "target_temperature": 4.0}}
    line = mlp_quality.measure(first, {**shared, "train": decoder}, tmp_path)
    assert set(line["rows"]) == {"mlp", "twin", "retrieval", "decoder"}
    assert set(line["parameters"]) == {"mlp", "decoder"}
    assert not (tmp_path / "medquad" / "twin").exists()
    payload = [(tmp_path / name / "datastore" / "run.json").read_text() for name in ("medquad-mlp", "medquad")]
    assert payload[0] == payload[1]  # times of one run: it was copied


def test_a_mixture_that_is_timed_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in mixture.KINDS:
        assert mixture.measure(kind, 2, 200, rounds=1)["ratio"] > 0
    right = mixture.mix_log_probs
    monkeypatch.setattr(mixture, "mix_log_probs", lambda *arguments: right(*arguments) + 1e-4)
    for kind in mixture.KINDS:
        with pytest.raises(WrongAnswerError, match="nothing was timed"):
            mixture.measure(kind, 2, 200, rounds=1)


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_loss_that_is_timed_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = distillation_loss.Shape(8, 16, 300, 4, torch.float32)
    proven = distillation_loss.prove_loss(shape, CPU)
    assert 0 < proven["fused_head_gradient_error"] < 1e-5
    right = distillation_loss.Inputs.fused
    monkeypatch.setattr(distillation_loss.Inputs, "fused", lambda self, tile: 1.001 * right(self, tile))
    with pytest.raises(WrongAnswerError, match=r"loss of float32/16x300, fused"):
        distillation_loss.prove_loss(shape, CPU)
    monkeypatch.undo()
    chunked = distillation_loss.Inputs.chunked
    monkeypatch.setattr(distillation_loss.Inputs, "chunked", lambda self: 1.001 * chunked(self))
    with pytest.raises(WrongAnswerError, match=r"loss of float32/16x300, chunked"):
        distillation_loss.prove_loss(shape, CPU)


def test_a_rival_of_votes_that_gives_others_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(votes_to_targets.measure(300, positions=8, k=16, rounds=1)["ratios"]) == {"numpy", "torch", "dense"}
    right = votes_to_targets.through_sort
    monkeypatch.setattr(votes_to_targets, "through_sort", lambda *given: [(i, 1.01 * p) for i, p in right(*given)])
    with pytest.raises(WrongAnswerError, match="our votes against those of torch"):
        votes_to_targets.measure(300, positions=8, k=16, rounds=1)


@pytest.mark.slow
def test_the_peak_of_a_dense_loss_holds_its_logits() -> None:
    shape = distillation_loss.Shape(2000, 4, 5000, 4, torch.float32)
    # in processes of their own: memory that other tests have freed would be used again unseen
    peaks = {side: distillation_loss.peak_in_new_process(side, shape, CPU) for side in ("fused", "dense")}
    assert peaks["dense"] > 2 * 4 * 2000 * 5000  # logits and their gradient
    assert peaks["fused"] < peaks["dense"] / 2


def test_trainers_that_train_differently_are_told_apart() -> None:
    losses = {"fine_tuning": [2.0, 1.5], "transformers": [2.0, 1.5], "distillation": [2.0, 1.9]}
    training_step._prove_losses(losses)
    with pytest.raises(WrongAnswerError, match="loss of fine-tuning"):
        training_step._prove_losses(losses | {"transformers": [2.0, 1.51]})
    with pytest.raises(WrongAnswerError, match="number of steps"):
        training_step._prove_losses(losses | {"transformers": [2.0]})
    with pytest.raises(WrongAnswerError, match="cross-entropy of distillation"):
        training_step._prove_losses(losses | {"distillation": [2.1, 1.5]})


@pytest.mark.slow
def test_help_that_loads_something_heavy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(help_time, "HEAVY", ("torch", "pydantic"))
    with pytest.raises(WrongAnswerError, match="pydantic"):
        next(help_time.run(quick=True))


# --- the accelerator's report -----------------------------------------------------------------------------------------


def report_of(piece: str, folder: Path) -> dict[str, Any]:
    return json.loads((folder / f"accelerator-{piece}.json").read_text())


def test_each_piece_leaves_its_report_however_it_ends_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = {
        "failed": ("-c", "raise SystemExit(3)"),
        "timed out": ("-c", "import time; print('begun', flush=True); time.sleep(60)"),
        "skipped": ("-c", ""),
        "ok": ("-c", "print('{\"ratio\": 1}')"),
    }
    pieces = [
        accelerator.Piece(status, 2, command, command, needs=("no_such_package",) if status == "skipped" else ())
        for status, command in commands.items()
    ]
    monkeypatch.setattr(accelerator, "PIECES", pieces)
    assert accelerator.main(["--out", str(tmp_path), "--work", str(tmp_path / "work")]) == 1
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["status"] for line in told] == [line["name"] for line in told] == list(commands)
    reports = {status: report_of(status, tmp_path) for status in commands}
    assert {status: report["status"] for status, report in reports.items()} == {status: status for status in commands}
    assert reports["failed"]["exit"] == 3
    assert reports["timed out"]["output"] == "begun\n"
    assert reports["skipped"]["note"] == "needs no_such_package"
    assert reports["ok"]["lines"] == [{"ratio": 1}]
    assert accelerator.main(["--only", "ok", "--out", str(tmp_path), "--work", str(tmp_path / "work")]) == 0


def test_a_piece_that_is_cut_off_with_its_report_has_left_that_it_ran(tmp_path: Path) -> None:
    found = tmp_path / "accelerator-reads.json"
    reads = ("-c", f"print(open({str(found)!r}).read().replace(chr(10), ''))")
    (line,) = accelerator.run_piece(accelerator.Piece("reads", 20, reads, reads), tmp_path, tmp_path, quick=True)[
        "lines"
    ]
    assert (line["name"], line["status"]) == ("reads", "running")


def test_no_piece_takes_eight_minutes() -> None:
    assert all(piece.seconds < 480 for piece in accelerator.PIECES)


def test_every_benchmark_is_in_a_piece() -> None:
    assert {part for piece in accelerator.PIECES for part in piece.command} >= set(command.NAMES)


@pytest.mark.slow
def test_the_whole_report_at_toy_size(
    tmp_path: Path, python: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the pieces that run benchmarks one; the toy run of all of them is another test."""
    of_benchmarks = [piece for piece in accelerator.PIECES if piece.command[:2] == ("-m", "benchmarks")]
    assert {name for piece in of_benchmarks for name in piece.command[2:]} <= set(command.NAMES)
    assert all(piece.quick in (None, (*piece.command, "--quick")) for piece in of_benchmarks)
    run = [piece for piece in accelerator.PIECES if piece not in of_benchmarks or piece.name in ("quality", "teacher")]
    only = [argument for piece in run for argument in ("--only", piece.name)]
    monkeypatch.setattr(sys, "executable", python)
    assert accelerator.main(["--quick", "--out", str(tmp_path), "--work", str(tmp_path / "work"), *only]) == 0
    for piece in run:
        report = report_of(piece.name, tmp_path)
        if piece.quick is None:
            assert report["note"] == "no toy size"
        else:
            assert report["status"] == "ok", report
            assert report["lines"] or piece.name == "tests"
    assert " passed" in report_of("tests", tmp_path)["output"]
    decoder, mlp = (report_of(name, tmp_path)["lines"][0] for name in ("medquad", "medquad-mlp"))
    assert (decoder.keys(), mlp.keys()) == ({"memory", "twin"}, {"memory", "retrieval"})
    assert capsys.readouterr().out.count("\n") == len(run)


def test_a_machine_that_lacks_a_package_is_told_which(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "REQUIRED", ("torch", "no_such_package"))
    assert machine.main(quick=True) == 1
    assert json.loads(capsys.readouterr().out)["missing"] == ["no_such_package"]
