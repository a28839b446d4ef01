"""What a training step and a decoded token wait for: the device's work, or the host that launches it."""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer, TrainerCallback

from benchmarks.models import llama_config, random_model, random_tokens, tiny_config
from benchmarks.report import bar_line
from benchmarks.timing import synchronize
from benchmarks.training_step import Clock, new_trainer, write_targets
from memlm.evaluate.decoding import decode
from memlm.memory.decoder import MemoryDecoder
from memlm.memory.protocol import MemorySettings
from memlm.mix.mixed_lm import MixedLM
from memlm.models.loading import default_device, default_dtype
from memlm.train.config import TrainConfig
from memlm.train.trainer import training_arguments

_LAYERS = 15  # half of SmolLM2's
_STATIC = {"cache_implementation": "static"}
_LISTED = 12  # operations that take longest


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """A line per way, without a bar: `ratio` is the device's work over the time that passes.

    Training steps of half of SmolLM2's blocks at 32 rows of 240 tokens: cross-entropy, distillation, and on an
    accelerator the first compiled; decoded tokens of a base of SmolLM2's shape alone and beside such a memory, with
    dynamic and with static caches.
    `seconds` is measured without the profiler, a step or a token; `device_seconds`, `launches` and what takes longest
    (`host` and `device`: name, seconds, calls) with it. On a CPU the device is the host.
    """
    device = default_device()
    ways = {"cross_entropy": (0.0, {}), "distillation": (0.5, {})}
    if device.type != "cpu" and not quick:
        ways["compiled"] = (0.0, {"torch_compile": True})
    for name, (kl_weight, further) in ways.items():
        yield _line(f"step/{name}", *trained(kl_weight, further, device, quick=quick))
    yield from (_line(f"token/{name}", *found) for name, found in decoded(device, quick=quick).items())


def _line(name: str, seconds: float, told: dict[str, Any]) -> dict[str, Any]:
    ratio = told["device_seconds"] / seconds if seconds else None
    return bar_line(f"where_time_goes/{name}", ratio, seconds=round(seconds, 5), **told)


def trained(
    kl_weight: float, further: dict[str, Any], device: torch.device, *, quick: bool
) -> tuple[float, dict[str, Any]]:
    """Seconds of a training step, and what is in it."""
    config = tiny_config() if quick else llama_config(576, _LAYERS, 9, kv_heads=3, ffn_width=1536)
    rows, length, steps = (2, 16, 4) if quick else (32, 240, 8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.arrow"
        write_targets(path, rows=rows * steps, length=length, vocab_size=config.vocab_size)
        arguments = training_arguments(
            TrainConfig(batch_size=rows, epochs=1, trainer=further),
            Path(folder),
            steps_per_epoch=steps,
            bf16=default_dtype(device) == torch.bfloat16,
            use_cpu=device.type == "cpu",
            validate=False,
        ).set_save(strategy="no")
        side = "distillation" if kl_weight else "fine_tuning"

        def trainer(callback: TrainerCallback) -> Trainer:
            found = new_trainer(side, random_model(config, dtype=torch.float32, device=device), arguments, path)
            found.add_callback(callback)
            return found

        clock, watch = Clock(device), _Profiled(device)
        trainer(clock).train()
        trainer(watch).train()
    ends = clock.ends
    return (ends[-1] - ends[steps // 2]) / (steps - 1 - steps // 2), watch.told


def decoded(device: torch.device, *, quick: bool) -> dict[str, tuple[float, dict[str, Any]]]:
    """Way to seconds of a token, and what is in it; behind static caches an accelerator's steps are compiled."""
    shapes = (tiny_config(), tiny_config()) if quick else (_smollm2(30), _smollm2(_LAYERS))
    base, part = (random_model(shape, dtype=default_dtype(device), device=device) for shape in shapes)
    memory = MemoryDecoder(part, MemorySettings(kind="decoder", vocab_size=base.config.vocab_size))
    prompt, tokens, found = random_tokens(1, 8, base.config.vocab_size, device), 4 if quick else 64, {}
    models, caches = {"base": base, "mixture": MixedLM(base, memory, 0.5)}, {"": {}, "/static": _STATIC}
    for (side, model), (kind, options) in itertools.product(models.items(), caches.items()):
        name = side + kind

        def work(model: Any = model, options: dict[str, Any] = options) -> object:
            return decode(model, prompt, tokens, **options)

        with torch.inference_mode():
            work()
            synchronize(device)
            began = time.perf_counter()
            work()
            synchronize(device)
            seconds = (time.perf_counter() - began) / tokens
            found[name] = seconds, _profiled(work, device, tokens)
    return found


def _smollm2(layers: int) -> Any:
    return llama_config(576, layers, 9, kv_heads=3, ffn_width=1536)


def _profiler(device: torch.device) -> profile:
    also = [] if device.type == "cpu" else [ProfilerActivity.CUDA]
    return profile(activities=[ProfilerActivity.CPU, *also])


def _profiled(work: Callable[[], object], device: torch.device, parts: int) -> dict[str, Any]:
    with _profiler(device) as seen:
        work()
        synchronize(device)
    return _told(seen, device, parts)


def _told(seen: profile, device: torch.device, parts: int) -> dict[str, Any]:
    """What a profile says, by step or token."""
    events = seen.key_averages()
    works = [e for e in events if e.device_type != DeviceType.CPU and not e.is_user_annotation]
    sides: dict[str, tuple[list[Any], str]] = {"host": (list(events), "self_cpu_time_total")}
    if device.type != "cpu":  # an operation has the time of the kernels that it launched, too
        sides["device"] = works, "self_device_time_total"
    took, key = sides.get("device", sides["host"])
    launches = sum(e.count for e in events if ("LaunchKernel" if "device" in sides else "aten::") in e.key)
    longest = {
        name: [
            [e.key, round(getattr(e, key) / parts / 1e6, 6), round(e.count / parts, 1)]
            for e in sorted(of, key=lambda e: -getattr(e, key))[:_LISTED]
        ]
        for name, (of, key) in sides.items()
    }
    seconds = sum(getattr(e, key) for e in took) / 1e6
    return {"device_seconds": round(seconds / parts, 6), "launches": round(launches / parts), **longest}


class _Profiled(TrainerCallback):
    """Profiles the last two steps."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._seen = device, _profiler(device)
        self.told: dict[str, Any] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize(self._device)
        if state.global_step == state.max_steps - 2:
            self._seen.__enter__()
        elif state.global_step == state.max_steps:
            self._seen.__exit__(None, None, None)
            self.told = _told(self._seen, self._device, 2)
