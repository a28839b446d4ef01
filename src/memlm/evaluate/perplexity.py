"""Perplexity of base, memory and mixture, with the weight chosen on validation data."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memlm.artifacts import check_output, open_stage, stage_identity, write_json
from memlm.config import settings_from
from memlm.corpus.blocks import Corpus
from memlm.errors import ConfigError, InputError, TokenizerMismatchError
from memlm.evaluate.config import EvaluateConfig
from memlm.evaluate.scores import score_corpus
from memlm.memory.loading import read_settings
from memlm.mix.scoring import GRID, best_mix_weight, mixture_label_log_probs, perplexity_curve
from memlm.models.loading import model_identity
from memlm.models.tokenizers import ADVICE
from memlm.targets.config import RetrievalConfig

_FREQUENCY_EDGES = (0, 1, 10, 100, 1000)


def evaluate_perplexity(
    corpus: str | Path,
    *,
    base: str,
    memory: str,
    out: str | Path | None = None,
    config: EvaluateConfig | None = None,
    retrieval: RetrievalConfig | None = None,
    repair: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Test perplexity of base, memory alone and their mixture.

    Each model scores the text once; every mixture is computed from the scores. Base and memory both give their
    probability to the tokenizer's ids only, so padded output rows count for neither.

    Args:
        corpus: Folder of the corpus stage.
        base: Path, hub id or packaged name.
        memory: Folder or hub id of a memory, a datastore (live kNN-LM), or any causal LM of the same tokenizer.
        out: Folder for `report.json` and a plot; none is written if None.
        config: Default settings if None; or give them as keywords.
        retrieval: How a datastore is searched; the defaults if None.
        repair: Make damaged or missing files of finished scores, and of `out`, again.

    Returns:
        `base`, `memory` and `mixture`, each with `perplexity` and `interval` (95%, documents resampled); `mixture` has
        `mix_weight` too. Further `tokens`, `ratio` (mixture over base, paired), `validation` (the curve that the weight
        was chosen on), `by_label_frequency`, and what was run. An infinite perplexity, as a retriever
        has alone, is None.

    Raises:
        InputError: The corpus has no test tokens, or no validation tokens to choose the weight on.
        TokenizerMismatchError: Base or memory has another tokenizer than the corpus.
        OutputExistsError: `out` holds something else.
    """
    config = settings_from(EvaluateConfig, config, settings)
    source = Corpus(corpus)
    splits = source.manifest.facts["splits"]
    if not splits["test"]["positions"]:
        raise InputError(f"corpus {corpus} has no test tokens; build it with a larger --test-fraction")
    if config.mix_weight is None and not splits["validation"]["positions"]:
        raise InputError(f"corpus {corpus} has no validation tokens to choose mix_weight on; give --mix-weight")
    source.check_read_by(base)
    check_memory(source, memory)
    if out is not None:
        identity = stage_identity("evaluation", **_identity(source, base, memory, config, retrieval))
        check_output(out, identity, repair=repair)
    shared: dict[str, Any] = {"dtype": config.dtype, "batch_tokens": config.batch_tokens, "repair": repair}
    base_scores = score_corpus(source, base, beside=None, **shared)
    memory_scores = score_corpus(source, memory, beside=base, retrieval=retrieval, **shared)

    weight, curve = config.mix_weight, None
    if "validation" in base_scores:
        held_out = base_scores["validation"].label, memory_scores["validation"].label
        curve = perplexity_curve(*held_out)
        weight = best_mix_weight(*held_out)[0] if weight is None else weight
    assert weight is not None
    test, ours = base_scores["test"], memory_scores["test"]
    parts = {
        "base": test.label.astype(np.float64),
        "memory": ours.label.astype(np.float64),
        "mixture": mixture_label_log_probs(test.label, ours.label, weight),
    }
    sums = DocumentSums(test.document, config)
    report: dict[str, Any] = {name: sums.perplexity(values) for name, values in parts.items()}
    report["mixture"]["mix_weight"] = weight
    report["mixture"]["mix_weight_from"] = "validation" if config.mix_weight is None else "given"
    report["tokens"] = len(test.label)
    report["documents"] = int(test.document.max()) + 1
    report["ratio"] = sums.ratio(parts["mixture"], parts["base"])
    report["by_label_frequency"] = by_label_frequency(test.label_count, parts)
    report["validation"] = {
        "tokens": splits["validation"]["positions"],
        "mix_weights": GRID.round(4).tolist(),
        "perplexities": None if curve is None else [_finite(value) for value in curve],
    }
    report["run"] = {"corpus": str(corpus), "base": base, "memory": memory, "config": config.model_dump()}
    if retrieval is not None:
        report["run"]["retrieval"] = retrieval.model_dump()
    if out is not None:
        _write(out, report, source, base, memory, config, retrieval, repair)
    return report


