"""The train stage: rows and a start to a memory folder."""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from memlm.config import settings_from
from memlm.datastore.build import read_keys
from memlm.datastore.store import Datastore
from memlm.errors import ArtifactError, ConfigError, TokenizerMismatchError, TrainingError
from memlm.files import load_array
from memlm.manifest import Manifest, read_manifest
from memlm.memory.card import CARD_FILE, memory_card
from memlm.memory.loading import load_memory, memory_class, read_settings
from memlm.memory.protocol import Memory, MemorySettings
from memlm.models.heads import Head, check_plain_head
from memlm.models.identity import model_identity
from memlm.models.loading import WEIGHTS_FILE, check_reaches, default_device, dtype_name, load_causal_lm, parse_dtype
from memlm.models.taps import TapReader
from memlm.models.tokenizers import ADVICE
from memlm.parts import KEEP_SECONDS, Due
from memlm.progress import progress_bar
from memlm.ranks import ALONE, Ranks, together
from memlm.scores.score import stored_activations
from memlm.scores.table import Scorers, Text
from memlm.stage import Plan, Stage, StageSpec, run_stage
from memlm.train.beside import WithBase, base_on_rows, finite
from memlm.train.config import TrainConfig
from memlm.train.data import TrainingData, WithActivations
from memlm.train.trainer import HeldOut, MemoryTrainer, compute_in, last_whole_checkpoint, training_arguments

_CHECKPOINTS = "checkpoints"
_HELD_OUT = "validation-activations.npy"
_LOGGED = ("step", "loss", "kl_nats", "cross_entropy_nats", "mixture_nats", "grad_norm")
_ASIDE = "repaired"  # where files are written that are to go beside whole weights


def train_memory(
    data: str | Path,
    *,
    out: str | Path,
    init: str | None = None,
    base: str | None = None,
    activations: str | Path | None = None,
    config: TrainConfig | None = None,
    **settings: Any,
) -> Manifest:
    """Train a memory and write it to `out`, with its card.

    On targets it learns to imitate the retriever; on a corpus, which has none, `kl_weight` is 0 and this is plain
    fine-tuning, which makes a teacher, or a memory that knows no retriever.

    Args:
        data: Folder of the targets or of the corpus stage.
        out: Folder to write; an interrupted run goes on at its last whole checkpoint.
        init: Start model of a Memory Decoder (path, hub id or packaged name), or a memory of the kind to go on with.
        base: Base whose mixture with the memory is validated, and which an MLP memory reads; `init` if None.
        activations: Datastore whose keys are the base's activations at the tap, for an MLP memory; None: the frozen
            base runs inside every step.
        config: Default settings if None; or give them as keywords.

    Raises:
        ConfigError: A `kl_weight` above 0 is given and `data` is a corpus; a layer or a training argument does not
            exist; a setting does not fit the kind.
        TokenizerMismatchError: `init` or `base` has another tokenizer than `data`.
        ArtifactError: `activations` are of another corpus, base or tap.
        TrainingError: The loss, a gradient, or the memory after a step is not finite; the step is named.
        ModelError: A model cannot be reached, or the base's scores are not finite.
    """
    config = settings_from(TrainConfig, config, settings)
    with together() as ranks:
        plan = plan_memory(data, init=init, base=base, activations=activations, config=config, ranks=ranks)
        return run_stage(out, *plan, ranks)


