"""What other gates would do: `python -m benchmarks.gate_search CORPUS MEMORY --base smollm2 --fit TEXT --test TEXT`.

Base and memory read each text once. Then heads of several shapes are fitted as `memlm gate` fits its own, on the
validation split and general text, and rules that follow a text are tried with each; all are judged on the test split
and on other general text. One JSON line each: perplexity in the domain over that of the fixed weight which validation
chose, and on general text over the base's.

Rules beside the library's: fewer switches; a switch that goes back to what explained the text so far instead of the
prior (mixing past posteriors: Bousquet and Warmuth, JMLR 3, 2002); the fixed weight as one more explanation. Heads
beside its own: a hidden layer, and evidence of the text so far (decayed averages of how much better the memory was).
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.report import hardware, one_line_errors
from memlm.corpus.blocks import Corpus
from memlm.scores.gated import side_by_side
from memlm.scores.mixtures import best_mix_weight, mixture_label_log_probs, perplexity
from memlm.train.config import FitGateConfig
from memlm.train.gate import Heard, fitted, general_text, heard_beside, mixture_nats

_DECAYS = (0.5, 0.8, 0.9, 0.97)
_BATCH = 1024


@dataclass(frozen=True)
class Texts:
    """What base and memory said of the domain's held-out text and of general text, for fitting and for judging."""

    fit: Heard
    test: Heard
    general_fit: Heard
    general_test: Heard


@dataclass(frozen=True)
class Rule:
    """How explanations are followed along a text: base alone, memory alone, confidence's mixture, fixed mixture."""

    prior: float = 0.5
    switch: float = 0.01
    alone: float = 0.05
    """Share of the prior of memories that the memory alone has."""
    fixed: float = 0.0
    """And the mixture at the fixed weight."""
    past: float = 0.0
    """Share of a switch that goes to the mean of the posteriors so far; the rest goes to the prior."""

    def weights(self, heard: Heard, own: Tensor, fixed_weight: float) -> Tensor:
        """The memory's weight at every position, from the labels before it in its document."""
        base, memory = (torch.from_numpy(part.astype(np.float64)) for part in (heard.base, heard.memory))
        kinds = [
            (torch.zeros_like(base), 1 - self.prior),
            (torch.ones_like(base), self.prior * self.alone),
            (own, self.prior * (1 - self.alone - self.fixed)),
            (torch.full_like(base, fixed_weight), self.prior * self.fixed),
        ]
        counts = torch.stack([weight for weight, _ in kinds], -1)
        prior = torch.tensor([share for _, share in kinds], dtype=torch.float64)
        told = torch.logaddexp(base[:, None] + torch.log1p(-counts), memory[:, None] + counts.log()).exp()
        found = torch.empty_like(base)
        for at, there in side_by_side(heard.document):
            now, seen, mean = prior.expand(len(at), -1), 8.0, prior.expand(len(at), -1)
            for place in range(at.shape[1]):
                here, rows = at[:, place], there[:, place]
                found[here[rows]] = (now * counts[here]).sum(-1)[rows]
                after = now * told[here]
                after = after / after.sum(-1, keepdim=True)
                mean, seen = (mean * seen + after) / (seen + 1), seen + 1
                now = (1 - self.switch) * after + self.switch * ((1 - self.past) * prior + self.past * mean)
        return found


RULES: Mapping[str, Rule | None] = {
    "confidence": None,
    "both": Rule(),
    "fewer switches": Rule(switch=0.003),
    "past posteriors, half": Rule(past=0.5),
    "past posteriors": Rule(past=0.9),
    "the fixed weight too": Rule(fixed=0.475),
    "prior 0.1": Rule(prior=0.1),
    "prior 0.1, past posteriors": Rule(prior=0.1, past=0.9),
    "prior 0.9": Rule(prior=0.9),
}


def evidence(heard: Heard) -> NDArray[np.float32]:
    """How much better the memory was on the labels before, `(P, decays)`: decayed means of its log-odds."""
    better = heard.memory.astype(np.float64) - heard.base
    found = np.zeros((len(better), len(_DECAYS)), np.float32)
    for at, there in side_by_side(heard.document):
        mean = np.zeros((len(at), len(_DECAYS)))
        for place in range(at.shape[1]):
            here, rows = at[:, place].numpy(), there[:, place].numpy()
            found[here[rows]] = mean[rows]
            mean = mean * _DECAYS + better[here, None] * (1 - np.array(_DECAYS))
    return found


