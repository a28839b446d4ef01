"""`MemoryTrainer`: transformers' Trainer with the sparse loss and validation by the mixture."""

import dataclasses
import math
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch
from accelerate.utils import broadcast_object_list, gather_object
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

from memlm.config import nearest
from memlm.corpus.blocks import Blocks
from memlm.errors import ArtifactError, ConfigError, ModelError, TrainingError, reason_of
from memlm.files import file_digest, flush_to_disk, read_json, write_json, written_whole
from memlm.memory.protocol import Memory, check_finite
from memlm.models.taps import TapReader
from memlm.parts import Due
from memlm.progress import progress_bar
from memlm.scores.mixtures import best_mix_weight, perplexity
from memlm.scores.score import ReadActivations, score
from memlm.train.config import TrainConfig
from memlm.train.data import LengthGroupedSampler, Rows, Share, WithBlank, collate
from memlm.train.fields import ALLOWED, REFUSED

_WHOLE = "whole"  # the last file of a checkpoint, made when the others are on disk: their names and checksums
_SINCE_LOG = "since_log.json"  # sums of every process since the last log
_RESUMABLE = ("optimizer*", "scheduler*", "rng_state*", TRAINER_STATE_NAME, _SINCE_LOG)  # beside the weights
_MARK_BYTES = 1 << 24
_ADVICE = "lower --learning-rate, or train with --dtype float32"


def check_trainer_fields(config: TrainConfig, where: str = "") -> None:
    """Raise unless `config.trainer` names fields of `TrainingArguments` that memlm takes.

    Raises:
        ConfigError: Otherwise; the message says why.
    """
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for name in config.trainer:
        if name not in known:
            raise ConfigError(f"unknown setting '{where}trainer.{name}'{nearest(name, known)}")
        if name not in ALLOWED:
            raise ConfigError(f"{where}trainer.{name}: {REFUSED.get(name, 'not known to this version of memlm')}")


def training_arguments(
    config: TrainConfig, folder: Path, *, steps_per_epoch: int, bf16: bool, use_cpu: bool, validate: bool
) -> TrainingArguments:
    """`TrainingArguments` for `config`, writing checkpoints to `folder`.

    Raises:
        ConfigError: `config.trainer` names a field that they do not have, or gives it a value that they refuse.
    """
    check_trainer_fields(config)
    every = max(1, min(steps_per_epoch // config.validations, config.max_steps or steps_per_epoch))
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.schedule,
        "warmup_steps": config.warmup,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "bf16": bf16,
        "use_cpu": use_cpu,
        "seed": config.seed,
        "eval_strategy": "steps" if validate else "no",
        "eval_steps": every,
        "save_steps": every,
        "save_total_limit": 2,
        "load_best_model_at_end": validate,
        "metric_for_best_model": f"{config.keep}_perplexity" if validate else None,
        "greater_is_better": False if validate else None,
        "logging_steps": 10,
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "dataloader_pin_memory": not use_cpu,
        "accelerator_config": {"non_blocking": not use_cpu},
        "ddp_find_unused_parameters": False,
        "disable_tqdm": True,
        "report_to": "none",
    }
    try:
        arguments = TrainingArguments(**{**settings, **config.trainer})
        compute_in(arguments, bf16=bf16)
        arguments._n_gpu = min(arguments.n_gpu, 1)  # a launcher takes more; replicas would cut rows at wrong places
        _try_out(arguments)
    except (AttributeError, LookupError, TypeError, ValueError, ImportError, RuntimeError) as error:
        raise ConfigError(f"trainer = {config.trainer}: {reason_of(error)}") from None
    return arguments


def compute_in(arguments: TrainingArguments, *, bf16: bool) -> None:
    """Let the forward passes run in bfloat16 or in the weights' float32, whatever a launcher's environment says."""
    arguments.bf16, arguments.mixed_precision = bf16, "bf16" if bf16 else "no"


def _try_out(arguments: TrainingArguments) -> None:
    """Raise what the arguments' loggers, data loader, optimizer and schedule would raise once training starts."""
    arguments.get_process_log_level()
    if "tensorboard" in (arguments.report_to or ()) and not os.environ.get("TENSORBOARD_LOGGING_DIR"):
        raise ValueError("tensorboard would write beside the checkpoints, which go: set TENSORBOARD_LOGGING_DIR")
    for callback in get_reporting_integration_callbacks(arguments.report_to):
        callback()
    if arguments.fsdp and arguments.world_size == 1:
        raise ValueError("fsdp splits a memory over several processes; start them with accelerate launch")
    DataLoader(
        [0],  # type: ignore[arg-type]
        num_workers=arguments.dataloader_num_workers,
        pin_memory=arguments.dataloader_pin_memory,
        persistent_workers=arguments.dataloader_persistent_workers,
        prefetch_factor=arguments.dataloader_prefetch_factor,
        multiprocessing_context=arguments.dataloader_multiprocessing_context,
    )
    model = nn.Sequential(nn.Linear(1, 1))
    if arguments.optim_target_modules is None:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, cast(Any, model))
        kind(model.parameters(), **options)
    get_scheduler(
        arguments.lr_scheduler_type,
        torch.optim.SGD(model.parameters()),
        num_warmup_steps=0,
        num_training_steps=1,
        scheduler_specific_kwargs=dict(cast(Any, arguments.lr_scheduler_kwargs) or {}),
    )


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What a memory is validated on."""

    blocks: Blocks
    base_scores: NDArray[np.float32]
    """The base's label log-probs on them."""
    activations: ReadActivations | None
    """Where a memory with a tap gets the base's on them."""


