"""An MLP Memory closes most of the gap between its base and the live kNN-LM that taught it."""

import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.report import bar_line
from memlm.config import read_recipe
from memlm.files import cache_dir
from memlm.manifest import read_manifest
from memlm.runs.plan import run_recipe
from memlm.runs.recipe import data_path

BAR = 0.6
_NAME = "mlp_quality"
_RECIPES = Path(__file__).parents[1] / "recipes" / "cpu"
_SHARED = ("corpus", "datastore", "targets")


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """One line: the share of the gap that the MLP Memory's mixture closes on the test split of the MedQuAD subset.

    Beside it stand the memory's twin, the kNN-LM over the datastore that its targets came from, and a Memory Decoder
    of as many parameters. Finished stages in `$MEMLM_BENCH` (default below memlm's cache) are used again. A quick run
    is no run: there is nothing to learn from a memory trained for a minute.
    """
    sections = {name: read_recipe(_RECIPES / f"{name}.yaml") for name in ("medquad-mlp", "medquad")}
    documents = sections["medquad"]["corpus"]["documents"]
    missing = [place for place in documents if not Path(data_path(place)).exists()]
    note = "skipped: quick" if quick else None
    if missing and note is None:
        note = f"skipped: {missing[0]} is not below $MEMLM_DATA; recipes/README.md says where it is found"
    if note is not None:
        yield bar_line(_NAME, None, at_least=BAR, note=note)
        return
    work = Path(os.environ.get("MEMLM_BENCH") or cache_dir() / "benchmarks" / "runs")
    yield measure(sections["medquad-mlp"], sections["medquad"], work)


def measure(mlp: dict[str, dict[str, Any]], decoder: dict[str, dict[str, Any]], work: Path) -> dict[str, Any]:
    """Run both recipes, the decoder's without its twin, and compare.

    Args:
        mlp: Recipe of the MLP Memory, with a twin and live retrieval.
        decoder: Recipe of the Memory Decoder.
        work: Folder for both runs.
    """
    reports = run_recipe(mlp, work / "medquad-mlp", say=_say)
    decoder = {name: section for name, section in decoder.items() if name != "twin"}
    for number, name in enumerate(_SHARED, 1):
        same = all(mlp.get(part) == decoder.get(part) for part in _SHARED[:number])
        here, there = work / "medquad-mlp" / name, work / "medquad" / name
        if same and not there.exists():  # the hours of a search need not be spent twice
            shutil.copytree(here, there.with_name(f".{name}.copying"), dirs_exist_ok=True)
            there.with_name(f".{name}.copying").rename(there)
    reports["decoder"] = run_recipe(decoder, work / "medquad", say=_say)["memory"]
    folders = {"mlp": work / "medquad-mlp" / "memory", "decoder": work / "medquad" / "memory"}
    parameters = {name: int(read_manifest(folder).facts["parameters"]) for name, folder in folders.items()}
    seeds = {name: recipe.get("train", {}).get("seed", 0) for name, recipe in (("mlp", mlp), ("decoder", decoder))}
    return compare(reports, parameters=parameters, seeds=seeds)


def compare(reports: Mapping[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    """The line.

    Args:
        reports: Of `evaluate_perplexity`: `memory`, `retrieval`, and others to stand beside them.
        more: What else helps.
    """
    base, best = (_perplexity(reports["retrieval"], part) for part in ("base", "mixture"))
    rows = {}
    for name, report in reports.items():
        mixture = _perplexity(report, "mixture")
        rows[name] = {
            "alone": report["memory"],
            "mixture": report["mixture"],
            "share_of_gap": round((base - mixture) / (base - best), 4),
            "share_of_gap_in_nats": round(math.log(base / mixture) / math.log(base / best), 4),
        }
    return bar_line(
        _NAME,
        (base - _perplexity(reports["memory"], "mixture")) / (base - best),
        at_least=BAR,
        ratio_in_nats=rows["memory"]["share_of_gap_in_nats"],
        base=reports["memory"]["base"],
        rows={"mlp" if name == "memory" else name: row for name, row in rows.items()},
        test_tokens=reports["memory"]["tokens"],
        **more,
    )


def _perplexity(report: Mapping[str, Any], part: str) -> float:
    return float(report[part]["perplexity"])


def _say(line: str) -> None:
    print(line, file=sys.stderr)
