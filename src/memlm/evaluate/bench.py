"""How fast a base decodes alone and beside its memories, on the machine at hand."""

import contextlib
import gc
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from memlm.corpus.blocks import IGNORE, Corpus
from memlm.errors import ConfigError, InputError
from memlm.evaluate.config import BenchConfig, PassageConfig
from memlm.evaluate.decoding import decode
from memlm.evaluate.in_context import InContextBase
from memlm.mix.base import BaseVoter
from memlm.mix.drafting import can_draft, drafts_itself
from memlm.mix.gate_config import GateConfig, GateName
from memlm.mix.mixed_lm import MixedLM
from memlm.mix.pace import Pace
from memlm.models.loading import load_on_default_device, longest_context, resolve
from memlm.models.prompts import encode_prompt
from memlm.models.tokenizers import load_tokenizer
from memlm.progress import progress_bar
from memlm.targets.config import RetrievalConfig
from memlm.text import size

IN_CONTEXT = "in-context"
_NAMES = ("base", IN_CONTEXT, "machine")


def bench(
    base: str | PreTrainedModel,
    memories: Mapping[str, Any],
    prompts: Sequence[str],
    *,
    tokenizer: Any = None,
    gate: GateName | GateConfig | None = None,
    retrieval: RetrievalConfig | None = None,
    in_context: str | Path | None = None,
    passages: PassageConfig | None = None,
    config: BenchConfig | None = None,
) -> dict[str, Any]:
    """Time to the first token, tokens a second and peak memory of the base alone and beside each memory.

    All ways take turns, so that what else the machine does falls on all alike. The base alone is transformers' own
    `generate`.

    Args:
        base: Path, hub id or packaged name, or a loaded model.
        memories: Name to folder, hub id or loaded memory; each is timed alone beside the base.
        prompts: Texts; they are taken in turn, `batch_size` at a time.
        tokenizer: The base's if None.
        gate: As `MixedLM` takes it.
        retrieval: How datastores are searched.
        in_context: Corpus folder: the base with a passage of its training text in front is timed too, found by BM25.
        passages: How they are found and read; by default for the latest 32 tokens, and anew every 4, as the paper of
            Memory Decoder has it.
        config: By default if None.

    Returns:
        `base` and each memory's name, each with `tokens_per_s`, `ttft_ms` (time to the first token) and `peak_bytes`
        (its weights and what decoding needs on top; None where the system does not tell), and for memories `ratio`,
        the time per token over the base's. `NAME drafted` is the same by drafts, with `acceptance`, the share of
        drafted tokens that were accepted (None where none were drafted); one prompt at a time, a memory that reads
        tokens and whose fixed weight is known has `NAME drawn` too, which samples. Base and memories have
        `scored_tokens_per_s`, of a text whose labels alone are given probabilities, and memories `scoring_ratio`, its
        time over the base's; not where `score_tokens` is 0. With a corpus there is `in-context`, with no scoring.
        `machine` has device, threads and load.

    Raises:
        InputError: There is no prompt.
        ConfigError: A prompt and the new tokens are more than the base has positions for; a memory has the name of
            another row; bm25s is not installed; passages without a corpus.
        TokenizerMismatchError: The corpus has another tokenizer.
        ModelError: Base or memory gives scores that are not finite.
    """
    config = config or BenchConfig()
    if not prompts:
        raise InputError("there is no prompt to time; give a file with one per line")
    if taken := next((name for name in memories if name in _NAMES), None):
        raise ConfigError(f"a memory cannot be called {taken!r} here, for a row of the report is; choose another name")
    if in_context is None and passages is not None:
        raise ConfigError("settings of passages are given and no corpus to take them from: add --in-context")
    corpus = None if in_context is None else Corpus(in_context)
    if corpus is not None and isinstance(base, str | Path):
        corpus.check_read_by(str(base))
    if tokenizer is None:
        tokenizer = load_tokenizer(resolve(str(base)))
    model: Any = base if isinstance(base, PreTrainedModel) else load_on_default_device(base, config.dtype)
    device = model.device
    batches = _batches(tokenizer, prompts, config)
    longest = longest_context(model.config)
    needed = max(batch.shape[1] for batch in batches) + config.new_tokens
    if longest is not None and needed > longest:
        raise ConfigError(f"{needed} tokens are more than the {longest} of the base: lower prompt_tokens or new_tokens")
    ways: dict[str, tuple[Any, dict[str, Any]]] = {"base": (model, {})}
    paces: dict[str, Pace] = {}
    for name, memory in memories.items():
        mixed = MixedLM.from_pretrained(model, memory={name: memory}, gate=gate, memory_kwargs={"retrieval": retrieval})
        ways[name] = mixed, {}
        if not can_draft(mixed):
            continue
        paces[f"{name} drafted"] = Pace()
        ways[f"{name} drafted"] = mixed, {"drafting": paces[f"{name} drafted"]}
        if mixed.mix_weights and config.batch_size == 1 and drafts_itself(mixed):
            fixed = MixedLM(model, mixed.named_memories(), mixed.mix_weights)
            ways[f"{name} drawn"] = fixed, {"sampled": True, "drawing": True}
    if corpus is not None:
        ways[IN_CONTEXT] = InContextBase(model, corpus, passages), {}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    peaks: dict[str, list[int]] = {name: [] for name in ways}
    with progress_bar(config.rounds * len(ways), "timing", unit="run") as bar:
        for number in range(-1, config.rounds):  # the first round warms up
            batch = batches[number % len(batches)].to(device)
            gc.collect()
            for name, (way, asked) in ways.items():
                if number < 0 and name == "base":
                    decode(way, batch, config.new_tokens, name="the base")
                first, whole, peak = _timed(way, batch, config, asked)
                if number >= 0:
                    times[name].append((first, whole))
                    bar.update(1)
                peaks[name] += [] if peak is None else [peak]
    found: dict[str, Any] = {}
    for name, pairs in times.items():
        per_token = median(_per_token(first, whole, config.new_tokens) for first, whole in pairs)
        found[name] = {
            "tokens_per_s": round(config.batch_size / per_token, 3),
            "ttft_ms": round(1e3 * median(first for first, _ in pairs), 2),
            "peak_bytes": max(peaks[name], default=None),
        }
        if name != "base":
            found[name]["ratio"] = round(found["base"]["tokens_per_s"] / found[name]["tokens_per_s"], 4)
    for name, pace in paces.items():
        drafted = pace.drafted_tokens
        found[name]["acceptance"] = round(pace.accepted_tokens / drafted, 4) if drafted else None
    if config.score_tokens:
        parts = {name: way for name, (way, _) in ways.items() if name == "base" or name in memories}
        text = _joined(tokenizer, prompts, min(config.score_tokens, longest or config.score_tokens)).to(device)
        seconds = _scored(parts, text, config)
        for name in parts:
            found[name]["scored_tokens_per_s"] = round(text.shape[1] / seconds[name], 3)
            if name != "base":
                found[name]["scoring_ratio"] = round(seconds[name] / seconds["base"], 4)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    found["machine"] = {"device": str(device), "threads": torch.get_num_threads(), "load_average": load}
    return found


