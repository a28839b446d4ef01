"""Perplexity of base, memories and mixture, with the weights chosen on validation data."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from memlm.config import settings_from
from memlm.corpus.blocks import Corpus
from memlm.errors import ConfigError, InputError, TokenizerMismatchError
from memlm.evaluate.config import EvaluateConfig
from memlm.evaluate.intervals import Resampled
from memlm.evaluate.plot import plot_report
from memlm.evaluate.report import MIXTURE, Report, fixed_of, weights_of
from memlm.files import write_json
from memlm.manifest import read_manifest
from memlm.memory.confidence import ConfidenceHead
from memlm.memory.config import named
from memlm.memory.loading import read_head, read_settings
from memlm.memory.retrieval import RetrievalSettings, Validated
from memlm.memory.seen import check_unseen
from memlm.mix.gate import Gate, GatedMemory, gate_config, weight_rule
from memlm.mix.gate_config import GateConfig, GateName
from memlm.mix.weights import settle_weights
from memlm.models.identity import model_identity
from memlm.models.tokenizers import ADVICE, check_rows_for
from memlm.scores.gated import gated_label_log_probs
from memlm.scores.mixtures import (
    GRID,
    best_mix_weight,
    best_mix_weights,
    finite,
    mixture_label_log_probs,
    perplexity_curve,
)
from memlm.scores.table import BASE, ScoreTable, score_corpus
from memlm.stage import Stage, StageSpec, check_output, run_stage
from memlm.targets.config import RetrievalConfig

_T = TypeVar("_T")
_FREQUENCY_EDGES = (0, 1, 10, 100, 1000)


def evaluate_perplexity(
    corpus: str | Path,
    *,
    base: str | Path,
    memory: str | Path | Mapping[str, str | Path],
    out: str | Path | None = None,
    config: EvaluateConfig | None = None,
    retrieval: RetrievalConfig | None = None,
    gate: GateName | GateConfig | None = None,
    **settings: Any,
) -> Report:
    """Test perplexity of base, each memory alone and their mixture.

    Each model scores the text once; every mixture is computed from the scores. All give their probability to the
    tokenizer's ids only, so padded output rows count for none.

    Args:
        corpus: Folder of the corpus stage.
        base: Path, hub id or packaged name.
        memory: Folder or hub id of a memory, a datastore (live kNN-LM), or any causal LM of the same tokenizer; or name
            to any of these.
        out: Folder for `report.json` and a plot; none is written if None.
        config: Default settings if None; or give them as keywords.
        retrieval: How datastores are searched; by default if None. A single datastore keeps it, with the weight that
            was chosen, for mixtures to come (`validated.json` in its folder).

    Returns:
        `base`, each memory by its name (`memory` where it has none) and `mixture`, each with `perplexity` and
        `interval` (95%, documents resampled; None for a single document); `mixture` has `mix_weight` too, by name where
        memories are named. Further `tokens`, `ratio` (mixture over base, paired), `validation` (the curve of the
        mixture over the memories' total weight), `by_label_frequency`, and `run`: settings, and the content hashes of
        what was read, so that equal runs give equal bytes (the manifest beside says where it was found). An infinite
        perplexity, as a retriever has alone, is None.

    Raises:
        InputError: The corpus has no test tokens, or no validation tokens to choose weights on, or shares held-out
            documents with the text of a memory that was made from another corpus (where that is still found).
        ConfigError: A memory's name is taken by the report, or weights do not fit the memories.
        TokenizerMismatchError: Base or memory has another tokenizer than the corpus.
        ModelError: Base or memory cannot be reached, or gives NaN.
        OutputExistsError: `out` holds something else.
    """
    config = settings_from(EvaluateConfig, config, settings)
    base = str(base)
    memory = {name: str(place) for name, place in memory.items()} if isinstance(memory, Mapping) else str(memory)
    memories = named(memory)
    source = Corpus(corpus)
    splits = source.manifest.facts["splits"]
    if not splits["test"]["positions"]:
        raise InputError(f"corpus {corpus} has no test tokens; build it with a larger --test-fraction")
    if config.mix_weight is None and not splits["validation"]["positions"]:
        raise InputError(f"corpus {corpus} has no validation tokens to choose mix_weight on; give --mix-weight")
    if taken := memories.keys() & _TAKEN:
        raise ConfigError(f"memory name {min(taken)!r} is what the report calls something of its own; take another")
    given = None
    if config.mix_weight is not None:
        given = list(settle_weights(dict.fromkeys(memories), config.mix_weight).values())
    source.check_read_by(base)
    source.check_fits(base)
    for model in memories.values():
        check_memory(source, model)
    if config.shared_documents == "refuse":
        read = {name: source.split(name) for name in (("test",) if given is not None else ("validation", "test"))}
        check_unseen(source, memories, read, "keep them with shared_documents keep")
    gate = gate_config(gate, weight_given=given is not None)
    spec = report_spec(corpus, base=base, memory=memory, config=config, retrieval=retrieval, gate=gate)
    heads = _heads(memories, retrieval)
    weight_rule(gate, {name: GatedMemory(None, head) for name, head in heads.items()})  # raises before any work
    if out is not None:
        check_output(out, spec)
    tables = score_corpus(
        source, base, memories, dtype=config.dtype, batch_tokens=config.batch_tokens, retrieval=retrieval
    )
    weights = given if given is not None else best_mix_weights(*_labels(tables["validation"], memories))
    test = tables["test"]
    parts = {name: test.voters[name].label.astype(np.float64) for name in (BASE, *memories)}
    fixed = mixture_label_log_probs(*_labels(test, memories), weights)
    rule = weight_rule(gate, _gated(tables, heads, weights, given is not None))
    gated = gated_label_log_probs(test, rule) if isinstance(rule, Gate) else None
    parts[MIXTURE] = fixed if gated is None else gated[0]
    resampled = Resampled(test.document, {**parts, _FIXED: fixed}, config)
    report = Report({name: resampled.perplexity(name) for name in parts})

    def as_given(values: Sequence[_T]) -> _T | dict[str, _T]:
        return dict(zip(memories, values, strict=True)) if isinstance(memory, Mapping) else values[0]

    chosen = {"mix_weight": as_given(weights), "mix_weight_from": "validation" if given is None else "given"}
    report[MIXTURE]["gate"] = rule.config.gate if isinstance(rule, Gate) else "none"
    if gated is None or not isinstance(rule, Gate):
        report[MIXTURE] |= chosen
    else:
        report[MIXTURE]["mean_weight"] = as_given([round(float(mean), 4) for mean in gated[1].mean(0)])
        if rule.config.sleep:
            report[MIXTURE]["asleep"] = round(float((gated[1] == 0).all(-1).mean()), 4)
        report[MIXTURE]["ratio_to_fixed"] = resampled.ratio(MIXTURE, _FIXED)
        report[MIXTURE]["fixed"] = resampled.perplexity(_FIXED) | chosen
    report["tokens"] = len(test.document)
    report["documents"] = len(np.unique(test.document))
    report["ratio"] = resampled.ratio(MIXTURE, BASE)
    report["by_label_frequency"] = by_label_frequency(test.label_count, parts)
    curve = _curve(tables["validation"], memories, weights) if "validation" in tables else None
    report["validation"] = {
        "tokens": splits["validation"]["positions"],
        "mix_weights": GRID.round(4).tolist(),
        "perplexities": None if curve is None else [finite(value) for value in curve],
    }
    report["run"] = {
        "corpus": spec.inputs["corpus"],
        "base": spec.inputs["base"],
        "memory": as_given([spec.inputs[_input(name, memory)] for name in memories]),
        "config": config.deciding,
        "gate": gate.model_dump(),
    }
    if retrieval is not None:
        report["run"]["retrieval"] = retrieval.found
    if out is not None:
        run_stage(out, spec, lambda stage: _write(stage, report, parts))
    if given is None and len(memories) == 1:
        _keep_choice(next(iter(memories.values())), base, weights[0], retrieval)
    return report


def _heads(memories: Mapping[str, str], retrieval: RetrievalConfig | None) -> dict[str, ConfidenceHead | None]:
    return {name: read_head(model, read_settings(model, retrieval=retrieval)) for name, model in memories.items()}


def _gated(
    tables: Mapping[str, ScoreTable], heads: Mapping[str, ConfidenceHead | None], weights: list[float], given: bool
) -> dict[str, GatedMemory]:
    """What the gate is told: of each memory its head, and the weight that is best for it alone, or was given."""
    if not given and len(weights) > 1:
        base, labels = _labels(tables["validation"], heads)
        weights = [best_mix_weight(base, label)[0] for label in labels]
    return {name: GatedMemory(w, head) for (name, head), w in zip(heads.items(), weights, strict=True)}


def evaluated_log_probs(
    report: Mapping[str, Any], tables: Mapping[str, ScoreTable], memories: Mapping[str, str]
) -> NDArray[np.float64]:
    """What an evaluation's mixture gives each label of the test text.

    Args:
        report: What the evaluation found.
        tables: Its scores.
        memories: Name to folder or hub id, as it was given them.
    """
    weights = list(weights_of(report).values())
    given = fixed_of(report)["mix_weight_from"] == "given"
    config = GateConfig.parse(report["run"]["gate"])
    searched = report["run"].get("retrieval")
    heads = _heads(memories, None if searched is None else RetrievalConfig(**searched))
    rule = weight_rule(config, _gated(tables, heads, weights, given))
    if isinstance(rule, Gate):
        return gated_label_log_probs(tables["test"], rule)[0]
    return mixture_label_log_probs(*_labels(tables["test"], memories), weights)


def _keep_choice(memory: str, base: str, weight: float, retrieval: RetrievalConfig | None) -> None:
    """Leave the weight and the search that was evaluated in a datastore's folder; a trained memory has its own."""
    settings = read_settings(memory, retrieval=retrieval)
    if isinstance(settings, RetrievalSettings) and Path(settings.datastore) == Path(memory).resolve():
        Validated(mix_weight=weight, base=base, retrieval=settings.retrieval).keep(memory)


_FIXED = "mixture.fixed"  # no memory's name has a dot
_TAKEN = {BASE, MIXTURE, "tokens", "documents", "ratio", "by_label_frequency", "validation", "run", "from", "below"}


def _labels(table: ScoreTable, memories: Iterable[str]) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
    return table.voters[BASE].label, [table.voters[name].label for name in memories]


def _curve(table: ScoreTable, memories: Mapping[str, str], weights: list[float]) -> NDArray[np.float64]:
    """Perplexity of the mixture at each total weight of the memories, which share it as they share `weights`."""
    base, labels = _labels(table, memories)
    total = sum(weights)
    shares = [weight / total if total else 1 / len(weights) for weight in weights]
    together = labels[0] if len(labels) == 1 else mixture_label_log_probs(labels[0], labels[1:], shares[1:])
    return perplexity_curve(base, together)


def check_memory(corpus: Corpus, memory: str) -> None:
    """Raise unless the memory votes on the corpus's token ids; reads no weights.

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
        for ids in corpus.token_ids():
            names = {"data": f"corpus {corpus.folder}", "label": f"memory {memory}"}
            check_rows_for(ids, settings.vocab_size, corpus.tokenizer, **names)


def by_label_frequency(label_count: NDArray[np.int64], parts: dict[str, NDArray[np.float64]]) -> list[dict[str, Any]]:
    """Perplexities over test tokens, split by how often the label occurs in training."""
    rows = []
    for low, high in zip(_FREQUENCY_EDGES, (*_FREQUENCY_EDGES[1:], None), strict=True):
        here = (label_count >= low) & (label_count < (high if high is not None else np.inf))
        if here.any():
            row: dict[str, Any] = {"from": low, "below": high, "tokens": int(here.sum())}
            rows.append(row | {name: finite(np.exp(-values[here].mean())) for name, values in parts.items()})
    return rows


def report_spec(
    corpus: str | Path,
    *,
    base: str,
    memory: str | Mapping[str, str],
    config: EvaluateConfig | None,
    retrieval: RetrievalConfig | None,
    gate: GateName | GateConfig | None = None,
) -> StageSpec:
    """What `evaluate_perplexity` with these arguments makes in its `out`."""
    made, config = read_manifest(corpus, "corpus"), config or EvaluateConfig()
    parts = {_input(name, memory): model for name, model in named(memory).items()}
    sources = {"base": base, **parts}
    weighs = gate_config(gate, weight_given=config.mix_weight is not None)
    heads = {name: head.digest for name, head in _heads(parts, retrieval).items() if head is not None}
    return StageSpec(
        "evaluation",
        config=config.deciding
        | {"gate": weighs.model_dump() | ({"heads": heads} if heads and weighs.gate != "none" else {})}
        | ({"retrieval": retrieval.found} if retrieval is not None else {}),
        inputs={"corpus": made.hash, **{name: model_identity(model) for name, model in sources.items()}},
        tokenizer=made.tokenizer,
        sources={"corpus": str(Path(corpus)), **sources},
    )


def _input(name: str, memory: str | Mapping[str, str]) -> str:
    """What a memory is called among the inputs."""
    return f"memory.{name}" if isinstance(memory, Mapping) else name


def _write(stage: Stage, report: dict[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    write_json(stage.path / "report.json", report)
    if find_spec("matplotlib") is None:
        print("no plot was drawn: pip install 'memlm[plot]' brings matplotlib", file=sys.stderr)
    else:
        with stage.writing("perplexity.png") as temporary:
            plot_report(report, temporary)
    return {name: report[name] for name in (*parts, "tokens")}