def check_memory(corpus: Corpus, memory: str) -> None:
    """Nothing, where the memory votes on the corpus's token ids; reads no weights.

    Raises:
        TokenizerMismatchError: It has another tokenizer.
        ArtifactError: The folder is no memory, or damaged.
        ModelError: It cannot be reached.
    """
    settings = read_settings(memory)
    if settings is None or (settings.tokenizer != corpus.manifest.tokenizer and settings.kind == "decoder"):
        corpus.check_read_by(memory)
    elif settings.tokenizer != corpus.manifest.tokenizer:
        raise TokenizerMismatchError(f"corpus {corpus.folder} and memory {memory} have different tokenizers; {ADVICE}")
    elif settings.vocab_size < corpus.vocab_size:
        raise ConfigError(
            f"memory {memory} has fewer output rows than the {corpus.vocab_size} token ids of {corpus.folder}"
        )


class DocumentSums:
    """Perplexities with intervals from resampled documents; all share the same draws, so ratios are paired."""

    def __init__(self, document: NDArray[np.int64], config: EvaluateConfig) -> None:
        self._document = document
        self._counts = np.bincount(document).astype(np.float64)
        rng = np.random.default_rng(config.seed)
        n = len(self._counts)
        self._draws = rng.multinomial(n, np.full(n, 1 / n), size=config.bootstrap).astype(np.float64)  # (R, documents)

    def _means(self, log_probs: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        sums = np.bincount(self._document, weights=-log_probs)
        if not np.isfinite(sums).all():
            return np.inf, np.full(len(self._draws), np.inf)
        drawn = self._draws @ self._counts
        return float(sums.sum() / self._counts.sum()), (self._draws @ sums) / np.maximum(drawn, 1)

    @staticmethod
    def _interval(values: NDArray[np.float64]) -> list[float] | None:
        there = len(values) and np.isfinite(values).all()
        return np.quantile(values, [0.025, 0.975]).round(4).tolist() if there else None

    def perplexity(self, log_probs: NDArray[np.float64]) -> dict[str, Any]:
        """Perplexity and its 95% interval."""
        mean, drawn = self._means(log_probs)
        return {"perplexity": _finite(np.exp(mean)), "interval": self._interval(np.exp(drawn))}

    def ratio(self, above: NDArray[np.float64], below: NDArray[np.float64]) -> dict[str, Any]:
        """Perplexity of `above` over that of `below`, and its 95% interval."""
        (mean_a, drawn_a), (mean_b, drawn_b) = self._means(above), self._means(below)
        return {
            "perplexity": _finite(np.exp(mean_a - mean_b)),
            "interval": self._interval(np.exp(drawn_a - drawn_b)),
        }


def by_label_frequency(label_count: NDArray[np.int64], parts: dict[str, NDArray[np.float64]]) -> list[dict[str, Any]]:
    """Perplexities over test tokens, split by how often the label occurs in training."""
    rows = []
    for low, high in zip(_FREQUENCY_EDGES, (*_FREQUENCY_EDGES[1:], None), strict=True):
        here = (label_count >= low) & (label_count < (high if high is not None else np.inf))
        if here.any():
            row: dict[str, Any] = {"from": low, "below": high, "tokens": int(here.sum())}
            rows.append(row | {name: _finite(np.exp(-values[here].mean())) for name, values in parts.items()})
    return rows


def _finite(perplexity: float) -> float | None:
    """Rounded for a report; None for infinity, which JSON has not."""
    return round(float(perplexity), 4) if np.isfinite(perplexity) else None


def _identity(
    corpus: Corpus, base: str, memory: str, config: EvaluateConfig, retrieval: RetrievalConfig | None
) -> dict[str, Any]:
    return {
        "config": config.model_dump() | ({"retrieval": retrieval.model_dump()} if retrieval is not None else {}),
        "inputs": {"corpus": corpus.manifest.hash, "base": model_identity(base), "memory": model_identity(memory)},
        "tokenizer": corpus.manifest.tokenizer,
    }


def _write(
    out: str | Path,
    report: dict[str, Any],
    corpus: Corpus,
    base: str,
    memory: str,
    config: EvaluateConfig,
    retrieval: RetrievalConfig | None,
    repair: bool,
) -> None:
    sources = {"corpus": str(corpus.folder), "base": base, "memory": memory}
    identity = _identity(corpus, base, memory, config, retrieval)
    with open_stage(out, "evaluation", **identity, sources=sources, repair=repair) as stage:
        if stage.finished:
            return
        write_json(stage.path / "report.json", report)
        with stage.writing("perplexity.png") as temporary:
            plot_curve(report, temporary)
        stage.finish({name: report[name] for name in ("base", "memory", "mixture", "tokens")})


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
    axes.axvline(weight, color="#b0413e", linestyle="--", linewidth=1)
    axes.annotate(
        f"chosen: {weight:g}", (weight, 0.97), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right"
    )
    axes.set_xlabel("mix_weight (0: base alone, 1: memory alone)")
    axes.set_ylabel("validation perplexity")
    axes.set_title(
        f"test: base {_number(report['base']['perplexity'])}, memory {_number(report['memory']['perplexity'])},"
        f" mixture {_number(report['mixture']['perplexity'])}",
        fontsize=10,
    )
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})
    plt.close(figure)


