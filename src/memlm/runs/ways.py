"""The rows of a comparison: which model, with which memories beside it, and how they are weighed."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memlm.evaluate.config import IN_CONTEXT
from memlm.memory.confidence import ConfidenceHead
from memlm.mix.gate import Gate, GatedMemory, gate_config, weight_rule
from memlm.scores.gated import gated_label_log_probs
from memlm.scores.mixtures import best_mix_weight, best_mix_weights, mixture_label_log_probs
from memlm.scores.table import BASE, ScoreTable

TITLES = {
    "base": "base alone",
    "in-context": "in-context retrieval (BM25)",
    "in-context-dense": "in-context retrieval (dense)",
    "knn": "live kNN-LM",
    "dapt": "base fine-tuned (DAPT)",
    "dapt+knn": "DAPT base + live kNN-LM",
    "lora": "base fine-tuned by LoRA",
    "twin": "base + twin",
    "memory": "base + Memory Decoder",
    "mlp": "base + MLP Memory",
    "memory+mlp": "base + both memories",
    "dapt+memory": "DAPT base + Memory Decoder",
    "lora+memory": "LoRA base + Memory Decoder",
}


@dataclass(frozen=True)
class Way:
    """One row of the table: a model, memories beside it, and how they are weighed."""

    row: str
    base: str
    """Whose label log-probs stand for the base's: the base itself, or one that was fine-tuned."""
    memories: tuple[str, ...]
    weights: list[float] | None
    """Fixed ones, chosen on validation text; None where there is no memory."""
    rule: Gate | None = None

    @property
    def told(self) -> dict[str, Any]:
        """What the report says of it."""
        if self.weights is None:
            tuned = {"base": "nothing", "dapt": "settings, checkpoint", "lora": "settings, checkpoint"}[self.row]
            return {"row": self.row, "title": TITLES[self.row], "way": "alone", "tuned": tuned}
        if self.rule is None:
            weights = dict(zip(self.memories, self.weights, strict=True))
            found = {"way": "fixed weight", "mix_weight": weights, "tuned": "checkpoint, weight"}
        else:
            head = self.rule.config.gate != "posterior"
            found = {"way": f"gate {self.rule.config.gate}", "tuned": "checkpoint, weight" + (", head" if head else "")}
        return {"row": self.row, "title": TITLES[self.row], **found}

    def label_log_probs(self, table: ScoreTable) -> NDArray[np.float64]:
        """What it gives each label of a text."""
        base = table.voters[self.base]
        if self.weights is None:
            return base.label.astype(np.float64)
        parts = {name: table.voters[name] for name in self.memories}
        if self.rule is None:
            return mixture_label_log_probs(base.label, [part.label for part in parts.values()], self.weights)
        seen = ScoreTable({BASE: base, **parts}, table.document, table.label_count)
        return gated_label_log_probs(seen, self.rule)[0]


def all_ways(rows: Iterable[str], validation: ScoreTable, heads: Mapping[str, ConfidenceHead | None]) -> Iterator[Way]:
    """Every row that all of the test text is scored for, with what validation text chose for it.

    Memories stand beside a base with the weight that is best on that text, and under the gate.
    """
    yield Way("base", BASE, (), None)
    for row in (row for row in rows if row not in IN_CONTEXT):
        memories = row.split("+")
        under = memories.pop(0) if memories[0] in ("dapt", "lora") else BASE
        if not memories:
            yield Way(row, under, (), None)
            continue
        base = validation.voters[under].label
        labels = [validation.voters[name].label for name in memories]
        weights = best_mix_weights(base, labels)
        yield Way(row, under, tuple(memories), weights)
        own = [best_mix_weight(base, label)[0] for label in labels]
        known = {name: GatedMemory(w, heads.get(name)) for name, w in zip(memories, own, strict=True)}
        rule = weight_rule(gate_config(None), known)
        assert isinstance(rule, Gate)
        yield Way(row, under, tuple(memories), weights, rule)
