"""A training step never waits for an accelerator, shown without one.

Its tensors have shapes but no values here, so an operation that would copy values to the host, or needs them to size
its result, fails.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from memlm.corpus.blocks import IGNORE
from memlm.memory.config import MLPStart
from memlm.memory.decoder import MemoryDecoder
from memlm.memory.loss import distillation_loss
from memlm.memory.mlp import MLPMemory
from memlm.memory.protocol import Memory, MemorySettings, predicting_places
from memlm.models.heads import Head

VOCABULARY, WIDTH = 40, 32


def decoder() -> Memory:
    return MemoryDecoder(tiny_model(VOCABULARY), MemorySettings(kind="decoder", vocab_size=VOCABULARY))


def mlp() -> Memory:
    settings = MemorySettings(kind="mlp", vocab_size=VOCABULARY)
    return MLPMemory.start(MLPStart(layers=2), settings, init=None, base=tiny_model(VOCABULARY), seed=0)


def batch(kind: Callable[[], Memory]) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (2, 6), generator=rng)
    labels = tokens.clone()
    labels[:, 0] = labels[1, 4:] = IGNORE
    places = predicting_places(labels)
    activations = {"activations": torch.randn(len(places), WIDTH, generator=rng)} if kind is mlp else {}
    return {
        "input_ids": tokens,
        "labels": labels,
        "places": places,
        "target_counts": torch.full((len(places),), 3),
        "target_ids": torch.randint(VOCABULARY, (3 * len(places),), generator=rng).int(),
        "target_probs": torch.rand(3 * len(places), generator=rng).half(),
        **activations,
    }


def step_without_values(memory: Memory, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """The shapes of the gradients of a step."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(value) for name, value in inputs.items()}
        parameters = {name: mode.from_tensor(value) for name, value in memory.named_parameters()}
        found = torch.func.functional_call(memory, parameters, kwargs=fake | {"kl_weight": 0.5}, tie_weights=True)
        found.loss.backward()
        return {name: value.grad.shape for name, value in parameters.items() if value.grad is not None}


@pytest.mark.parametrize("kind", [decoder, mlp])
def test_a_step_waits_for_no_accelerator(kind: Callable[[], Memory]) -> None:
    memory, inputs = kind(), batch(kind)
    expected = {name: value.shape for name, value in memory.named_parameters()}
    assert step_without_values(memory, inputs) == expected


@pytest.mark.parametrize("kind", [decoder, mlp])
def test_places_given_are_those_that_labels_tell(kind: Callable[[], Memory]) -> None:
    memory, inputs = kind().double(), batch(kind)
    inputs |= {"activations": inputs["activations"].double()} if kind is mlp else {}
    given = memory(**inputs, kl_weight=0.5)
    found = memory(**{name: value for name, value in inputs.items() if name != "places"}, kl_weight=0.5)
    assert torch.equal(given.loss, found.loss)


class TestSuchAStepIsFoundOut:
    """The first test can fail."""

    def test_places_that_are_not_given(self) -> None:
        inputs = {name: value for name, value in batch(decoder).items() if name != "places"}
        with pytest.raises(DynamicOutputShapeException):
            step_without_values(decoder(), inputs)

    @pytest.mark.parametrize(("tile", "waits"), [((6, 20), False), ((1, 20), True)])
    def test_a_label_sorted_by_tile(self, tile: tuple[int, int], waits: bool) -> None:
        """As the CPU has it where tiles are many, here twelve."""
        found = pytest.raises(DataDependentOutputException) if waits else contextlib.nullcontext()
        with found, FakeTensorMode():
            hidden, labels = torch.randn(6, WIDTH), torch.zeros(6, dtype=torch.long)
            head = Head(nn.Linear(WIDTH, VOCABULARY))
            distillation_loss(hidden, labels, head, kl_weight=0.0, vocab_size=VOCABULARY, tile=tile)
