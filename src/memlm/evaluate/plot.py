"""The plot of an evaluation."""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from memlm.memory.config import named

_BASE, _MIXTURE, _OTHER = "#555555", "#b0413e", "#1f5fa8"


def plot_report(report: dict[str, Any], path: Path) -> None:
    """Write `report_figure` as a PNG."""
    deterministic_figure(lambda: report_figure(report), path)


def deterministic_figure(draw: Callable[[], Any], path: Path) -> None:
    """Write a figure as a PNG; what is drawn alike gives equal bytes, whatever the user's style.

    Raises:
        ImportError: matplotlib is not installed.
    """
    matplotlib = _matplotlib()
    look = {
        k: v for k, v in matplotlib.rcParamsDefault.items() if k.partition(".")[0] not in ("backend", "interactive")
    }
    with matplotlib.rc_context(look):
        draw().savefig(path, format="png", dpi=150, metadata={"Software": None})


def report_figure(report: dict[str, Any]) -> Any:
    """A figure of two parts: how the weight was chosen on validation text, and what came out on test text.

    Both are drawn as large as the difference between base and mixture allows; what lies further off is written at the
    edge. Nothing is drawn through pyplot, whose figures and backend are the caller's.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    choice, result = figure.subplots(1, 2)
    _draw_choice(choice, report)
    _draw_result(result, report)
    return figure


def bench_figure(report: dict[str, Any]) -> Any:
    """A figure of what `memlm bench` found: time per decoded and per scored token over the base's."""
    from matplotlib.figure import Figure

    rows = {name: row for name, row in report.items() if name != "machine"}
    figure = Figure(figsize=(7, 0.8 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for shift, key, title, color in ((-0.2, "ratio", "decoding", _MIXTURE), (0.2, "scoring_ratio", "scoring", _OTHER)):
        ratios = {place: row[key] for place, row in enumerate(rows.values()) if key in row}
        if not ratios:
            continue
        axes.barh([place + shift for place in ratios], list(ratios.values()), 0.36, color=color, label=title)
        for place, ratio in ratios.items():
            axes.annotate(f"{ratio:.2f}", (ratio, place + shift), (3, 0), textcoords="offset points", va="center")
    axes.axvline(1, color=_BASE, linewidth=1)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.margins(x=0.12)
    machine = report["machine"]
    axes.set_xlabel("time per token over the base's")
    axes.set_title(f"{machine['device']}, {machine['threads']} threads", fontsize=9)
    axes.legend(fontsize=8)
    return figure


def _matplotlib() -> Any:
    """The module; what it keeps for itself goes to a temporary folder, unless its user has imported or placed it."""
    if "matplotlib" in sys.modules or "MPLCONFIGDIR" in os.environ:
        import matplotlib

        return matplotlib
    folder = os.environ["MPLCONFIGDIR"] = tempfile.mkdtemp(prefix="memlm-matplotlib-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # it may look there as long as it is loaded
    try:
        import matplotlib
        import matplotlib.font_manager  # writes its list of fonts

        return matplotlib
    finally:
        del os.environ["MPLCONFIGDIR"]


def _draw_choice(axes: Any, report: dict[str, Any]) -> None:
    """Validation perplexity against the memories' weight, and the base's as a line."""
    curve, fixed, weights = report["validation"], fixed_of(report), weights_of(report)
    total = sum(weights.values())
    points = [
        (w, value)
        for w, value in zip(curve["mix_weights"], curve["perplexities"] or [], strict=bool(curve["perplexities"]))
        if value is not None
    ]
    axes.set_title(f"validation, {curve['tokens']:,} tokens", fontsize=10)
    axes.set_xlabel(f"weight of {' + '.join(weights)}")
    axes.set_ylabel("perplexity of the mixture")
    axes.set_xlim(0, 1)
    if points:
        values = [value for _, value in points]
        axes.plot(*zip(*points, strict=True), color=_OTHER)
        axes.set_ylim(*_zoomed(min(values), values[0]))
        axes.axhline(values[0], color=_BASE, linewidth=1)
        axes.annotate(f"base {number(values[0])}", (0.99, values[0]), ha="right", va="bottom", color=_BASE)
    axes.axvline(total, color=_MIXTURE, linestyle="--", linewidth=1)
    chosen = "chosen" if fixed["mix_weight_from"] == "validation" else "given"
    axes.annotate(
        f"{chosen}: {total:g}",
        (total, 0.03),
        xycoords=("data", "axes fraction"),
        rotation=90,
        ha="right" if total > 0.1 else "left",
        color=_MIXTURE,
    )
    axes.grid(alpha=0.3)


def _draw_result(axes: Any, report: dict[str, Any]) -> None:
    """Test perplexities with their intervals, by name; the base's as a line and a band."""
    names = ["base", *weights_of(report), "mixture"]
    base, mixture = report["base"], report["mixture"]
    shown = [value for part in (base, mixture) for value in (part["perplexity"], *(part["interval"] or [])) if value]
    low, high = _zoomed(min(shown), max(shown)) if shown else (0.0, 1.0)
    axes.set_xlim(low, high)
    for place, name in enumerate(names):
        figure, interval = report[name]["perplexity"], report[name]["interval"]
        color = {"base": _BASE, "mixture": _MIXTURE}.get(name, _OTHER)
        if figure is None or not low <= figure <= high:
            told = f"{number(figure)}, off the scale"
            axes.annotate(told, (0.98, place), xycoords=("axes fraction", "data"), ha="right", va="center", color=color)
            continue
        if interval is not None:
            axes.plot(interval, [place, place], color=color, linewidth=2, alpha=0.5)
        axes.plot([figure], [place], "o", color=color)
        axes.annotate(number(figure), (figure, place), (0, 7), textcoords="offset points", ha="center", color=color)
    if base["perplexity"] is not None:
        axes.axvline(base["perplexity"], color=_BASE, linewidth=1)
    if base["interval"] is not None:
        axes.axvspan(*base["interval"], color=_BASE, alpha=0.12, linewidth=0)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.6)
    axes.set_xlabel("perplexity, 95% interval" if base["interval"] else "perplexity")
    axes.set_title(f"test, {report['tokens']:,} tokens: {ratio_line('mixture / base', report['ratio'])}", fontsize=9)
    axes.grid(alpha=0.3, axis="x")


def fixed_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of the mixture with fixed weights."""
    return report["mixture"].get("fixed", report["mixture"])


def weights_of(report: Mapping[str, Any]) -> dict[str, float]:
    """Those fixed weights by what the report calls its memories."""
    return named(fixed_of(report)["mix_weight"])


def _zoomed(low: float, high: float) -> tuple[float, float]:
    """Limits in which the way from `low` to `high`, or a hundredth where there is less, takes two thirds."""
    room = max(high - low, 0.01 * high) / 4
    return low - room, high + room


def number(perplexity: float | None, digits: int = 2) -> str:
    """A perplexity as tables show it."""
    return "infinite" if perplexity is None else f"{perplexity:.{digits}f}"


def ratio_line(what: str, ratio: dict[str, Any]) -> str:
    """One perplexity over another, which `what` names, with its interval where there is one."""
    interval = "" if ratio["interval"] is None else " ({:.4f} to {:.4f})".format(*ratio["interval"])
    return f"{what} {number(ratio['perplexity'], 4)}{interval}"
