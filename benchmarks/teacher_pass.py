"""The teacher pass reads keys as fast as the same model runs forward without its head."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from benchmarks.models import random_model, random_tokens, tiny_config
from benchmarks.report import bar_line, prove
from benchmarks.timing import interleave
from memlm.corpus.blocks import Split
from memlm.datastore.build import read_keys
from memlm.models.loading import default_device, default_dtype, dtype_name, load_causal_lm
from memlm.models.taps import TapReader, capture, find_tap
from memlm.stage import Stage, StageSpec

BAR = 0.95
_MEDIAN, _SPREAD = 0.4, 0.82  # of MedQuAD's lengths: the median over 512 tokens, the deviation of their logarithm
_TOLERANCE = 0.02  # of their length; other keys are off by about 1.4


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """Two lines: SmolLM2 in bfloat16 (float32 where the machine does not compute that natively), batches of 4 texts of
    512 tokens; and 128 texts as long as MedQuAD's, cut at 512.

    Lengths are drawn from a lognormal that has MedQuAD's median and spread. The body reads them four by four, longest
    first, each batch padded to its longest, and is told tokens a second without padding, as the teacher pass is, which
    fills its batches by tokens and pads to fewer lengths. Of 16 texts its last batch alone would be an eighth.
    """
    device = default_device()
    if quick:
        model = random_model(tiny_config(), dtype=torch.bfloat16, device=device)
        sizes: dict[str, Any] = {"batch": 2, "length": 16, "batches": 2, "rounds": 1}
    else:
        model = load_causal_lm("smollm2", dtype=default_dtype(device)).to(device)  # type: ignore[arg-type]
        sizes = {}
    for name, ragged in (("teacher_pass", False), ("teacher_pass/ragged", True)):
        found = measure(model, ragged=ragged, **({"batches": 32, "rounds": 3} if ragged else {}) | sizes)
        yield bar_line(name, found.pop("ratio"), at_least=BAR, judged=not quick, **found)


def measure(
    model: PreTrainedModel,
    *,
    ragged: bool = False,
    batch: int = 4,
    length: int = 512,
    batches: int = 4,
    rounds: int = 7,
) -> dict[str, Any]:
    """Tokens/s of the teacher pass, keys written to disk as a shard, and of the model's body.

    Args:
        model: Teacher.
        ragged: Whether texts are of different lengths.
        batch: Texts in one pass.
        length: Tokens per text, at most.
        batches: Passes per round.
        rounds: How often each side is timed.

    Raises:
        WrongAnswerError: The keys are not what a whole forward pass has at the tap.
    """
    texts = batch * batches
    lengths = np.full(texts, length)
    if ragged:
        drawn = np.random.default_rng(0).lognormal(np.log(_MEDIAN * length), _SPREAD, texts)
        lengths = np.clip(drawn, 2, length).astype(np.int64)
    vocab_size = model.config.get_text_config().vocab_size
    tokens = random_tokens(1, int(lengths.sum()), vocab_size, torch.device("cpu"))[0]
    offsets = np.append(0, lengths.cumsum())
    split = Split(tokens.numpy(), offsets, block_size=length, step=length, cross_documents=False)
    longest_first = [int(i) for i in np.argsort(-lengths, kind="stable")]
    groups = [longest_first[i : i + batch] for i in range(0, texts, batch)]
    of_text = tokens.to(model.device).split(lengths.tolist())
    pieces, tap = [pad_sequence([of_text[i] for i in group], batch_first=True) for group in groups], find_tap(model)
    reader = TapReader(model, tap)
    with tempfile.TemporaryDirectory(prefix="memlm-teacher-") as scratch:
        stage = Stage(Path(scratch) / "datastore", StageSpec("datastore", {}, {}, None))

        def teacher_pass() -> np.ndarray:
            keys = read_keys(reader, split, range(len(split)), batch_tokens=batch * length)
            stage.save_array("keys.npy", keys)
            return keys

        prove_keys(model, tap, of_text, teacher_pass())
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
        "dtype": dtype_name(model.dtype),
        "rounds": rounds,
    }


@torch.inference_mode()
def prove_keys(model: PreTrainedModel, tap: str, texts: Sequence[Tensor], keys: np.ndarray) -> None:
    """Raise unless `keys` are what goes into the tap where each text is read whole and alone.

    Raises:
        WrongAnswerError: They are not, by more than bfloat16 rounds otherwise beside other texts.
    """
    start = 0
    for number, text in enumerate(texts):
        with capture(model, (tap,)) as captured:
            model.base_model(text[None], use_cache=False)
        whole = captured[tap][0, :-1].float().cpu().numpy()
        here = keys[start : start + len(whole)].astype(np.float32)
        start += len(whole)
        error = np.linalg.norm(here - whole) / np.linalg.norm(whole)
        prove(float(error), _TOLERANCE, f"keys of text {number} against a whole forward pass of it")
    prove(abs(start - len(keys)), 0, "positions against keys")
