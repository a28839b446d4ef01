"""Fitting a memory's confidence head: a logistic regression on the likelihood of the mixture."""

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memlm.config import settings_from
from memlm.corpus.blocks import IGNORE, Corpus, Split
from memlm.corpus.build import build_corpus
from memlm.corpus.config import SPLITS
from memlm.corpus.readers import listed
from memlm.errors import ConfigError, InputError, TokenizerMismatchError
from memlm.manifest import is_artifact, read_manifest
from memlm.memory.confidence import FEATURES, ConfidenceHead, features
from memlm.memory.loading import load_memory
from memlm.memory.protocol import Memory
from memlm.memory.retrieval import RetrievalSettings
from memlm.memory.seen import check_unseen
from memlm.mix.base import BaseVoter
from memlm.mix.loading import settings_of
from memlm.models.loading import default_device, load_on_default_device
from memlm.progress import progress_bar
from memlm.scores.gated import columns_of
from memlm.scores.mixtures import best_mix_weight, finite, mixture_label_log_probs, perplexity
from memlm.scores.score import score
from memlm.targets.config import RetrievalConfig
from memlm.train.config import FitGateConfig

FEWEST_TOKENS, FEWEST_DOCUMENTS = 1000, 4
"""Held-out text that a head needs; with less it would learn these documents by heart."""
_PENALTIES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""Of squared weights, on inputs of variance 1; the best of them is chosen by halves that judge each other."""
_ITERATIONS = 200


@dataclass(frozen=True)
class Heard:
    """A text as the head sees it: one row per position."""

    inputs: NDArray[np.float32]
    """`(P, D + F)`: the memory's state, then `FEATURES`."""
    base: NDArray[np.float32]
    """Label log-probs."""
    memory: NDArray[np.float32]
    document: NDArray[np.int64]


def fit_gate(
    memory: str | Path,
    *,
    corpus: str | Path,
    base: str | Path | Sequence[str | Path],
    general: str | Path | Iterable[str | Path] = (),
    config: FitGateConfig | None = None,
    retrieval: RetrievalConfig | None = None,
    **settings: Any,
) -> ConfidenceHead:
    """Fit a confidence head on held-out text, and leave it in the memory's folder (`gate.json`).

    It learns where the memory is better than the base: on the validation split of `corpus`, which training has not
    seen, and on general text, which shows what the memory does not know. What it is worth is found by two halves of the
    documents that judge each other, and told in the head's `facts`.

    Args:
        memory: Folder of a memory, or a datastore.
        corpus: Folder of the corpus stage whose validation split is read.
        base: Path, hub id or packaged name of a base to stand beside it, or several, of which none is to be leaned on:
            all count alike. The head's `facts` are of the first.
        general: A document or folder, or several, of text that is not of the domain; a corpus folder gives its held-out
            text.
        config: Default settings if None; or give them as keywords.
        retrieval: How a datastore is searched, which the head is then for; as it was validated if None. Other kinds
            ignore it.

    Raises:
        InputError: Too little held-out text, or the memory was trained on some of it.
        ConfigError: General text is the domain's own.
        TokenizerMismatchError: Base, memory or a corpus of general text has another tokenizer than the corpus.
        ModelError: Base or memory cannot be reached, or gives NaN.
    """
    config = settings_from(FitGateConfig, config, settings)
    source, folder = Corpus(corpus), Path(memory)
    if not is_artifact(folder):
        raise ConfigError(f"{memory} is no folder that memlm made: a head is kept in the memory's folder")
    identity = read_manifest(folder, "memory", "datastore").hash
    bases, foreign = listed(base), listed(general)
    for place in bases:
        source.check_read_by(place)
    whole = source.split("validation")
    held_out = _cut(whole, config.max_tokens)
    if not _will_do(held_out):
        within, cure = "", "build it with a larger --validation-fraction"
        if _will_do(whole):
            within, cure = f" at --max-tokens {config.max_tokens}", "raise that"
        raise InputError(
            f"corpus {corpus} has {held_out.n_positions:,} validation tokens of {held_out.n_documents}"
            f" documents{within}; a head needs {FEWEST_TOKENS:,} of {FEWEST_DOCUMENTS} at least: {cure}"
        )
    if config.shared_documents == "refuse":
        otherwise = "fit it on others, or with shared_documents keep"
        check_unseen(source, {"memory": str(folder)}, {"validation": held_out}, otherwise)
    texts, there = [held_out], settings_of(folder, {"retrieval": retrieval})
    searched = there.retrieval if isinstance(there, RetrievalSettings) else None
    with tempfile.TemporaryDirectory() as scratch:
        if foreign:
            texts.append(general_text(foreign, source, config, Path(scratch)))
        heard = [found for place in bases for found in heard_beside(folder, place, source, texts, config, searched)]
    head = ConfidenceHead(
        memory=identity,
        tokenizer=there.tokenizer if there is not None else source.manifest.tokenizer,
        base=", ".join(bases),
        retrieval=searched,
        **fitted(heard, names=("domain", "general")[: len(texts)], seed=config.seed),
    )
    head.save(folder)
    return head


