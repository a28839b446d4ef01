"""A mixture as a model of lm-eval, under the name `memlm`."""

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import LogitsProcessorList

from memlm.errors import InputError, MemlmError, ModelError
from memlm.evaluate.decoding import NaNWatch
from memlm.files import out_of_memory
from memlm.mix.gate_config import GateConfig
from memlm.mix.mixed_lm import MixedLM
from memlm.models.loading import resolve
from memlm.models.tokenizers import load_tokenizer


class FiniteLM(HFLM):  # type: ignore[misc]
    """lm-eval's own model of transformers, that refuses answers which are no numbers."""

    called = "the model"
    """What an error calls it."""

    def _loglikelihood_tokens(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._loglikelihood_tokens(*args, **kwargs)  # type: ignore[misc]
        if any(math.isnan(log_prob) for log_prob, _ in found):
            raise ModelError(f"{self.called} gives no finite scores")
        return found

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.model, MixedLM):  # type: ignore[attr-defined]  # which looks for itself
            return super()._model_generate(*args, **kwargs)  # type: ignore[misc]
        watch = NaNWatch()
        watching = LogitsProcessorList([watch])
        found = super()._model_generate(*args, **kwargs, logits_processor=watching)  # type: ignore[misc]
        watch.check(self.called)
        return found


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