class _Hidden(torch.nn.Module):
    """A line and, beside it, a hidden layer."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.line = torch.nn.Linear(inputs, 1)
        out = torch.nn.Linear(hidden, 1)
        self.layer = torch.nn.Sequential(torch.nn.Linear(inputs, hidden), torch.nn.Tanh(), out)
        for last in (self.line, out):
            torch.nn.init.zeros_(last.weight)
            torch.nn.init.zeros_(last.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.line(inputs) + self.layer(inputs))[:, 0]


def nonlinear(texts: Sequence[tuple[Tensor, Heard]], hidden: int, epochs: int = 10) -> Callable[[Tensor], Tensor]:
    """Logits of a head with a hidden layer, fitted by AdamW with dropout on the likelihood of the mixture."""
    torch.manual_seed(0)
    model = _Hidden(texts[0][0].shape[1], hidden)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.5)
    steps = max(1, epochs * max(len(inputs) for inputs, _ in texts) // _BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    parts = [(inputs, torch.from_numpy(text.base), torch.from_numpy(text.memory)) for inputs, text in texts]
    for _ in range(steps):
        nats = torch.zeros(())
        for inputs, base, memory in parts:  # each counts alike
            at = torch.randint(0, len(inputs), (_BATCH // len(parts),))
            logit = model(torch.nn.functional.dropout(inputs[at], 0.4))
            nats = nats + mixture_nats(logit, base[at], memory[at]).mean()
        optimizer.zero_grad()
        nats.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    return torch.no_grad()(model)


def heads(texts: Texts) -> Iterator[tuple[str, Callable[[Heard], Tensor]]]:
    """Name of a head, and what gives its confidence on a text, `(P,)` in float64."""
    both = (texts.fit, texts.general_fit)
    settings = fitted(both)
    weights = np.array(settings["state"] + settings["features"])
    yield "linear", lambda heard: torch.sigmoid(torch.from_numpy(heard.inputs @ weights + settings["bias"]).double())
    for more, hidden in ((False, 32), (False, 128), (True, 32), (True, 128)):

        def inputs(heard: Heard, more: bool = more) -> NDArray[np.float32]:
            return np.concatenate([heard.inputs, evidence(heard)], 1) if more else heard.inputs

        found = [inputs(heard) for heard in both]
        pooled = np.concatenate(found)
        mean, spread = pooled.mean(0), np.maximum(pooled.std(0), 1e-6)

        def scaled(part: NDArray[np.float32], mean: Any = mean, spread: Any = spread) -> Tensor:
            return torch.from_numpy(((part - mean) / spread).astype(np.float32))

        head = nonlinear([(scaled(part), heard) for part, heard in zip(found, both, strict=True)], hidden)

        def confidence(heard: Heard, inputs: Any = inputs, scaled: Any = scaled, head: Any = head) -> Tensor:
            return torch.sigmoid(head(scaled(inputs(heard)))).double()

        yield f"hidden layer of {hidden}" + (", evidence of the text" if more else ""), confidence


def gated_perplexity(heard: Heard, weights: Tensor) -> float:
    """Of the mixture with a weight of its own at every position."""
    base, memory = torch.from_numpy(heard.base).double(), torch.from_numpy(heard.memory).double()
    return perplexity(torch.logaddexp(base + torch.log1p(-weights), memory + weights.log()).numpy())


def told_of(texts: Texts) -> dict[str, float]:
    """What a base and the fixed weight that validation chose reach on both texts, and the better of base and memory."""
    weight, _ = best_mix_weight(texts.fit.base, texts.fit.memory)
    test, general = texts.test, texts.general_test
    fixed, general_fixed = (
        perplexity(mixture_label_log_probs(text.base, [text.memory], [weight])) for text in (test, general)
    )
    return {
        "base_perplexity": perplexity(test.base),
        "fixed_perplexity": fixed,
        "in_hindsight": perplexity(np.maximum(test.base, test.memory)),
        "general_fixed_over_base": general_fixed / perplexity(general.base),
    }


def search(texts: Texts, beside: Mapping[str, Texts]) -> Iterator[dict[str, Any]]:
    """Every head, fitted beside one base, under every rule, beside each base.

    Args:
        texts: Beside the base that heads are fitted beside.
        beside: By base, that one too.
    """
    kept, _ = best_mix_weight(texts.fit.base, texts.fit.memory)
    told = {base: told_of(there) for base, there in beside.items()}
    for name, confidence in heads(texts):
        for base, there in beside.items():
            own = [(heard, confidence(heard)) for heard in (there.test, there.general_test)]
            for title, rule in RULES.items():
                domain, general = (
                    gated_perplexity(heard, part if rule is None else rule.weights(heard, part, kept))
                    for heard, part in own
                )
                yield {
                    "base": base,
                    "head": name,
                    "rule": title,
                    **{key: round(value, 5) for key, value in told[base].items()},
                    "over_fixed": round(domain / told[base]["fixed_perplexity"], 5),
                    "general_over_base": round(general / perplexity(there.general_test.base), 5),
                }


def listen(corpus: Path, memory: Path, base: str, fit: str, test: str, config: FitGateConfig) -> Texts:
    """What base and memory say of all four texts."""
    source = Corpus(corpus)
    with tempfile.TemporaryDirectory() as scratch:
        general = [
            general_text([text], source, config, Path(scratch) / name) for name, text in (("a", fit), ("b", test))
        ]
        splits = [source.split("validation"), source.split("test"), *general]
        return Texts(*heard_beside(memory, base, source, splits, config))


@one_line_errors
def main(arguments: list[str] | None = None) -> int:
    """Search; the exit status is 1 where something is wrong."""
    assert __doc__
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gate_search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("corpus", type=Path, help="the domain's corpus, whose validation and test splits are read")
    parser.add_argument("memory", type=Path)
    parser.add_argument("--base", action="append", required=True, help="the first: heads are fitted beside it")
    parser.add_argument("--fit", required=True, help="general text that heads are fitted on")
    parser.add_argument("--test", required=True, help="general text that they are judged on")
    parser.add_argument("--document-separator", help="of the general text")
    parser.add_argument("--general-tokens", type=int, default=20_000, help="of each general text at most")
    parser.add_argument("--dtype", default="auto")
    given = parser.parse_args(arguments)
    config = FitGateConfig(
        dtype=given.dtype, document_separator=given.document_separator, general_tokens=given.general_tokens
    )
    beside = {base: listen(given.corpus, given.memory, base, given.fit, given.test, config) for base in given.base}
    for line in search(beside[given.base[0]], beside):
        print(json.dumps(line), flush=True)
    print(json.dumps({"machine": hardware()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
