"""A page about finished folders: how training went, what targets and indexes are like, what evaluations found."""

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memlm.evaluate.page import heading, html_table, page, picture
from memlm.evaluate.plot import deterministic_figure, report_figure
from memlm.evaluate.report import Report
from memlm.files import read_json
from memlm.manifest import Manifest, read_manifest
from memlm.text import flat

_CURVES = {
    "loss": "loss",
    "kl_nats": "KL to the targets",
    "cross_entropy_nats": "LM loss",
    "mixture_nats": "mixture",
}
_LONGEST = 120


def folder_page(folders: Sequence[str | Path], title: str) -> str:
    """One page about the folders, in HTML; pictures where matplotlib is installed.

    Args:
        folders: Finished ones, of any stage.
        title: Of the page.

    Raises:
        ArtifactError: A folder is damaged or not finished.
    """
    body = []
    for folder in map(Path, folders):
        manifest = read_manifest(folder)
        body.append(heading(f"{manifest.kind}: {folder}"))
        drawn = {"memory": _memory, "evaluation": _evaluation}.get(manifest.kind)
        if drawn is not None:
            body += drawn(folder, manifest)
        facts = {name: fact for name, fact in manifest.facts.items() if name not in ("training", "validation")}
        for name, values in (("from", manifest.sources), ("facts", facts), ("settings", manifest.config)):
            if values:
                body.append(html_table([[name, ""], *([key, _told(value)] for key, value in flat(values))]))
    return page(title, body)


def training_figure(facts: Mapping[str, Any]) -> Any:
    """Training curves by step, and validation perplexities of memory and mixture with the weight that was best."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for key, label in _CURVES.items():
        points = [(entry["step"], entry[key]) for entry in facts.get("training", []) if entry.get(key) is not None]
        if any(value for _, value in points):  # plain fine-tuning has no KL
            left.plot(*zip(*points, strict=True), label=label)
    left.set_xlabel("step")
    left.set_ylabel("nats a position")
    left.set_title("training", fontsize=10)
    validation = facts.get("validation", {})
    history = validation.get("history", [])
    steps = [entry["step"] for entry in history]
    for key, label in (("memory_perplexity", "memory alone"), ("mixture_perplexity", "mixture")):
        right.plot(steps, [entry[key] for entry in history], "o-", label=label)
    if history and validation.get("base_perplexity") is not None:
        right.axhline(validation["base_perplexity"], color="#555555", linewidth=1, label="base")
    for entry in history:
        right.annotate(f"{entry['mix_weight']:g}", (entry["step"], entry["mixture_perplexity"]), fontsize=8)
    right.set_xlabel("step")
    right.set_ylabel("perplexity")
    right.set_title("validation; numbers are the best weight of the memory", fontsize=10)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    return figure


def _memory(folder: Path, manifest: Manifest) -> list[str]:
    parts = _drawn(lambda: training_figure(manifest.facts), "training and validation curves")
    history = manifest.facts.get("validation", {}).get("history", [])
    if history:
        rows = [[_told(entry[key]) for key in history[0]] for entry in history]
        parts.append(html_table([[key.replace("_", " ") for key in history[0]], *rows]))
    return parts


def _evaluation(folder: Path, manifest: Manifest) -> list[str]:
    report = Report(read_json(folder / "report.json"))
    drawn = _drawn(lambda: report_figure(report), "validation perplexity by weight, and test perplexities")
    return [report._repr_html_(), *drawn]


def _drawn(draw: Callable[[], Any], told: str) -> list[str]:
    """A figure as a picture; nothing where matplotlib is not installed."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(ImportError):
        place = Path(scratch) / "figure.png"
        deterministic_figure(draw, place)
        return [picture(place.read_bytes(), told)]
    return []


def _told(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
