"""Test passages where the memories helped most, typically and least, with the tokens that they lifted and sank."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from memlm.corpus.blocks import Corpus
from memlm.evaluate.config import EvaluateConfig
from memlm.evaluate.perplexity import evaluated_log_probs
from memlm.memory.config import named
from memlm.scores.table import BASE, score_corpus
from memlm.targets.config import RetrievalConfig

_LIFTED, _SANK = 4, 3


def passages(
    corpus: str | Path,
    report: Mapping[str, Any],
    *,
    base: str,
    memory: str | Mapping[str, str],
    config: EvaluateConfig | None = None,
    retrieval: RetrievalConfig | None = None,
    passage_tokens: int = 48,
) -> str:
    """Three passages of test documents as lines of text, from scores that the evaluation left in the cache.

    Args:
        corpus, base, memory, config, retrieval: As `evaluate_perplexity` was given them.
        report: What it found.
        passage_tokens: Of a passage; shorter documents are left out.

    Returns:
        Nothing where every document is shorter.
    """
    source, config = Corpus(corpus), config or EvaluateConfig()
    memories = named(memory)
    tables = score_corpus(
        source, base, memories, dtype=config.dtype, batch_tokens=config.batch_tokens, retrieval=retrieval
    )
    table, mixed = tables["test"], evaluated_log_probs(report, tables, memories)
    alone = table.voters[BASE].label
    gain = mixed - alone
    counts = np.bincount(table.document)
    means = np.bincount(table.document, weights=gain) / np.maximum(counts, 1)
    long_enough = np.flatnonzero(counts >= passage_tokens)
    ranked = long_enough[np.argsort(-means[long_enough])]
    if not len(ranked):
        return ""
    lines, labels, tokenizer = [], source.split("test").labels(), source.tokenizer
    for title, document, start_of in (
        ("helped most", ranked[0], np.argmax),
        ("typical", ranked[len(ranked) // 2], lambda sums: len(sums) // 2),
        ("helped least", ranked[-1], np.argmin),
    ):
        places = np.flatnonzero(table.document == document)
        start = start_of(np.convolve(gain[places], np.ones(passage_tokens), "valid"))
        window = places[start : start + passage_tokens]
        lines.append(f"[{title}] {means[document]:+.2f} nats a token in this document")
        lines += [f"    | {line}" for line in str(tokenizer.decode(labels[window])).splitlines() if line.strip()]
        change = np.exp(mixed[window]) - np.exp(alone[window])  # of the probability of the token that came
        order = np.argsort(-change)
        rose, fell = order[change[order] > 0][:_LIFTED], order[change[order] < 0][::-1][:_SANK]
        for word, chosen in (("lifted", window[rose]), ("sank", window[fell])):
            moved = [
                f"{tokenizer.decode(labels[p])!r} {np.exp(alone[p]):.1%} -> {np.exp(mixed[p]):.1%}" for p in chosen
            ]
            lines.append(f"    {word}: {', '.join(moved) or 'nowhere'}")
        lines.append("")
    return "\n".join(lines[:-1])