def heard_beside(
    folder: Path,
    base: str,
    source: Corpus,
    texts: Sequence[Split],
    config: FitGateConfig,
    retrieval: RetrievalConfig | None = None,
) -> list[Heard]:
    """The texts as a head sees them where the memory, a datastore so searched, stands beside this base."""
    source.check_fits(base)
    model = load_on_default_device(base, config.dtype)
    voter = BaseVoter(model, source.vocab_size, exact=False)
    part = load_memory(folder, base=base, retrieval=retrieval, dtype=model.dtype, with_head=False)
    part.settings = part.settings.model_copy(update={"vocab_size": source.vocab_size})
    part.check_base(voter.model)
    part.to(voter.device)
    return [_hear(part, voter, text, config) for text in texts]


def _will_do(split: Split) -> bool:
    """Whether a head can be fitted on so much text."""
    return split.n_positions >= FEWEST_TOKENS and split.n_documents >= FEWEST_DOCUMENTS


def _cut(split: Split, tokens: int) -> Split:
    """Its first documents, as many as have so many tokens, or the first alone."""
    documents = max(1, int(np.searchsorted(split.offsets, tokens, "right")) - 1)
    return Split(split.tokens, split.offsets[: documents + 1], split.block_size, split.step, split.cross_documents)


def general_text(places: list[str], domain: Corpus, config: FitGateConfig, scratch: Path) -> Split:
    """General text as one split; what the domain's corpus holds as well is refused."""
    own = {text.tobytes() for name in SPLITS for text in domain.split(name).documents()}
    known = [place for place in places if is_artifact(place)]
    found: list[tuple[int, list[NDArray[np.int32]]]] = []
    for place in known:
        other = Corpus(place)
        if other.manifest.tokenizer != domain.manifest.tokenizer:
            raise TokenizerMismatchError(
                f"corpus {domain.folder} and general text {place} have different tokenizers; give its documents instead"
            )
        found.append((1, [text for name in ("validation", "test") for text in other.split(name).documents()]))
    files = [place for place in places if place not in known]
    if files:
        folder = scratch / "general"
        split = {"validation_fraction": 0.0, "test_fraction": 0.0, "max_tokens": config.general_tokens}
        reading = {"document_separator": config.document_separator, "encoding": config.encoding}
        reading |= {"text_column": config.text_column, **domain.config.for_other_text}
        build_corpus(files, tokenizer=str(domain.folder / "tokenizer"), out=folder, **split, **reading)
        found.append((len(files), list(Corpus(folder).split("train").documents())))
    texts = _by_turns(found)
    if both := sum(text.tobytes() in own for text in texts):
        raise ConfigError(
            f"{both} of {len(texts)} general documents are in corpus {domain.folder} too: general text is what the"
            " memory was not made for"
        )
    if (tokens := sum(map(len, texts))) - len(texts) < FEWEST_TOKENS:
        raise InputError(f"general text has {tokens:,} tokens; a head needs {FEWEST_TOKENS:,} at least")
    return _cut(domain.split("validation").cut_alike(texts), config.general_tokens)


def _by_turns(found: Sequence[tuple[int, list[NDArray[np.int32]]]]) -> list[NDArray[np.int32]]:
    """Documents in an order in which, wherever it is cut, each place has given about as many tokens.

    Args:
        found: Of how many places, and their documents; of one alone the order stays.
    """
    if len(found) == 1:
        return found[0][1]
    order = []
    for places, texts in found:
        drawn = sorted(texts, key=lambda text: hashlib.sha256(text.tobytes()).digest())  # no place comes first
        before = np.cumsum([0, *map(len, drawn)]) / places
        order += list(zip(before.tolist(), drawn, strict=False))
    return [text for _, text in sorted(order, key=lambda one: one[0])]


def _hear(memory: Memory, base: BaseVoter, text: Split, config: FitGateConfig) -> Heard:
    """What base and memory say of a text, in one pass."""
    positions = int(text.position_starts[-1])
    states = np.empty((positions, 0), np.float32)

    def keep(name: str, state: Any, labels: Tensor, places: NDArray[np.int64]) -> None:
        nonlocal states
        seen = memory.evidence(state, labels != IGNORE) if name == "memory" else None
        if seen is not None:
            if not states.size:
                states = np.empty((positions, seen.shape[-1]), np.float32)
            states[places] = seen.float().cpu().numpy()

    with progress_bar(positions, "reading") as bar:
        found = score(
            {"base": base, "memory": memory},
            text,
            base=base,
            batch_tokens=config.batch_tokens,
            progress=bar.update,
            on_state=keep,
        )
    seen_beside = features(columns_of(found["base"]), columns_of(found["memory"]))
    inputs = np.concatenate([states, seen_beside.numpy()], 1)
    document = text.documents_of(np.arange(positions))
    return Heard(inputs.astype(np.float32), found["base"].label, found["memory"].label, document)


