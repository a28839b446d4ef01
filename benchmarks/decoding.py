"""Cached decoding steps, and the proof that a mixture's are what its parts say."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from benchmarks.report import prove
from memlm.mix.cache import MixedCache
from memlm.mix.mixed_lm import MixedLM
from memlm.models.taps import capture
from memlm.targets.votes import SparseProbs

_TOLERANCE = 1e-4
"""Nats. The parts are computed twice alike, so only float32 sums of some 1e5 terms in another order differ."""


@torch.inference_mode()
def decoder(model: PreTrainedModel, context: Tensor, tokens: Tensor) -> Callable[[], list[Tensor]]:
    """A function that decodes `tokens` one by one after `context`, with a cache, and forgets them again.

    Args:
        model: A plain model, or a `MixedLM`.
        context: `(B, T)` read once, now.
        tokens: `(B, S)`.

    Returns:
        The function; it gives the logits `(B, V)` after each token.
    """
    cache = _new_cache(model, len(context))
    model(context, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def decode() -> list[Tensor]:
        logits = [
            model(column, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            for column in tokens.split(1, dim=1)
        ]
        cache.crop(-tokens.shape[1])
        return logits

    return decode


def _new_cache(model: PreTrainedModel, rows: int) -> DynamicCache | MixedCache:
    return model.new_cache(rows) if isinstance(model, MixedLM) else DynamicCache(config=model.config)


@torch.inference_mode()
def prove_mixture(mixed: MixedLM, context: Tensor, tokens: Tensor) -> None:
    """Prove that what `mixed` decodes is the sum of what base and memory say alone, and at weight 0 the base.

    Raises:
        WrongAnswerError: It is not.
    """
    (memory,), (weight,) = mixed.named_memories().values(), mixed.mix_weights.values()
    cache, memory_cache = DynamicCache(config=mixed.base.config), memory.new_cache(len(context))
    found = decoder(mixed, context, tokens)()
    for number, piece in enumerate([context, *tokens.split(1, dim=1)]):
        with capture(mixed.base, () if memory.tap is None else (memory.tap,)) as captured:
            logits = mixed.base(piece, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        activations = captured[memory.tap].reshape(*piece.shape, -1) if memory.tap is not None else None
        state = memory.step(piece, activations, cache=memory_cache)
        votes = memory.votes(state, slice(-1, None))
        if number == 0:
            continue
        base_log_probs = logits[:, : mixed.vocab_size].double().log_softmax(-1)
        if isinstance(votes, SparseProbs):
            memory_log_probs = votes.dense(mixed.vocab_size).double().log()
        else:
            memory_log_probs = votes[:, -1].double()
        expected = (base_log_probs.exp() * (1 - weight) + memory_log_probs.exp() * weight).log()
        difference = (found[number - 1].double().log_softmax(-1) - expected).abs().max()
        prove(float(difference), _TOLERANCE, f"decoding step {number}: the mixture against its parts")
    mixed.set_mix_weight(0.0)
    alone = zip(decoder(mixed, context, tokens)(), decoder(mixed.base, context, tokens)(), strict=True)
    difference = max(float((ours - base[:, : mixed.vocab_size].float()).abs().max()) for ours, base in alone)
    mixed.set_mix_weight(weight)
    prove(difference, 0.0, "the mixture at weight 0 against the base")
