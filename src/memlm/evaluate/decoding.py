"""Decoding of a fixed number of tokens, as figures of speed and of what is said need it."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from memlm.errors import ModelError


class NaNWatch(LogitsProcessor):
    """Looks whether a model on its own gives numbers, and waits for no device; a mixture looks for itself."""

    def __init__(self) -> None:
        self._bad: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        bad = scores.isnan().any()
        self._bad = bad if self._bad is None else self._bad | bad
        return torch.nan_to_num(scores, nan=0.0, posinf=torch.inf, neginf=-torch.inf)  # for what samples

    def check(self, name: str) -> None:
        """Raise unless it did.

        Raises:
            ModelError: It did not.
        """
        if self._bad is not None and bool(self._bad):
            raise ModelError(f"{name} gives no finite scores")


def decode(
    model: Any,
    prompts: Int[Tensor, "B T"],
    new_tokens: int,
    *,
    sampled: bool = False,
    name: str | None = None,
    **options: Any,
) -> Int[Tensor, "B N"]:
    """Tokens after prompts of one length, the likeliest or sampled ones; no text ends before `new_tokens` of them.

    What a model's own generation settings ask for, such as penalties, is left out. Greedily the end of a text is never
    chosen; where tokens are sampled it is one like others.

    Args:
        model: Any model of transformers, or a mixture.
        name: What an error calls a model that gives NaN; None: that is not looked at, or done by a mixture itself.
        options: Further ones of `generate`.

    Raises:
        ModelError: The model gives NaN.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()  # no end, penalties, beams or sampling of its own
    watch = NaNWatch()
    looking = {} if name is None else {"logits_processor": LogitsProcessorList([watch])}
    choosing = {"top_k": 0} if sampled else {"eos_token_id": own.eos_token_id, "min_new_tokens": new_tokens}
    try:
        found = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new_tokens,
            do_sample=sampled,
            **choosing,
            **looking,
            pad_token_id=0,
            **options,
        )
    finally:
        model.generation_config = own
    if name is not None:
        watch.check(name)
    return found[:, prompts.shape[1] :]
