"""Sampling from a mixture by reading, at each token, only the component that is drawn.

`p = sum(w_i p_i)` is sampled by drawing the component first; the others catch up in one chunk when they are drawn
themselves. Exact for fixed weights and sampling without processors; with them it is the mixture of components that are
each processed, which is another distribution.

Source: arXiv:2605.00419.
"""

from typing import Any

import torch
from torch import Tensor

from memlm.mix.components import not_finite
from memlm.mix.decoding import Call, Processed, checked_cache, mask_for, positions, result
from memlm.mix.members import Mixture
from memlm.mix.sleep import Unread
from memlm.mix.weights import FixedWeights, settle_weights


def decode_drawn(mixed: Mixture, call: Call) -> Any:
    """Sample a text, at each token only from the component that is drawn."""
    cache, (text,), processed = checked_cache(mixed, call), call.texts, Processed(call.processors)
    voters: dict[str, Any] = {"": mixed._voter, **mixed.named_memories()}
    caches: dict[str, Any] = {name: cache.of(name, part) if name else cache.of_base for name, part in voters.items()}
    weights = _fixed_weights(mixed, call)
    assert weights is not None
    names, chances = list(voters), torch.tensor([max(0.0, 1 - sum(weights)), *weights]).double()
    known = cache.get_seq_length()
    read = {name: known - len(cache.unread) if name else known for name in names}
    cache.unread = Unread()  # what the memories have not read is read from the text
    mask: Tensor | None = call.options.get("attention_mask")
    mask = None if mask is None else mask.to(mixed.device)

    def catch_up(name: str, length: int) -> Any:
        """What a component makes of the tokens up to `length` that it has not read."""
        fresh = text.ids[:, read[name] : length].to(mixed.device)
        whole = mask_for(mask, length)
        given: dict[str, Any] = {} if name else {"position_ids": positions(whole, fresh), "use_cache": True}
        state = voters[name].step(fresh, None, whole, caches[name], **given)
        read[name] = length
        return state

    try:
        while not text.done:
            name = names[int(torch.multinomial(chances, 1))]
            votes = voters[name].votes(catch_up(name, len(text)), slice(-1, None))
            if bool(votes[..., 0].isnan().any()):
                raise not_finite(name or None)
            scores = processed([text.ids], text.ids[:, :0], votes)[0]
            text.add(torch.multinomial(scores.softmax(-1), 1)[0], scores, votes[0])
    except BaseException:
        for name in names:  # back to what all have read
            if (ahead := read[name] - min(read.values())) > 0:
                caches[name].crop(ahead)
        raise
    for name in names:  # so that the cache is one of all tokens but the last, as after any other decoding
        if read[name] < len(text) - 1:
            catch_up(name, len(text) - 1)
    return result([text], cache)


def _fixed_weights(mixed: Mixture, call: Call) -> list[float] | None:
    """Each memory's weight at every token of a text; None where a gate weighs them.

    Raises:
        ConfigError: A weight of this call is out of range.
    """
    asked = call.options.get("mix_weight")
    if asked is None and not isinstance(mixed._rule, FixedWeights):
        return None
    weights = settle_weights(mixed._weights, asked, per_row=True)
    return [float(torch.as_tensor(weight).flatten()[0]) for weight in weights.values()]


def why_not_drawn(mixed: Mixture, call: Call, warp: str | None) -> str | None:
    """Why components cannot be drawn for this text, other than `why_plain`; None where they can."""
    if len(call.ids) > 1:
        return "components are drawn for one text at a time"
    if not call.config.do_sample:
        return "drawing samples: pass do_sample=True, or decode with drafting"
    if call.config.output_scores or call.config.output_logits:
        return "the mixture's scores are not known where only one component is read: leave them out"
    if _fixed_weights(mixed, call) is None:
        return "a gate has to hear all components: fix the weights (gate='none' or mix_weight)"
    if not all(memory.can_draft for memory in mixed.named_memories().values()):
        return "a memory reads the base's states, so nothing is saved"
    if len(call.processors) and warp is None:
        return (
            f"{type(call.processors[0]).__name__} would act on each component instead of the mixture: sample at"
            " temperature 1 without top-k and top-p, or accept that with warp='components'"
        )
    return None