def plan_memory(
    data: str | Path,
    *,
    init: str | None = None,
    base: str | None = None,
    activations: str | Path | None = None,
    config: TrainConfig | None = None,
    ranks: Ranks = ALONE,
    keep_seconds: float = KEEP_SECONDS,
) -> Plan:
    """What `train_memory` with these arguments is to make, and the work; raises what it raises before any work.

    Besides those of validations a checkpoint is saved every `keep_seconds`.
    """
    config = config or TrainConfig()
    if "kl_weight" not in config.model_fields_set and read_manifest(data, "targets", "corpus").kind == "corpus":
        config = config.model_copy(update={"kl_weight": 0.0})  # a corpus has no targets
    if config.left_out is not None and (config.objective == "mixture" or activations is not None):
        raise ConfigError("left_out is for plain fine-tuning: leave out objective mixture and activations")
    rows = TrainingData(data, with_targets=config.kl_weight > 0, left_out=config.fold)
    base, goes_on = check_start(config, init=init, base=base, block_size=rows.corpus_config.block_size)
    if init is not None:
        _check_init(rows, init)
    rows.check_read_by(base, "base")
    check_reaches(base, rows.longest_block, data=str(data), label=f"base {base}")
    store = _stored_activations(rows, base, activations, config) if activations is not None else None
    device = default_device()
    dtype = parse_dtype(config.dtype, device)
    if dtype == torch.float16:
        raise ConfigError("dtype = 'float16': train in bfloat16 or float32")
    validates, through_mixture = len(rows.validation) > 0, config.objective == "mixture"
    batches = math.ceil(len(rows.train) / (config.batch_size * ranks.count))
    arguments = training_arguments(
        config,
        Path(_CHECKPOINTS),
        steps_per_epoch=math.ceil(batches / config.accumulation),
        bf16=dtype == torch.bfloat16,
        use_cpu=device.type == "cpu",
        validate=validates,
    )
    inputs = {"data": rows.manifest.hash, "base": model_identity(base)}
    sources = {**rows.manifest.sources, "data": str(data), "base": base}
    if init is not None:
        inputs["init"], sources["init"] = model_identity(init), init
    if store is not None:
        inputs["activations"], sources["activations"] = store.manifest.hash, str(activations)
    spec = StageSpec(
        "memory",
        config=config.model_dump() | ({"processes": ranks.count} if ranks.count > 1 else {}),
        inputs=inputs,
        tokenizer=rows.manifest.tokenizer,
        sources=sources,
        intermediate=(_CHECKPOINTS, _HELD_OUT),
    )

    def work(stage: Stage) -> dict[str, Any]:
        def say_kept(step: int, steps: int) -> None:
            stage.kept = f"training up to step {step:,} of {steps:,}"

        settled = ranks.once(lambda: stage.settled("dtype", dtype_name(dtype)))
        compute_in(arguments, bf16=settled == "bfloat16")
        base_model: PreTrainedModel = load_causal_lm(base, dtype=parse_dtype(settled)).to(device)  # type: ignore[arg-type]
        torch.manual_seed(config.seed)
        memory = _start(rows, init, goes_on, base_model, config)
        if isinstance(head := getattr(memory, "head", None), Head):
            check_plain_head(head, init or "the memory")
        if store is not None and store.manifest.facts["tap"] != memory.tap:
            raise ArtifactError(
                f"activations {activations} were read at {store.manifest.facts['tap']}, the memory reads {memory.tap}"
            )
        memory.train_beside_base(through_mixture)
        previous = ranks.from_first(stage.previous if stage.has(WEIGHTS_FILE) else None)
        if previous is not None:
            if ranks.first:
                _repair_beside_weights(stage, previous, memory, rows)
            return previous.facts
        held_out = None
        if validates:
            scores = ranks.once(lambda: _base_scores(stage, rows, base_model, memory.tap, config))
            read = None
            if memory.tap is not None:
                read = stored_activations(load_array(stage.path / _HELD_OUT, np.float16, (None, None), mapped=True))
            held_out = HeldOut(rows.validation, scores, read)
        learned = rows.train if store is None or store.keys is None else WithActivations(rows.train, store.keys)
        if through_mixture:
            learned = WithBase(learned, ranks.once(lambda: _base_rows(rows, base, base_model, config)))
        checkpoints = stage.path / _CHECKPOINTS
        arguments.output_dir = str(checkpoints)
        trainer = MemoryTrainer(
            memory,
            arguments,
            rows=learned,
            kl_weight=config.kl_weight,
            mixture_share=config.mixture_share if through_mixture else 0.0,
            held_out=held_out,
            batch_tokens=config.batch_tokens,
            online=TapReader(base_model, memory.tap) if memory.tap is not None and store is None else None,
            due=Due(keep_seconds),
            on_saved=say_kept,
        )
        del base_model  # where nothing reads it online, its memory is free for training
        _train(trainer, ranks.once(lambda: last_whole_checkpoint(checkpoints)))
        trainer.check_weights()
        memory.train_beside_base(False)
        facts = _facts(trainer, rows, memory, config) | {"computed_in": settled}
        memory.merge_adapters()
        if ranks.first:
            _save(stage, memory, rows, facts)
        return facts

    return Plan(spec, work)


