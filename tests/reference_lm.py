"""Slow, obviously right twins of the loss, the window, the mixture and generation: dense, float64, no cache."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memlm.memory.decoder import MemoryDecoder


def dense_targets(counts: Tensor, ids: Tensor, probs: Tensor, vocab_size: int) -> Tensor:
    """Sparse targets as a normalised dense matrix `(P, V)` in float64."""
    dense = torch.zeros(len(counts), vocab_size, dtype=torch.float64)
    place = 0
    for position, count in enumerate(counts.tolist()):
        for token, prob in zip(ids[place : place + count].tolist(), probs[place : place + count].tolist(), strict=True):
            dense[position, token] += prob
        place += count
    return dense / dense.sum(1, keepdim=True)


def dense_distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    targets: Tensor | None,
    *,
    kl_weight: float,
    vocab_size: int,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, KL and cross-entropy, summed over positions, by their definitions; differentiable, in float64."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    logits = (logits * scale)[:, :vocab_size]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = logits.log_softmax(1)
    cross_entropy = -log_p.gather(1, labels[:, None]).sum()
    kl = torch.zeros((), dtype=torch.float64)
    if targets is not None:
        kl = (torch.xlogy(targets, targets) - targets * log_p).sum()
    return kl_weight * kl + (1 - kl_weight) * cross_entropy, kl, cross_entropy


def dense_mixture_loss(
    log_p: Tensor, base: Tensor, confidence: Tensor, labels: Tensor, targets: Tensor, *, kl_weight: float, share: float
) -> Tensor:
    """The loss through the mixture by its definition, summed over positions; differentiable, in float64.

    `log_p` and `base` are log-probs `(P, V)` of memory and base, `targets` dense.
    """
    c = confidence.double().sigmoid()[:, None]
    mixed = ((1 - c) * base.double().exp() + c * log_p.exp()).log()
    soft = kl_weight * targets + (1 - kl_weight) * torch.nn.functional.one_hot(labels, log_p.shape[1])
    loss = -(soft * ((1 - share) * log_p + share * mixed)).sum()
    return loss + kl_weight * torch.xlogy(targets, targets).sum()


def mixed_probs(base: Tensor, memories: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mixture of distributions, added up as distributions, in float64."""
    mixed = (1 - sum(weights)) * base.double()
    for memory, weight in zip(memories, weights, strict=True):
        mixed = mixed + weight * memory.double()
    return mixed


def window_start(place: int, window: int | None) -> int:
    """First token that the token at `place` sees: whenever the window is full, it jumps ahead by half of its size."""
    start = 0
    for token in range(place + 1):
        if window is not None and token - start == window:
            start += window // 2
    return start


@torch.no_grad()
def windowed_hidden(decoder: PreTrainedModel, tokens: Sequence[int], window: int | None) -> Tensor:
    """Hidden state of every token `(T, D)`: a pass of its own over what that token sees."""
    states = []
    for place in range(len(tokens)):
        visible = torch.tensor([list(tokens[window_start(place, window) : place + 1])])
        states.append(decoder.base_model(input_ids=visible, use_cache=False)[0][0, -1])
    return torch.stack(states)


@torch.no_grad()
def next_token_probs(
    base: PreTrainedModel,
    memories: Mapping[str, MemoryDecoder],
    weights: Mapping[str, float],
    tokens: Sequence[int],
    size: int,
) -> Tensor:
    """What the mixture says of the token after `tokens`, `(size,)` in float64."""
    logits = base(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0, -1, :size]
    votes = []
    for memory in memories.values():
        visible = list(tokens[window_start(len(tokens) - 1, memory.window) :])
        found = memory.decoder(input_ids=torch.tensor([visible]), use_cache=False).logits[0, -1, :size]
        votes.append((found.double() / memory.settings.memory_temperature).softmax(-1))
    return mixed_probs(logits.double().softmax(-1), votes, [weights[name] for name in memories])


def greedy(
    base: PreTrainedModel,
    memories: Mapping[str, MemoryDecoder],
    weights: Mapping[str, float],
    prompt: Sequence[int],
    *,
    new_tokens: int,
    size: int,
    end: int | None = None,
) -> list[int]:
    """The continuation of `prompt` that takes the likeliest token each time, up to and with `end`."""
    tokens = list(prompt)
    for _ in range(new_tokens):
        tokens.append(int(next_token_probs(base, memories, weights, tokens, size).argmax()))
        if tokens[-1] == end:
            break
    return tokens[len(prompt) :]
