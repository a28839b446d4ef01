"""Decoding of a fixed number of tokens, as figures of speed and of what is said need it."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig


def decode(
    model: Any, prompts: Int[Tensor, "B T"], new_tokens: int, *, sampled: bool = False, **options: Any
) -> Int[Tensor, "B N"]:
    """Tokens after prompts of one length, the likeliest or sampled ones; no text ends before `new_tokens` of them.

    What a model's own generation settings ask for, such as penalties, is left out. Greedily the end of a text is never
    chosen; where tokens are sampled it is one like others.

    Args:
        model: Any model of transformers, or a mixture.
        options: Further ones of `generate`.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()  # no end, penalties, beams or sampling of its own
    unending = {} if sampled else {"eos_token_id": own.eos_token_id, "min_new_tokens": new_tokens}
    try:
        found = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new_tokens,
            do_sample=sampled,
            **({"top_k": 0} if sampled else {}),
            **unending,
            pad_token_id=0,
            **options,
        )
    finally:
        model.generation_config = own
    return found[:, prompts.shape[1] :]