def bench_table(report: Mapping[str, Any]) -> str:
    """The report as lines of text."""
    rows = {name: row for name, row in report.items() if name != "machine"}
    width = max(8, *(len(name) + 2 for name in rows))
    titles = f"{'tokens/s':>10}{'first token':>14}{'peak memory':>14}{'time / base':>13}{'accepted':>10}"
    scored = any("scored_tokens_per_s" in row for row in rows.values())
    lines = [f"{'':<{width}}{titles}{'scored/s':>12}{'time / base':>13}" if scored else f"{'':<{width}}{titles}"]
    for name, row in rows.items():
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else "1"
        peak = "?" if row["peak_bytes"] is None else size(row["peak_bytes"])
        accepted = f"{row['acceptance']:.0%}" if row.get("acceptance") is not None else ""
        line = (
            f"{name:<{width}}{row['tokens_per_s']:>10.1f}{row['ttft_ms']:>11.0f} ms{peak:>14}{ratio:>13}{accepted:>10}"
        )
        if "scored_tokens_per_s" in row:
            line += f"{row['scored_tokens_per_s']:>12.0f}{row.get('scoring_ratio', 1):>13.2f}"
        lines.append(line.rstrip())
    machine = report["machine"]
    load = "" if machine["load_average"] is None else f", load {machine['load_average']:.1f} at the end"
    lines.append(f"{machine['device']}, {machine['threads']} threads{load}")
    return "\n".join(lines)


