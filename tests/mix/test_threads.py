"""One mixture, or one base, used by several threads at once."""

import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from families import token_ids
from memories import WEIGHTS, Make
from torch import Tensor

from memlm import MixedLM

some_tokens = partial(token_ids, vocab_size=300)
THREADS = 4


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns far more often than usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(work: Callable[[int], Any]) -> list[Any]:
    """What `work` gives for each thread's number, all at once."""
    found: list[Any] = [None] * THREADS
    start = threading.Barrier(THREADS)

    def run(number: int) -> None:
        start.wait()
        try:
            found[number] = work(number)
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def passes(model: MixedLM, number: int) -> list[Tensor]:
    """Logits of ten texts of one thread's own, and a continuation, at a weight of its own."""
    weights = {name: weight * (number + 1) / THREADS for name, weight in WEIGHTS.items()}
    with torch.no_grad():
        texts = [some_tokens(1, 9 + i, seed=100 * number + i) for i in range(10)]
        logits = [model(text, mix_weight=weights).logits for text in texts]
        return [*logits, model.generate(texts[0], max_new_tokens=8, do_sample=False, mix_weight=weights)]


@pytest.mark.usefixtures("switching")
def test_threads_that_share_a_mixture_get_what_each_gets_alone(trio: MixedLM) -> None:
    alone = [passes(trio, number) for number in range(THREADS)]
    for number, found in enumerate(in_threads(partial(passes, trio))):
        assert not isinstance(found, Exception), found
        for ours, theirs in zip(found, alone[number], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # float32, added up in another order


def test_threads_that_share_a_base_get_what_each_gets_alone(make: Make) -> None:
    first = make()
    models = [first, *(MixedLM(first.base, dict(first.named_memories()), WEIGHTS) for _ in range(THREADS - 1))]
    alone = [passes(model, number) for number, model in enumerate(models)]
    for number, found in enumerate(in_threads(lambda number: passes(models[number], number))):
        assert not isinstance(found, Exception), found
        for ours, theirs in zip(found, alone[number], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


WAYS: dict[str, dict[str, Any]] = {"plain": {}, "drafted": {"drafting": 3}, "beams": {"num_beams": 3}}


def written(model: MixedLM, options: dict[str, Any], number: int) -> list[Tensor]:
    """Texts of one thread's own under the model's gate."""
    with torch.no_grad():
        texts = [some_tokens(1, 6 + i, seed=100 * number + i) for i in range(4)]
        return [model.generate(text, max_new_tokens=8, do_sample=False, **options) for text in texts]


@pytest.mark.usefixtures("switching")
@pytest.mark.parametrize("way", WAYS)
def test_threads_under_a_gate_write_what_each_writes_alone(make: Make, way: str) -> None:
    options, model = WAYS[way], make({"law": 0.3})
    model.set_gate("posterior")
    alone = [written(model, options, number) for number in range(THREADS)]
    for number, found in enumerate(in_threads(lambda number: written(model, options, number))):
        assert not isinstance(found, Exception), found
        assert [text.tolist() for text in found] == [text.tolist() for text in alone[number]]
