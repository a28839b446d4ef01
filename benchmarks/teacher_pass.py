"""The teacher pass reads keys as fast as the same model runs forward without its head."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.models import random_model, random_tokens, tiny_config
from benchmarks.report import bar_line, prove
from benchmarks.timing import interleave
from memlm.corpus.blocks import Split
from memlm.datastore.build import read_keys
from memlm.models.loading import default_device, load_causal_lm
from memlm.models.taps import TapReader, capture, find_tap
from memlm.stage import Stage, StageSpec

BAR = 0.95


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """One line: SmolLM2 in bfloat16, batches of 4 texts of 512 tokens."""
    device = default_device()
    if quick:
        model = random_model(tiny_config(), dtype=torch.bfloat16, device=device)
        found = measure(model, batch=2, length=16, batches=2, rounds=1)
    else:
        model = load_causal_lm("smollm2", dtype=torch.bfloat16).to(device)  # type: ignore[arg-type]
        found = measure(model)
    yield bar_line("teacher_pass", found.pop("ratio"), at_least=BAR, judged=not quick, **found)


def measure(
    model: PreTrainedModel, *, batch: int = 4, length: int = 512, batches: int = 4, rounds: int = 7
) -> dict[str, Any]:
    """Tokens/s of the teacher pass, keys written to disk as a shard, and of the model's body.

    Args:
        model: Teacher.
        batch: Texts in one pass.
        length: Tokens per text.
        batches: Passes per round.
        rounds: How often each side is timed.

    Raises:
        WrongAnswerError: The keys are not what a whole forward pass has at the tap.
    """
    tokens = random_tokens(batch * batches, length, model.config.get_text_config().vocab_size, torch.device("cpu"))
    offsets = np.arange(0, tokens.numel() + 1, length, dtype=np.int64)
    split = Split(tokens.flatten().numpy(), offsets, block_size=length, step=length, cross_documents=False)
    pieces, tap = tokens.to(model.device).split(batch), find_tap(model)
    reader = TapReader(model, tap)
    with tempfile.TemporaryDirectory(prefix="memlm-teacher-") as scratch:
        stage = Stage(Path(scratch) / "datastore", StageSpec("datastore", {}, {}, None))

        def teacher_pass() -> np.ndarray:
            keys = read_keys(reader, split, range(len(split)), batch_tokens=batch * length)
            stage.save_array("keys.npy", keys)
            return keys

        prove_keys(model, tap, pieces, teacher_pass())
        sides = {
            "teacher_pass": teacher_pass,
            "body": lambda: [model.base_model(piece, use_cache=False) for piece in pieces],
        }
        timing = interleave(sides, device=model.device, rounds=rounds)
    per_second = {name: round(tokens.numel() / timing.median(name), 1) for name in sides}
    return {
        "ratio": timing.ratio("body", "teacher_pass"),
        "ratio_spread": timing.spread("body", "teacher_pass"),
        "tokens_per_second": per_second,
        "batch": batch,
        "length": length,
        "dtype": str(model.dtype).removeprefix("torch."),
        "rounds": rounds,
    }


@torch.inference_mode()
def prove_keys(model: PreTrainedModel, tap: str, pieces: Sequence[Tensor], keys: np.ndarray) -> None:
    """Raise unless `keys` are what goes into the tap in a whole forward pass, at every place that predicts a token.

    Raises:
        WrongAnswerError: They are not.
    """
    with capture(model, (tap,)) as captured:
        for number, piece in enumerate(pieces):
            model.base_model(piece, use_cache=False)
            whole = captured[tap][:, :-1].half().flatten(0, 1).float().cpu().numpy()
            here = keys[number * len(whole) : (number + 1) * len(whole)]
            prove(float(np.abs(here - whole).max()), 0.0, f"keys of batch {number} against a whole forward pass")