def _batches(tokenizer: Any, prompts: Sequence[str], config: BenchConfig) -> list[Tensor]:
    """Prompts as batches without padding: each is cut, from its end, to the shortest of its batch."""
    ids = [encode_prompt(tokenizer, prompt)["input_ids"][0] for prompt in prompts]
    ids = [tokens[-config.prompt_tokens :] for tokens in ids]  # type: ignore[index]
    found = []
    for start in range(0, len(ids), config.batch_size):
        members = [ids[(start + i) % len(ids)] for i in range(config.batch_size)]
        shortest = min(len(tokens) for tokens in members)
        found.append(torch.stack([tokens[-shortest:] for tokens in members]))
    return found


def _joined(tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
    """`(1, length)` tokens of all prompts, repeated where they are too few."""
    ids = torch.cat([encode_prompt(tokenizer, prompt)["input_ids"][0] for prompt in prompts])  # type: ignore[misc]
    return ids.repeat(-(-length // len(ids)))[None, :length]


def _per_token(first: float, whole: float, tokens: int) -> float:
    """Seconds of a token after the first; of any, where a busy machine made the first take longer than all together."""
    return (whole - first) / (tokens - 1) if whole > first else whole / tokens


@torch.inference_mode()
def _scored(ways: Mapping[str, Any], text: Int[Tensor, "1 T"], config: BenchConfig) -> dict[str, float]:
    """Median seconds of scoring a text by the base, and by the base and each memory."""
    mixtures = {name: way for name, way in ways.items() if name != "base"}
    size = min((mixed.vocab_size for mixed in mixtures.values()), default=ways["base"].config.vocab_size)
    base = BaseVoter(ways["base"], size, exact=False)
    labels = torch.cat([text[:, 1:], torch.full_like(text[:, :1], IGNORE)], 1)
    seconds = {name: [] for name in ways}
    for number in range(-1, config.rounds):  # the first round warms up
        for name in ways:
            memory = next(iter(mixtures[name].named_memories().values())) if name in mixtures else None
            tap = None if memory is None else memory.tap
            began = _now(base.device)
            state = base.step(text, taps=() if tap is None else (tap,))
            base.label_log_probs(state, labels)
            if memory is not None:
                read = memory.step(text, None if tap is None else state.activations[tap])
                memory.label_log_probs(read, labels)
            seconds[name] += [_now(base.device) - began] if number >= 0 else []
    return {name: median(times) for name, times in seconds.items()}


def _timed(way: Any, batch: Tensor, config: BenchConfig, asked: Mapping[str, Any]) -> tuple[float, float, int | None]:
    """Seconds to the first token and to the last, and the peak of memory in bytes."""
    device = batch.device
    memory = _Peak(way, device)
    torch.manual_seed(config.seed)
    began = _now(device)
    marks: list[float] = []

    class Streamer:
        def put(self, value: Tensor) -> None:
            marks.append(_now(device))

        def end(self) -> None:
            pass

    options: dict[str, Any] = {"streamer": Streamer()} if len(batch) == 1 else {}
    decode(way, batch, config.new_tokens, **options, **asked)
    whole = _now(device) - began
    if len(batch) == 1:
        first = marks[1] - began  # the prompt itself comes before it
    else:
        began = _now(device)
        decode(way, batch, 1, **asked)
        first = _now(device) - began
    return first, whole, memory.bytes


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class _Peak:
    """Memory of a way while it runs: its weights, and what it needs on top; None where the system does not tell."""

    def __init__(self, way: torch.nn.Module, device: torch.device) -> None:
        self._device = device
        held = {t.data_ptr(): t.nbytes for t in (*way.parameters(), *way.buffers())}
        self._weights, self._before = sum(held.values()), 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        elif _resident("VmRSS") is not None:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
                self._before = _resident("VmRSS") or 0

    @property
    def bytes(self) -> int | None:
        """Up to now."""
        if self._device.type == "cuda":
            return self._weights + torch.cuda.max_memory_allocated(self._device) - self._before
        peak = _resident("VmHWM")
        return None if peak is None or not self._before else self._weights + max(0, peak - self._before)


def _resident(name: str) -> int | None:
    """A line of what Linux says of this process, in bytes."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return 1024 * int(line.split()[1])
    return None