def _save(stage: Stage, memory: Memory, rows: TrainingData, facts: dict[str, Any], below: str = "") -> None:
    """Write weights, settings, tokenizer and card to the stage's folder, or one in it."""
    best = facts["validation"]["best"] if "validation" in facts else {}
    memory.settings = memory.settings.model_copy(
        update={"mix_weight": best.get("mix_weight"), "validated_with": stage.sources["base"] if best else None}
    )
    memory.save_pretrained(stage.path / below)
    rows.tokenizer.save_pretrained(stage.path / below)
    card = memory_card(memory.settings, facts, stage.sources, stage.spec.config)
    stage.save_text(str(Path(below) / CARD_FILE), card)


def _repair_beside_weights(stage: Stage, previous: Manifest, memory: Memory, rows: TrainingData) -> None:
    """Make again what does not depend on the weights; `memory` is untrained, and its weights are left behind."""
    memory.merge_adapters()
    _save(stage, memory, rows, previous.facts, _ASIDE)
    for name in previous.payload:
        if not stage.has(name) and stage.has(f"{_ASIDE}/{name}"):
            (stage.path / _ASIDE / name).replace(stage.path / name)
    stage.remove(_ASIDE)


def check_start(config: TrainConfig, *, init: str | None, base: str | None, block_size: int) -> tuple[str, bool]:
    """The base, and whether `init` is a memory to go on with; reads configs only, no data and no weights.

    Raises:
        ConfigError: init or base is missing, or a setting does not fit them.
        ModelError: init cannot be reached.
    """
    kind = memory_class(config.start.kind)
    there = read_settings(init) if init is not None else None
    if there is not None and there.kind != kind.kind:
        raise ConfigError(f"init = {init!r} is a memory of kind {there.kind}; add --kind {there.kind}")
    kind.check_start(config.start, init=init, goes_on=there is not None, block_size=block_size)
    if base is None and (init is None or kind.reads_base):
        raise ConfigError("base is missing: name the model that the memory will stand beside (--base)")
    return base or str(init), there is not None


def _check_init(rows: TrainingData, init: str) -> None:
    """Raise unless start model or memory has the data's tokenizer."""
    there = read_settings(init)
    if there is None or there.tap is None:
        rows.check_read_by(init, "init")
    elif there.tokenizer != rows.manifest.tokenizer:
        raise TokenizerMismatchError(f"{rows.folder} and init {init} have different tokenizers; {ADVICE}")


def _stored_activations(rows: TrainingData, base: str, activations: str | Path, config: TrainConfig) -> Datastore:
    """The datastore of `activations`, checked but for its tap, which only the loaded base tells."""
    if not memory_class(config.start.kind).reads_base:
        raise ConfigError(f"activations: a memory of kind {config.start.kind} reads no base; leave --activations out")
    store = Datastore(activations)
    if not store.config.keep_keys:
        raise ArtifactError(f"activations {activations}: the datastore kept no keys; train online, without them")
    if store.corpus.manifest.hash != rows.corpus_hash:
        raise ArtifactError(f"activations {activations} are of another corpus than {rows.folder}")
    if store.manifest.inputs["teacher"] != model_identity(base):
        raise ArtifactError(f"activations {activations} are of {store.teacher}, not of base {base}")
    return store


def _start(rows: TrainingData, init: str | None, goes_on: bool, base: PreTrainedModel, config: TrainConfig) -> Memory:
    """The memory before its training, in float32."""
    shared: dict[str, Any] = {
        "vocab_size": min(rows.vocab_size, base.config.get_text_config(decoder=True).vocab_size),
        "context_length": rows.corpus_config.block_size,
        "tokenizer": rows.manifest.tokenizer,
    }
    if goes_on and not config.start.given():
        assert init is not None
        memory = load_memory(init, dtype=torch.float32, with_head=False)  # fitted for the old weights
        memory.check_base(base)
        shared["vocab_size"] = min(shared["vocab_size"], memory.vocab_size)
        memory.settings = memory.settings.model_copy(update=shared)
        memory.set_window(shared["context_length"])
        return memory
    kind = memory_class(config.start.kind)
    settings = MemorySettings(kind=kind.kind, **shared)
    return kind.start(config.start, settings, init=init, base=base, seed=config.seed).float()