class MemoryTrainer(Trainer):
    """Trains a memory on rows with or without targets.

    The memory's own `forward` gives the summed loss; here it is divided by the positions of the whole optimizer step,
    so gradient accumulation is exact.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        memory: Memory,
        args: TrainingArguments,
        *,
        rows: Rows,
        kl_weight: float,
        mixture_share: float = 0.0,
        held_out: HeldOut | None,
        batch_tokens: int,
        online: TapReader | None = None,
        due: Due | None = None,
        on_saved: Callable[[int, int], object] = lambda step, steps: None,
    ) -> None:
        """
        Args:
            args: From `training_arguments`.
            kl_weight: In [0, 1].
            mixture_share: Of the mixture in the loss; above 0 rows are `WithBase`.
            held_out: None: no validation.
            batch_tokens: Tokens in one forward pass of validation.
            online: Reads the frozen base inside the step, for a memory with a tap whose rows hold no activations.
            due: When to save a checkpoint between validations.
            on_saved: Told after which step of how many a checkpoint was saved.
        """
        self._online = online
        self._rows = rows
        self._kl_weight = kl_weight
        self._held_out = held_out
        self._batch_tokens = batch_tokens
        self._due = due or Due()
        self._on_saved = on_saved
        self._mixture_share = mixture_share
        self._sums = torch.zeros(5)  # loss, KL, cross-entropy, that of the mixture, positions since the last log
        self._bad_step = torch.full((), math.inf)
        super().__init__(
            model=memory,
            args=args,
            train_dataset=WithBlank(rows) if args.world_size > 1 else rows,
            eval_dataset=rows if held_out is not None else None,  # never read: `evaluate` is our own
            data_collator=collate,  # type: ignore[arg-type]
        )
        self.model_accepts_loss_kwargs = True  # so that positions of the whole step are counted
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(_AroundCheckpoints(held_out is not None, self._due))
        self._bar = _TokenBar(int(rows.position_starts[-1]), len(rows))
        self.add_callback(self._bar)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        rows = self.args.per_device_train_batch_size * self.args.world_size  # of one forward pass on every rank
        step_rows = rows * self.args.gradient_accumulation_steps
        fill_to = rows if self.args.world_size > 1 else 1
        return LengthGroupedSampler(self._rows.lengths, step_rows, self.args.seed, fill_to=fill_to)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if self._online is not None:
            activations = self._online.read(inputs["input_ids"]).flatten(0, 1)[inputs["places"]]
            inputs = inputs | {"activations": activations}
        try:
            found = model(**inputs, kl_weight=self._kl_weight, mixture_share=self._mixture_share)
        except (ValueError, TypeError, LookupError, AttributeError, NotImplementedError) as error:  # a model's own code
            raise TrainingError(f"the memory cannot be trained on such rows: {reason_of(error)}") from error
        positions = len(inputs["places"])
        self._bar.advance(positions)
        shared = num_items_in_batch if num_items_in_batch is not None else positions
        loss = found.loss / (shared.clamp(min=1) if isinstance(shared, Tensor) else max(1, shared))  # none: a loss of 0
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # undo the mean that data parallelism takes
        self._sums = self._sums.to(loss.device) + torch.stack(
            [found.loss.detach(), found.kl, found.cross_entropy, found.mixture, torch.full_like(found.kl, positions)]
        )
        bad = torch.where(torch.isfinite(loss.detach()), math.inf, float(self.state.global_step + 1))
        self._bad_step = torch.minimum(self._bad_step.to(loss.device), bad)
        return (loss, found) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            *sums, positions = self.accelerator.reduce(self._sums, "sum").tolist()  # type: ignore[union-attr]
            self._sums = torch.zeros_like(self._sums)
            # the Trainer's own mean starts anew where a run is resumed
            loss, kl, cross_entropy, mixture = (part / max(positions, 1) for part in sums)
            logs |= {"loss": loss, "kl_nats": kl, "cross_entropy_nats": cross_entropy}
            if self._mixture_share:
                logs["mixture_nats"] = mixture
            self._stop_if_not_finite(logs)
        super().log(logs, start_time)

    def _stop_if_not_finite(self, logs: dict[str, float]) -> None:
        bad_step = min(gather_object([float(self._bad_step)]))
        if math.isfinite(bad_step):
            raise TrainingError(f"the loss is not finite in step {int(bad_step)}; {_ADVICE}")
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            raise TrainingError(f"the gradient overflowed by step {self.state.global_step}; {_ADVICE}")

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Perplexity on the validation blocks: the memory alone, and its best mixture with the base.

        Each rank scores its share of the blocks.
        """
        assert self._held_out is not None
        blocks, base_scores = self._held_out.blocks, self._held_out.base_scores
        self._stop_if_not_finite({})
        memory = self.accelerator.unwrap_model(self.model)
        memory.eval()
        with self.compute_loss_context_manager():
            try:
                found = score(
                    {"memory": memory},
                    Share(blocks, self.args.process_index, self.args.world_size),
                    stored=self._held_out.activations,
                    batch_tokens=self._batch_tokens,
                )
            except ModelError:
                step = self.state.global_step
                raise TrainingError(f"the memory after step {step} gives no finite scores; {_ADVICE}") from None
        scores = found["memory"].label
        if self.args.world_size > 1:
            shares, scores = gather_object([scores]), np.empty_like(base_scores)
            for rank, label in enumerate(shares):
                scores[Share(blocks, rank, self.args.world_size).positions] = label
        if bad := int(np.count_nonzero(np.isnan(scores) | (scores == np.inf))):
            raise TrainingError(
                f"the memory after step {self.state.global_step} gives no finite score at {bad:,} of {len(scores):,}"
                f" validation positions; {_ADVICE}"
            )
        weight, mixture = best_mix_weight(base_scores, scores)
        metrics = {
            "eval_memory_perplexity": perplexity(scores),
            "eval_mixture_perplexity": mixture,
            "eval_mix_weight": weight,
            "eval_base_perplexity": self.base_perplexity,
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @property
    def base_perplexity(self) -> float:
        """Of the base alone on the validation blocks."""
        assert self._held_out is not None
        return perplexity(self._held_out.base_scores)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # the Trainer looks for the end after a step only, so a run stopped after its last step would take one more
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def check_weights(self) -> None:
        """Raise unless the last update left weights that are finite.

        Raises:
            TrainingError: It did not.
        """
        try:
            check_finite(self.accelerator.unwrap_model(self.model), f"the memory after step {self.state.global_step}")
        except ModelError as error:
            raise TrainingError(f"{error}; {_ADVICE}") from None

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        if self.args.should_save and (fault := _fault(Path(best))):
            raise ArtifactError(f"{best} {fault}; run the same command again, it makes what is missing")
        super()._load_best_model()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint and mark it as whole; only then may older ones go."""
        self._stop_if_not_finite({})
        self.check_weights()
        folder = Path(str(self.args.output_dir))
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        with self._due.keeping(), written_whole(folder):
            super()._save_checkpoint(model, trial)
            since_log = gather_object([self._sums.tolist()])
            if self.args.should_save:
                checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
                write_json(checkpoint / _SINCE_LOG, since_log)
                _mark_whole(checkpoint)
                rotate_checkpoints(str(folder), keep, self.state.best_model_checkpoint)
        self.args.save_total_limit = keep
        self.accelerator.wait_for_everyone()
        self._on_saved(self.state.global_step, self.state.max_steps)

    def go_on_from(self, checkpoint: Path) -> None:
        """Take over what the run that saved `checkpoint` had summed up for its next log."""
        since_log = read_json(checkpoint / _SINCE_LOG)
        self._sums = torch.tensor(since_log[self.args.process_index])

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        assert isinstance(self.model, nn.Module)
        state = state_dict or self.model.state_dict()
        seen: set[int] = set()
        separate = {}
        for name, tensor in state.items():  # safetensors refuses tensors that share memory, as tied embeddings do
            separate[name] = tensor.contiguous() if tensor.data_ptr() not in seen else tensor.clone()
            seen.add(tensor.data_ptr())
        safetensors.torch.save_file(separate, folder / "model.safetensors", metadata={"format": "pt"})


class _AroundCheckpoints(TrainerCallback):
    """Validates after the last step too, and saves a checkpoint when it is due, besides those of validations.

    What a validation's checkpoint follows is logged before it. One that time decides leaves no trace in the log, for a
    run that is continued gives the bytes of one in a go.
    """

    def __init__(self, validates: bool, due: Due) -> None:
        self._validates, self._due = validates, due

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # the whole folder may have been moved in between, or be a stranger's
        best = state.best_global_step
        state.best_model_checkpoint = f"{args.output_dir}/{PREFIX_CHECKPOINT_DIR}-{best:d}" if best else None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # the best is chosen among what was validated, whatever `save_steps` says
        control.should_save = control.should_save or (self._validates and control.should_evaluate)
        if self._validates and state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True
        control.should_log = control.should_log or control.should_save
        if not control.should_save:
            control.should_save = broadcast_object_list([bool(self._due)])[0]


class _TokenBar(TrainerCallback):
    """Progress in predicted tokens, counted batch by batch, so that speed reads as tokens a second."""

    def __init__(self, positions: int, rows: int) -> None:
        """
        Args:
            positions: Predicted tokens of an epoch.
            rows: Rows of an epoch.
        """
        self._positions, self._rows = positions, rows

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.max_steps > 0:  # as many rows as these steps take, each of the mean length
            step_rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            total = self._positions / self._rows * step_rows * state.max_steps
        else:
            total = self._positions * args.num_train_epochs
        self._world_size = args.world_size
        done = total * state.global_step / max(state.max_steps, 1)
        self._bar = progress_bar(round(total), "training", initial=round(done))

    def advance(self, positions: int) -> None:
        """Count what a batch of this process predicts; those of other processes are as large."""
        self._bar.update(min(positions * self._world_size, self._bar.total - self._bar.n))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:  # an estimate ends with what it was an estimate of
            self._bar.update(self._bar.total - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        named = {"loss": "loss", "eval_mixture_perplexity": "mixture", "eval_base_perplexity": "base"}
        told = {named[key]: f"{value:.3f}" for key, value in (logs or {}).items() if key in named}
        self._bar.set_postfix(told, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()


def _mark_whole(checkpoint: Path) -> None:
    """Leave the mark by which a checkpoint is known as whole, once all of it is on disk."""
    files = [file for file in sorted(checkpoint.rglob("*")) if file.is_file()]
    for file in files:
        flush_to_disk(file)
    write_json(checkpoint / _WHOLE, {str(file.relative_to(checkpoint)): file_digest(file) for file in files})


def _fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None where training can go on from it."""
    if not (checkpoint / _WHOLE).is_file():
        return "was not written whole"
    try:
        held = read_json(checkpoint / _WHOLE, limit=_MARK_BYTES)
        if any(not (checkpoint / name).resolve().is_relative_to(checkpoint.resolve()) for name in held):
            return "names files outside of it"
        rotten = next((n for n, sha256 in dict(held).items() if file_digest(checkpoint / n) != sha256), None)
    except (ArtifactError, OSError, TypeError, ValueError):
        return "lacks files, or its mark is damaged"
    if rotten is not None:
        return f"is damaged: the checksum of its {rotten} is not what was written"
    lacking = next((name for name in _RESUMABLE if not any(checkpoint.glob(name))), None)
    return f"has no {lacking}" if lacking is not None else None


def _fault_of_best(checkpoint: Path) -> str | None:
    """What is wrong with the checkpoint that this one calls the best, which lies beside it."""
    try:
        state = read_json(checkpoint / TRAINER_STATE_NAME, limit=_MARK_BYTES)
    except ArtifactError:
        state = None
    best = state.get("best_global_step") if isinstance(state, dict) else ""
    if not (best is None or (type(best) is int and best >= 0)):
        return "does not say which one is the best"
    other = checkpoint.with_name(f"{PREFIX_CHECKPOINT_DIR}-{best}") if best else checkpoint
    fault = _fault(other) if other != checkpoint else None
    return f"refers to the best one, {other}, which {fault}" if fault is not None else None


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is as it was written, as is the best one that it refers to.

    Others are removed; where one of them had been whole, a warning says so.
    """
    while folder.is_dir() and (found := get_last_checkpoint(str(folder))) is not None:
        checkpoint = Path(found)
        fault = _fault(checkpoint) or _fault_of_best(checkpoint)
        if fault is None:
            return found
        if (checkpoint / _WHOLE).is_file():
            warnings.warn(f"{checkpoint} {fault}; training goes on from the one before it", stacklevel=2)
        shutil.rmtree(checkpoint)
    return None
