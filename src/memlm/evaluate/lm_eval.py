"""A mixture as a model of lm-eval, under the name `memlm`."""

import contextlib
import inspect
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessorList

from memlm.config import MAX_COUNT
from memlm.errors import InputError, MemlmError, ModelError
from memlm.evaluate.decoding import NaNWatch
from memlm.files import out_of_memory
from memlm.mix.gate_config import GateConfig
from memlm.mix.mixed_lm import MixedLM
from memlm.models.loading import resolve
from memlm.models.tokenizers import load_tokenizer

_PLACES = 4096  # of a batch at which scores are kept at a time; over a vocabulary of 50,000 they take 0.8 GB

_Request = tuple[tuple[str, str], list[int], list[int]]
"""Texts, and the tokens of the context and of what is to go on with it."""


class FiniteLM(HFLM):  # type: ignore[misc]
    """lm-eval's own model of transformers, that refuses answers which are no numbers, and keeps no scores that nobody
    asks for: those of eight prompts of 5,000 tokens take 8 GB, and several times that in a mixture."""

    called = "the model"
    """What an error calls it."""
    _kept = 0
    """Places at the end of a batch whose scores are asked for; 0: all."""

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        with _heard_whole(self.model):  # type: ignore[attr-defined]
            return self._log_likelihoods(requests, disable_tqdm, override_bs)

    def _log_likelihoods(
        self, requests: Sequence[_Request], disable_tqdm: bool, override_bs: int | None
    ) -> list[tuple[float, bool]]:
        ask: Any = super()._loglikelihood_tokens  # type: ignore[misc]
        own: Any = self
        if own.backend == "causal" and isinstance(own.batch_size, int) and own.mixed_precision_dtype is None:
            whole: list[Any] = [None] * len(requests)
            batches = _batches(requests, own.batch_size, own.max_length, own.logits_cache)
            try:
                with tqdm(total=len(requests), disable=disable_tqdm or own.rank != 0, desc="log-likelihoods") as bar:
                    for numbers, self._kept in batches:
                        some = ask([requests[number] for number in numbers], disable_tqdm=True, override_bs=override_bs)
                        for number, answer in zip(numbers, some, strict=True):
                            whole[number] = answer
                        bar.update(len(numbers))
            finally:
                self._kept = 0
        else:
            whole = ask(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        if any(math.isnan(log_prob) for log_prob, _ in whole):
            raise ModelError(f"{self.called} gives no finite scores")
        return whole

    def _model_call(self, inps: Tensor, **rest: Any) -> Tensor:
        model: Any = self.model  # type: ignore[attr-defined]
        if not self._kept or "logits_to_keep" not in inspect.signature(model.forward).parameters:
            return super()._model_call(inps, **rest)  # type: ignore[misc]
        with torch.no_grad():
            return model(inps, logits_to_keep=self._kept).logits

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.model, MixedLM):  # type: ignore[attr-defined]  # which looks for itself
            return super()._model_generate(*args, **kwargs)  # type: ignore[misc]
        watch = NaNWatch()
        watching = LogitsProcessorList([watch])
        found = super()._model_generate(*args, **kwargs, logits_processor=watching)  # type: ignore[misc]
        watch.check(self.called)
        return found


@contextlib.contextmanager
def _heard_whole(model: Any) -> Iterator[None]:
    """While it lasts a gate hears texts from their first token, as in evaluations; its window of a prompt would begin
    where the batch makes it."""
    gate = model.gate if isinstance(model, MixedLM) else None
    if gate is None or gate.gate == "none":
        yield
        return
    model.set_gate(gate.model_copy(update={"prompt_window": MAX_COUNT}))
    try:
        yield
    finally:
        model.set_gate(gate)


def _batches(requests: Sequence[_Request], size: int, longest: int, share: bool) -> Iterator[tuple[list[int], int]]:
    """Requests that lm-eval reads in one pass, as it would batch them or fewer, and at how many of the last places of
    the padded batch it looks at scores.

    Args:
        size: Rows of a pass at most; those whose text is the same but for its last token are one row.
        longest: Tokens of a text at most; of a longer one the end is read.
        share: Whether equal rows are read once.
    """
    rows: dict[Any, list[int]] = {}
    for number, (_, context, going_on) in enumerate(requests):
        rows.setdefault((*context, *going_on[:-1]) if share else number, []).append(number)

    texts = []
    for numbers in rows.values():
        _, context, going_on = requests[numbers[0]]
        asked = max(len(requests[number][2]) for number in numbers)
        texts.append((min(len(context) + len(going_on) - 1, longest), asked, numbers))
    batch: list[int] = []
    count, kept, padded = 0, 0, 0
    for length, asked, numbers in sorted(texts, key=lambda text: -text[0]):
        more = max(kept, padded - length + asked)
        if count == size or (count and (count + 1) * more > _PLACES):
            yield batch, kept
            batch, count = [], 0
        if not count:
            padded, more = length, asked
        batch, count, kept = [*batch, *numbers], count + 1, more
    if batch:
        yield batch, kept


@register_model("memlm")
class MixtureLM(FiniteLM):
    """lm-eval's own model of transformers around a `MixedLM`."""

    def __init__(
        self,
        base: str,
        memory: str | Mapping[str, str],
        mix_weight: float | Mapping[str, float] | None = None,
        gate: str | Mapping[str, Any] | None = None,
        memory_window: int | None = None,
        dtype: str = "auto",
        device: str | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            base, memory, mix_weight, gate, memory_window: As `MixedLM.from_pretrained` takes them; a gate may be given
                by its settings.
            dtype: Precision of base and memories.
            device: Where they compute; the default device if None.
            kwargs: Of lm-eval's `HFLM`: `batch_size`, `max_length` …
        """
        place = device if device == "cpu" or torch.accelerator.is_available() else None  # lm-eval asks for cuda unasked
        model = MixedLM.on_default_device(
            base,
            memory=memory,
            mix_weight=mix_weight,
            gate=GateConfig.parse(dict(gate)) if isinstance(gate, Mapping) else gate,
            memory_window=memory_window,
            dtype=dtype,
            device=place,
        )
        start: Any = super().__init__  # lm-eval keeps its signature from type checkers
        start(pretrained=model, tokenizer=load_tokenizer(resolve(base)), **kwargs)


def run_lm_eval(arguments: Sequence[str], **model_args: Any) -> None:
    """lm-eval's command line with this model; `arguments` are its own, but for the model.

    Args:
        arguments: As `lm-eval run` takes them.
        model_args: Of `MixtureLM`; those that are None are left out.
    """
    from lm_eval.__main__ import cli_evaluate

    given = {name: value for name, value in model_args.items() if value is not None}
    before = sys.argv
    sys.argv = ["lm-eval", "run", "--model", "memlm", "--model_args", json.dumps(given), *arguments]
    try:
        with lm_eval_errors("lm-eval"):
            cli_evaluate()
    finally:
        sys.argv = before


@contextlib.contextmanager
def lm_eval_errors(what: str) -> Iterator[None]:
    """What lm-eval raises in the block, in one line; task files hold templates and code of strangers.

    Raises:
        InputError: It raised something that is neither ours nor a lack of memory.
    """
    try:
        yield
    except (MemlmError, MemoryError):
        raise
    except Exception as error:
        if out_of_memory(error) is not None:
            raise
        raise InputError(f"{what}: {' '.join(str(error).split())[:300]}") from error
