"""A causal LM as a body that gives hidden states and a head that turns them into logits."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from memlm.errors import ModelError
from memlm.models.adapters import unwrapped
from memlm.models.loading import device_of

_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True, eq=False)  # torch.compile takes a hash before there are fields
class Head:
    """The output layer: `softcap(scale * (hidden @ weight.T + bias))`.

    `scale` and `softcap` (None: no cap) are what some families put behind the matrix product.
    """

    linear: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @property
    def weight(self) -> Float[Tensor, "V D"]:
        return self.linear.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Float[Tensor, "V"] | None:
        return getattr(self.linear, "bias", None)

    def __call__(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        weight = getattr(self.linear, "weight", None)  # some bodies compute in float32 whatever the head is in
        if weight is not None and weight.is_floating_point():
            hidden = hidden.to(weight.dtype)
        # torch multiplies a slice of (B, T, D), as of last positions, row by row: 20 to 60 times as slow in bfloat16
        flat = hidden.ndim == 3 and (len(hidden) == 1 or hidden.dtype.itemsize == 2)  # others would change bits
        logits = self.linear(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2]) if flat else self.linear(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    @torch.no_grad()
    def is_plain(self) -> bool:
        """Whether weight and bias tell all of the output layer, as losses that read them alone suppose."""
        weight: Tensor = self.weight
        probe = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
        expected, found = self.linear(probe).float(), nn.functional.linear(probe, weight, self.bias).float()
        tolerance = 1e-3 if weight.dtype == torch.float32 else 5e-2
        return not bool((expected - found).abs().max() > tolerance * expected.abs().max())


def check_plain_head(head: Head, name: str) -> None:
    """Raise unless `is_plain`.

    Args:
        name: What an error calls the model.

    Raises:
        ModelError: It is not.
    """
    if not head.is_plain():
        raise ModelError(
            f"the output layer of {name} ({type(head.linear).__name__}) does more than multiply by its weight: it can"
            " vote, but it cannot be trained or carried over"
        )


def find_head(model: PreTrainedModel, *, exact: bool = False) -> Head:
    """The model's head, checked on a probe: body plus head must give the model's own logits.

    Args:
        exact: To the last bit; otherwise as near as its precision allows.

    Raises:
        ModelError: They do not, so the model does something behind its output layer that memlm does not know.
    """
    linear = model.get_output_embeddings()
    config = model.config.get_text_config()
    body = model.base_model
    if linear is None or body is model:
        raise ModelError(f"{type(model).__name__} has no separate body and output layer")
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = next((cap for name in _SOFTCAPS if (cap := getattr(config, name, None))), None)
    head = Head(linear, scale, softcap)
    probe = torch.arange(3, device=device_of(model))[None] % config.vocab_size
    with torch.no_grad():
        expected = model(input_ids=probe, use_cache=False).logits.float()
        hidden = body(input_ids=probe, use_cache=False)[0]
        found = head(hidden).float()
    tolerance = 0.0 if exact else 1e-3 if model.dtype == torch.float32 else 5e-2
    if (
        expected.shape != found.shape
        or (expected - found).abs().max() > tolerance * expected.abs().max().clamp(min=1)
        or not _holds_far_out(model, head, probe, hidden)
    ):
        raise ModelError(
            f"{type(model).__name__} changes its logits after the output layer in a way memlm does not know"
        )
    return head


class _Louder(nn.Module):
    """An output layer whose logits are up to 1000."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden) * (1000 / self.linear(hidden).abs().max().clamp(min=1e-3))

    def __getattr__(self, name: str) -> Any:
        return getattr(super().__getattr__("linear"), name) if name != "linear" else super().__getattr__(name)


@torch.no_grad()
def _holds_far_out(model: PreTrainedModel, head: Head, probe: Tensor, hidden: Tensor) -> bool:
    """Whether the head holds for large logits too; what bounds them would be lost in rounding among small ones.

    Args:
        hidden: What the body makes of the probe.
    """
    inner = unwrapped(model)
    path = next((name for name, module in inner.named_modules() if module is head.linear), None)
    if path is None:
        return True
    copied = copy.copy(inner)  # with another output layer: the model itself may be running in another thread
    if hasattr(copied, "_hf_hook"):  # accelerate's, bound to the model itself
        vars(copied).pop("forward", None)
    owner = copied
    *parents, last = path.split(".")
    for name in ("", *parents):
        part = copy.copy(getattr(owner, name)) if name else owner
        part._modules = dict(part._modules)
        if name:
            owner._modules[name] = part
        owner = part
    owner._modules[last] = _Louder(head.linear)
    expected = copied(input_ids=probe, use_cache=False).logits.float()
    found = replace(head, linear=_Louder(head.linear))(hidden).float()
    return not bool((expected - found).abs().max() > 0.02 * expected.abs().max())  # NaN is for others to name


@torch.no_grad()
def label_log_probs(
    hidden: Float[Tensor, "P D"],
    labels: Tensor,
    head: Head,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> dict[str, Tensor]:
    """Per position: log-prob of the label, entropy and the likeliest token, without logits of all positions at once.

    Args:
        labels: `(P,)` ids in `[0, vocab_size)`.
        vocab_size: Output rows beyond it are padding and take no part in the softmax.
        temperature: Divides the logits.
        chunk: Positions whose logits exist at a time.

    Returns:
        `label`, `entropy` (nats) and `top1` (a probability) in float32, `top1_id` in int32; each `(P,)` on the CPU.
    """
    parts = []
    for start in range(0, len(labels), chunk):
        logits = head(hidden[start : start + chunk])[..., :vocab_size].float()
        log_probs = (logits / temperature).log_softmax(-1)
        label = log_probs.gather(-1, labels[start : start + chunk, None])[:, 0]
        parts.append({name: values.cpu() for name, values in {"label": label, **summary(log_probs)}.items()})
    return joined(parts)


def summary(log_probs: Float[Tensor, "... V"], normaliser: Float[Tensor, "... 1"] | None = None) -> dict[str, Tensor]:
    """`entropy` (nats) and `top1` (a probability) in float32, `top1_id` in int32, of each distribution.

    Args:
        log_probs: Or logits, of which `normaliser` is the logsumexp.
    """
    ids = likeliest(log_probs)
    top = log_probs.gather(-1, ids[..., None])[..., 0]
    if torch.is_grad_enabled() and log_probs.requires_grad:
        parts = (log_probs.softmax(-1) * log_probs).nan_to_num(0.0)
    else:  # in place: fresh memory of this size costs more than what is computed
        parts = log_probs.softmax(-1).mul_(log_probs).nan_to_num_(0.0)
    entropy = -parts.sum(-1)
    if normaliser is not None:
        entropy, top = entropy + normaliser[..., 0], top - normaliser[..., 0]
    return {"entropy": entropy, "top1": top.exp(), "top1_id": ids.int()}


def likeliest(scores: Float[Tensor, "... V"]) -> Int[Tensor, "..."]:
    """`argmax` over tokens; on a CPU numpy's, which takes a tenth of the time of torch's."""
    if scores.device.type != "cpu" or scores.dtype not in (torch.float32, torch.float64):
        return scores.argmax(-1)
    return torch.from_numpy(np.asarray(scores.detach().numpy().argmax(-1)))


def joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Columns of scores, each from its chunks; empty ones where there is no chunk."""
    nothing = dict.fromkeys(("label", "entropy", "top1"), torch.empty(0)) | {"top1_id": torch.empty(0).int()}
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else nothing
