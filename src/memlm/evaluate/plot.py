"""The plot of an evaluation."""

from pathlib import Path
from typing import Any


def plot_curve(report: dict[str, Any], path: Path) -> None:
    """A PNG of validation perplexity against mix_weight, with the chosen weight marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    curve = report["validation"]
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    values = [value for value in curve["perplexities"] or [] if value is not None]
    if values:
        there = [w for w, value in zip(curve["mix_weights"], curve["perplexities"], strict=True) if value is not None]
        axes.plot(there, values, color="#1f5fa8")
        if max(values) > 5 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
    weight = report["mixture"]["mix_weight"]
    named = isinstance(weight, dict)
    parts = ["base", *(weight if named else ["memory"]), "mixture"]
    weight = sum(weight.values()) if named else weight
    axes.axvline(weight, color="#b0413e", linestyle="--", linewidth=1)
    axes.annotate(
        f"chosen: {weight:g}", (weight, 0.97), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right"
    )
    axes.set_xlabel(f"mix_weight (0: base alone, 1: {'memories' if named else 'memory'} alone)")
    axes.set_ylabel("validation perplexity")
    axes.set_title("test: " + ", ".join(f"{part} {number(report[part]['perplexity'])}" for part in parts), fontsize=10)
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})
    plt.close(figure)


def number(perplexity: float | None) -> str:
    """A perplexity as tables show it."""
    return "infinite" if perplexity is None else f"{perplexity:.2f}"