def _number(perplexity: float | None) -> str:
    return "infinite" if perplexity is None else f"{perplexity:.2f}"


def report_table(report: dict[str, Any]) -> str:
    """The report as lines of text: perplexities with intervals, then the split by label frequency."""
    lines = [f"{'':<24}{'perplexity':>12}   95% interval"]
    for name in ("base", "memory", "mixture"):
        row = report[name]
        label = {"base": "base alone", "memory": "memory alone"}.get(
            name, f"mixture, weight {report['mixture']['mix_weight']:g}"
        )
        interval = "" if row["interval"] is None else "   {:.2f} to {:.2f}".format(*row["interval"])
        lines.append(f"{label:<24}{_number(row['perplexity']):>12}{interval}")
    chosen = "chosen on validation" if report["mixture"]["mix_weight_from"] == "validation" else "given"
    lines.append(f"{report['tokens']:,} test tokens of {report['documents']:,} documents; mix_weight {chosen}")
    lines.append("")
    lines.append(f"{'label seen in training':<24}{'tokens':>9}{'base':>10}{'memory':>10}{'mixture':>10}")
    for row in report["by_label_frequency"]:
        span = (
            f"{row['from']:,} times or more"
            if row["below"] is None
            else ("never" if row["from"] == 0 else f"{row['from']:,} to {row['below'] - 1:,} times")
        )
        numbers = "".join(f"{_number(row[name]):>10}" for name in ("base", "memory", "mixture"))
        lines.append(f"{span:<24}{row['tokens']:>9,}{numbers}")
    return "\n".join(lines)


__all__ = ["evaluate_perplexity", "plot_curve", "report_table"]
