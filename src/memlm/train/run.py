"""The train stage: rows and a start model to a memory folder."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from memlm.artifacts import Manifest, open_stage, partial_path, read_manifest
from memlm.errors import ConfigError
from memlm.memory.card import CARD_FILE, memory_card
from memlm.memory.decoder import MemoryDecoder
from memlm.memory.protocol import MemorySettings
from memlm.mix.scoring import as_voter, score
from memlm.models.loading import (
    chosen_layers,
    default_device,
    fresh_model,
    keep_layers,
    load_causal_lm,
    load_config,
    model_identity,
    parse_dtype,
)
from memlm.progress import progress_bar
from memlm.train.config import TrainConfig
from memlm.train.data import TrainingData
from memlm.train.trainer import MemoryTrainer, last_whole_checkpoint, training_arguments


def train_memory(
    data: str | Path, *, init: str, out: str | Path, base: str | None = None, config: TrainConfig | None = None
) -> Manifest:
    """Train a Memory Decoder and write it to `out`, with its card.

    With `kl_weight` 0 this is plain fine-tuning: it makes a teacher, or the twin that a memory is compared with.

    Args:
        data: Folder of the targets stage; at `kl_weight` 0 a corpus will do.
        init: Start model: path, hub id or packaged name.
        out: Folder to write; an interrupted run goes on at its last whole checkpoint.
        base: Base whose mixture with the memory is validated; `init` if None.
        config: Default settings if None.

    Raises:
        ConfigError: Targets are wanted and `data` is a corpus; a layer or a training argument does not exist.
        TokenizerMismatchError: `init` or `base` has another tokenizer than `data`.
        TrainingError: The loss or a gradient is not finite; the step is named.
    """
    config = config or TrainConfig()
    rows = TrainingData(data, with_targets=config.kl_weight > 0)
    base = base or init
    _check(rows, init, config)
    rows.check_read_by(base, "base")
    device = default_device()
    dtype = parse_dtype(config.dtype, device)
    if dtype == torch.float16:
        raise ConfigError("dtype = 'float16': train in bfloat16 or float32")
    validation = rows.validation if len(rows.validation) else None
    batches = math.ceil(len(rows.train) / config.batch_size)
    arguments = training_arguments(
        config,
        partial_path(out) / "checkpoints",
        steps_per_epoch=math.ceil(batches / config.accumulation),
        bf16=dtype == torch.bfloat16,
        use_cpu=device.type == "cpu",
        validate=validation is not None,
    )
    with open_stage(
        out,
        "memory",
        config=config.model_dump(),
        inputs={"data": rows.manifest.hash, "init": model_identity(init), "base": model_identity(base)},
        tokenizer=rows.manifest.tokenizer,
        sources={**rows.manifest.sources, "data": str(data), "init": init, "base": base},
    ) as stage:
        if stage.finished:
            return read_manifest(out, "memory")
        base_scores = _base_scores(rows, base, dtype, config.batch_tokens) if validation is not None else None
        torch.manual_seed(config.seed)
        memory = MemoryDecoder(
            _start_model(init, config).float(),
            MemorySettings(
                kind="decoder",
                vocab_size=rows.vocab_size,
                context_length=rows.corpus_config.block_size,
                tokenizer=rows.manifest.tokenizer,
            ),
        )
        trainer = MemoryTrainer(
            memory,
            arguments,
            rows=rows.train,
            kl_weight=config.kl_weight,
            validation=validation,
            base_scores=base_scores,
            batch_tokens=config.batch_tokens,
        )
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(stage.path / "checkpoints"))
        facts = _facts(trainer, rows, memory, config)
        best = facts["validation"]["best"] if validation is not None else {}
        memory.settings = memory.settings.model_copy(
            update={"mix_weight": best.get("mix_weight"), "validated_with": base if best else None}
        )
        memory.save_pretrained(stage.path)
        rows.tokenizer.save_pretrained(stage.path)
        stage.save_text(CARD_FILE, memory_card(memory.settings, facts, stage.sources, config.model_dump()))
        return stage.finish(facts, intermediate=("checkpoints",))


def _check(rows: TrainingData, init: str, config: TrainConfig) -> None:
    rows.check_read_by(init, "init")
    text_config = load_config(init).get_text_config()
    if config.layers is not None:
        chosen_layers(config.layers, text_config.num_hidden_layers)
    longest = getattr(text_config, "max_position_embeddings", None)
    if longest and rows.corpus_config.block_size > longest:
        raise ConfigError(
            f"block_size = {rows.corpus_config.block_size} of {rows.folder} is above the {longest} of {init}"
        )


def _start_model(init: str, config: TrainConfig) -> PreTrainedModel:
    if config.fresh:
        return fresh_model(load_config(init), config.layers, config.seed)
    model = load_causal_lm(init, dtype=torch.float32)
    return model if config.layers is None else keep_layers(model, config.layers)


def _base_scores(rows: TrainingData, base: str, dtype: torch.dtype, batch_tokens: int) -> Any:
    model = as_voter(load_causal_lm(base, dtype=dtype).to(default_device()), rows.vocab_size)  # type: ignore[arg-type]
    with progress_bar(int(rows.validation.lengths.sum()), "base on validation") as bar:
        return score(model, rows.validation, batch_tokens=batch_tokens, progress=bar.update)["label"]


def _facts(trainer: MemoryTrainer, rows: TrainingData, memory: MemoryDecoder, config: TrainConfig) -> dict[str, Any]:
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
        "targets": {k: v for k, v in rows.manifest.facts.items() if k.startswith("mean_")},
        "targets_config": rows.manifest.config if rows.manifest.kind == "targets" else None,
        "training": [
            {k: entry[k] for k in ("step", "loss", "kl_nats", "cross_entropy_nats", "grad_norm")}
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
    }
    if history:
        best = int(np.argmin([entry["eval_mixture_perplexity"] for entry in validated]))  # the first, as the Trainer's
        facts["validation"] = {"best": history[best], "history": history}
    return facts
