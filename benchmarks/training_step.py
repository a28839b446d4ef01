"""A distillation step costs what a fine-tuning step does, and that what transformers' own Trainer takes."""

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks.models import llama_config, parameter_count, random_model, tiny_config
from benchmarks.report import bar_line, prove
from benchmarks.timing import Timing, synchronize
from memlm.memory.decoder import MemoryDecoder
from memlm.models.loading import default_device, default_dtype
from memlm.targets.shards import TRAIN_SCHEMA, write_rows
from memlm.train.config import TrainConfig
from memlm.train.data import TargetRows, collate
from memlm.train.trainer import MemoryTrainer, training_arguments

DISTILLATION_BAR = 1.05
FINE_TUNING_BAR = 1.02
_LAYERS = 10  # of SmolLM2's shape, a memory as the README trains it
_SUPPORT = 64
_LOSS_TOLERANCE = 2e-3  # relative; bfloat16 steps by 2**-8, but a loss is the mean over hundreds of positions


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """Two lines: distillation over fine-tuning (`kl_weight` 0), and fine-tuning over transformers' Trainer.

    Every round trains the same model on the same batches with the same arguments, once by each side. A step is timed
    from the end of the one before, so reading and collating rows, clipping, the optimizer and the log are in it.
    """
    sizes: dict[str, int] = {"batch": 2, "length": 16, "steps": 2, "rounds": 1} if quick else {}
    found, timing = measure(quick, **sizes)
    for above, below, bar in (
        ("distillation", "fine_tuning", DISTILLATION_BAR),
        ("fine_tuning", "transformers", FINE_TUNING_BAR),
    ):
        yield bar_line(
            f"training_step/{above}",
            timing.ratio(above, below),
            at_most=bar,
            judged=not quick,
            spread=timing.spread(above, below),
            against=below,
            **{f"{side}_step_seconds": round(timing.median(side), 4) for side in (above, below)},
            **found,
        )


def measure(
    tiny: bool, *, batch: int = 4, length: int = 512, steps: int = 4, rounds: int = 5
) -> tuple[dict[str, Any], Timing]:
    """Seconds of a step by each side, the median of each round.

    Args:
        tiny: Train a tiny model, for runs whose timings are not judged.
        batch: Rows of a step.
        length: Tokens of a row.
        steps: Timed steps of a side per round; one before them sets up the optimizer.
        rounds: How often each side is timed.

    Raises:
        WrongAnswerError: The sides do not train alike: their losses differ at a step.
    """
    device = default_device()
    config = tiny_config() if tiny else llama_config(576, _LAYERS, 9, kv_heads=3, ffn_width=1536)
    seconds: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.arrow"
        write_targets(path, rows=batch * (steps + 1), length=length, vocab_size=config.vocab_size)
        arguments = training_arguments(
            TrainConfig(batch_size=batch, epochs=1, trainer={"logging_steps": 1}),
            Path(folder),
            steps_per_epoch=steps + 1,
            bf16=default_dtype(device) == torch.bfloat16,
            use_cpu=device.type == "cpu",
            validate=False,
        ).set_save(strategy="no")  # a checkpoint would be in the step's time
        for _ in range(rounds):
            for side in ("distillation", "fine_tuning", "transformers"):
                model = random_model(config, dtype=torch.float32, device=device)  # of one seed
                trainer = new_trainer(side, model, arguments, path)
                clock = Clock(device)
                trainer.add_callback(clock)
                trainer.train()
                seconds.setdefault(side, []).append(clock.median())
                key = "cross_entropy_nats" if side == "distillation" else "loss"
                losses[side] = [entry[key] for entry in trainer.state.log_history if key in entry]
            _prove_losses(losses)
    found = {
        "parameters": parameter_count(random_model(config, dtype=torch.float32, device=torch.device("meta"))),
        "dtype": "bfloat16" if arguments.bf16 else "float32",
        "batch": batch,
        "length": length,
        "support": _SUPPORT,
        "steps": steps,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
    }
    return found, Timing(seconds)


def new_trainer(side: str, model: Any, arguments: TrainingArguments, path: Path) -> Trainer:
    """The trainer of a side, distillation, fine_tuning or transformers, on rows that `write_targets` wrote."""
    rows = TargetRows([path], with_targets=side == "distillation")
    if side == "transformers":
        plain = _PlainTrainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)  # type: ignore[arg-type]
        plain.remove_callback(PrinterCallback)
        return plain
    return MemoryTrainer(
        MemoryDecoder(model),
        arguments,
        rows=rows,
        kl_weight=0.5 if side == "distillation" else 0.0,
        held_out=None,
        batch_tokens=1,
    )


class _PlainTrainer(Trainer):
    """transformers' own, with the order of rows of `MemoryTrainer`."""

    _rows = property(lambda self: self.train_dataset)
    _get_train_sampler = MemoryTrainer._get_train_sampler  # type: ignore[assignment]


class Clock(TrainerCallback):
    """Times from the end of a step to the end of the next."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize(self._device)
        self.ends.append(time.perf_counter())

    def median(self) -> float:
        """Seconds of the middle step."""
        return statistics.median(np.diff(self.ends).tolist())


def write_targets(path: Path, *, rows: int, length: int, vocab_size: int) -> None:
    """Random rows, whose first token is not predicted, and targets of all others."""
    rng = np.random.default_rng(0)
    support = min(_SUPPORT, vocab_size)
    counts = np.full(length, support, np.int32)
    counts[0] = 0
    probs = np.full((length - 1) * support, 1 / support, np.float16)

    def row() -> dict[str, Any]:
        tokens = rng.integers(vocab_size, size=length, dtype=np.int32)
        ids = (rng.integers(vocab_size, size=(length - 1, 1)) + np.arange(support)) % vocab_size
        target = {"target_counts": counts, "target_ids": ids.ravel().astype(np.int32), "target_probs": probs}
        return {"input_ids": tokens, **target}

    write_rows(path, TRAIN_SCHEMA, (row() for _ in range(rows)))


def _prove_losses(losses: dict[str, list[float]]) -> None:
    plain, reference = losses["fine_tuning"], losses["transformers"]
    prove(abs(len(plain) - len(reference)), 0, "number of steps")
    off = max(abs(a / b - 1) for a, b in zip(plain, reference, strict=True))
    prove(off, _LOSS_TOLERANCE, "loss of fine-tuning at a step")
    prove(abs(losses["distillation"][0] / plain[0] - 1), _LOSS_TOLERANCE, "cross-entropy of distillation at the start")