def _base_rows(rows: TrainingData, base: str, model: PreTrainedModel, config: TrainConfig) -> Path:
    """Where the base's log-probs on the training rows are."""
    return base_on_rows(rows, base, dtype=model.dtype, batch_tokens=config.batch_tokens, load_base=lambda: model)


def _base_scores(
    stage: Stage, rows: TrainingData, base: PreTrainedModel, tap: str | None, config: TrainConfig
) -> NDArray[np.float32]:
    """The base's label log-probs on the validation blocks; what it reads there at a tap is left on disk."""
    scorers = Scorers(
        stage.sources["base"],
        {},
        vocab_size=rows.vocab_size,
        dtype=base.dtype,
        batch_tokens=config.batch_tokens,
        load_base=lambda: base,
    )
    blocks = rows.validation
    text = Text(rows.corpus_hash, "validation", blocks, rows.manifest.tokenizer, str(rows.folder))
    label = finite(scorers.score(text)["base"].label, stage.sources["base"], "validation")
    if tap is not None and not stage.has(_HELD_OUT):
        with progress_bar(len(label), f"reading the validation text at {tap}") as bar:
            reader, numbers = TapReader(base, tap), range(len(blocks))
            keys = read_keys(reader, blocks, numbers, batch_tokens=config.batch_tokens, progress=bar.update)
        stage.save_array(_HELD_OUT, keys)
    return label


def _train(trainer: MemoryTrainer, checkpoint: str | None) -> None:
    if checkpoint is not None:
        trainer.go_on_from(Path(checkpoint))
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except (RuntimeError, ConnectionError, EOFError) as error:
        told = _dead_worker(error)
        if told is None:
            raise
        raise TrainingError(
            f"{told}; where memory ran out lower trainer.dataloader_num_workers, then the same"
            " command goes on at the last checkpoint"
        ) from None


def _dead_worker(error: Exception) -> str | None:
    """What torch says of a worker that died, which may come a moment after its connection broke; None: none died."""
    if not isinstance(error, RuntimeError):
        try:
            time.sleep(2)  # ends as soon as torch is told by its signal
        except RuntimeError as told:
            error = told
    return str(error).splitlines()[0] if "DataLoader worker" in str(error) else None


def _targets_in_force(targets: Manifest) -> dict[str, Any]:
    """Settings that targets were made with, those that were chosen from the data included."""
    chosen = ("target_temperature", "teacher_share")
    return targets.config | {name: targets.facts[name] for name in chosen if targets.facts.get(name)}


def _facts(trainer: MemoryTrainer, rows: TrainingData, memory: Memory, config: TrainConfig) -> dict[str, Any]:
    validated = [entry for entry in trainer.state.log_history if "eval_mixture_perplexity" in entry]
    history = [
        {
            "step": entry["step"],
            "epoch": round(entry["epoch"], 4),
            "memory_perplexity": round(entry["eval_memory_perplexity"], 4),
            "mixture_perplexity": round(entry["eval_mixture_perplexity"], 4),
            "mix_weight": entry["eval_mix_weight"],
        }
        for entry in validated
    ]
    facts: dict[str, Any] = {
        "parameters": sum(p.numel() for p in memory.parameters()),
        "steps": trainer.state.global_step,
        "epochs": round(float(trainer.state.epoch or 0), 4),
        "corpus": rows.corpus_facts,
        "targets": {k: v for k, v in rows.manifest.facts.items() if k.startswith(("mean_", "label_"))},
        "targets_config": _targets_in_force(rows.manifest) if rows.manifest.kind == "targets" else None,
        "training": [
            {k: entry[k] for k in _LOGGED if k in entry} for entry in trainer.state.log_history if "loss" in entry
        ],
    }
    trained = sum(p.numel() for p in memory.parameters() if p.requires_grad)
    if trained < facts["parameters"]:
        facts |= {"parameters": sum(p.numel() for p in memory.own_parameters()), "trained_parameters": trained}
    if history:
        judged = [entry[f"eval_{config.keep}_perplexity"] for entry in validated]
        best = int(np.argmin(judged))  # the first, as the Trainer's
        facts["validation"] = {
            "base_perplexity": round(trainer.base_perplexity, 4),
            "best": history[best],
            "history": history,
        }
    return facts