# --- the regression -----------------------------------------------------------------------------------------------


def fitted(heard: Sequence[Heard], *, names: Sequence[str] = ("domain", "general"), seed: int = 0) -> dict[str, Any]:
    """The numbers of a head: `state`, `features`, `bias`, and `facts` of how it did on documents it had not seen.

    Every text counts alike, however long. The penalty is the one under which two halves of the documents, each fitted
    without the other, do best; then all are fitted together.

    Args:
        heard: The domain's text first, then general text; then both again, where they were heard beside another base.
        names: What the facts call the first of them; the others are not told of.
        seed: Deals documents to the halves.
    """
    halves = [_halves(text, seed) for text in heard]
    judged = {penalty: _judged(heard, halves, penalty) for penalty in _PENALTIES}
    best = min(judged, key=lambda penalty: float(np.mean([values.mean() for values in judged[penalty]])))
    weights, bias = _fit(heard, best)
    width = len(weights) - len(FEATURES)
    facts: dict[str, int | float | None] = {"penalty": best}
    weight, _ = best_mix_weight(heard[0].base, heard[0].memory)
    facts["mix_weight"] = weight
    for name, text, values in zip(names, heard, judged[best], strict=False):
        parts = {
            "base": text.base,
            "fixed": mixture_label_log_probs(text.base, [text.memory], [weight]),
            "gate": -values,
        }
        facts[f"{name}_tokens"] = len(text.base)
        facts |= {f"{name}_{part}_perplexity": finite(perplexity(found)) for part, found in parts.items()}
    return {"state": weights[:width].tolist(), "features": weights[width:].tolist(), "bias": bias, "facts": facts}


def _halves(text: Heard, seed: int) -> NDArray[np.bool_]:
    """Which positions are of the first half of the documents, dealt at random."""
    documents = int(text.document.max()) + 1
    if documents == 1:  # halves of the one there is
        return np.arange(len(text.document)) < len(text.document) // 2
    return np.isin(text.document, np.random.default_rng(seed).permutation(documents)[: documents // 2])


def _judged(heard: Sequence[Heard], halves: Sequence[NDArray[np.bool_]], penalty: float) -> list[NDArray[np.float64]]:
    """Nats of every label of each text, by a head fitted on the halves that it is not in."""
    found = [np.empty(len(text.base)) for text in heard]
    for inside in (True, False):
        others = [_rows(text, half != inside) for text, half in zip(heard, halves, strict=True)]
        weights, bias = _fit(others, penalty)
        for text, half, nats in zip(heard, halves, found, strict=True):
            here = _rows(text, half == inside)
            confidence = here.inputs.astype(np.float64) @ weights + bias
            nats[half == inside] = mixture_nats(
                torch.from_numpy(confidence), torch.from_numpy(here.base), torch.from_numpy(here.memory)
            ).numpy()
    return found


def _rows(text: Heard, rows: NDArray[np.bool_]) -> Heard:
    return Heard(text.inputs[rows], text.base[rows], text.memory[rows], text.document[rows])


def mixture_nats(confidence: Tensor, base: Tensor, memory: Tensor) -> Tensor:
    """`-log((1 - c) p_base + c p_memory)` where the logit of c is given."""
    log = torch.nn.functional.logsigmoid
    return -torch.logaddexp(base.double() + log(-confidence), memory.double() + log(confidence))


def _fit(heard: Sequence[Heard], penalty: float) -> tuple[NDArray[np.float64], float]:
    """Weights `(D + F,)` and bias, by L-BFGS in float64 on inputs of mean 0 and variance 1; the problem is smooth."""
    pooled = np.concatenate([text.inputs for text in heard]).astype(np.float64)
    mean, spread = pooled.mean(0), pooled.std(0)
    spread = np.where(spread > 1e-6, spread, np.inf)  # what never changes tells nothing
    device = default_device()
    if device.type == "mps":  # has no float64
        device = torch.device("cpu")
    texts = [
        [torch.from_numpy(array).to(device) for array in ((t.inputs - mean) / spread, t.base, t.memory)]
        for t in heard
        if len(t.base)
    ]
    weights = torch.zeros(pooled.shape[1], dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        nats = torch.stack(
            [mixture_nats(inputs @ weights + bias, base, memory).mean() for inputs, base, memory in texts]
        )
        total = nats.mean() + penalty * weights.square().sum()
        total.backward()
        return total

    step: Callable[..., Any] = optimizer.step
    step(loss)
    found = weights.detach().cpu().numpy() / spread
    return found, float(bias.detach()) - float(found @ mean)
