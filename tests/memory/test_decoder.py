"""MemoryDecoder beyond the shared protocol: its loss in training, and its window."""

import sys
import warnings
from functools import cache, partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from families import family_model, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from memories import LONG_TEXT, decoder_memory
from reference_lm import dense_distillation_loss, dense_targets, window_start, windowed_hidden
from torch.overrides import TorchFunctionMode

from memlm.errors import ConfigError
from memlm.memory.decoder import MemoryDecoder

VOCAB, PADDING = 40, 5
CLOSE = {"rtol": 0, "atol": 1e-4}  # see tests/memory/test_protocol.py


def windowed(window: int | None, family: str = "llama") -> MemoryDecoder:
    return decoder_memory(VOCAB, padding=PADDING, window=window, family=family)


some_tokens = partial(token_ids, vocab_size=VOCAB)


@cache
def shared() -> MemoryDecoder:
    return windowed(None)


def shared_with(window: int) -> MemoryDecoder:
    """One memory for all examples of a property; making one takes longer than an example."""
    shared().set_window(window)
    return shared()


@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
def test_forward_gives_the_dense_loss_of_a_padded_batch(kl_weight: float) -> None:
    memory = windowed(None)
    tokens = some_tokens(3, 9)
    labels = tokens.clone()
    labels[0, 6:] = -100  # padding on the right
    labels[1, :4] = -100  # context that another block predicts
    labels[:, 0] = -100
    expected_places = [(row, place) for row in range(3) for place in range(1, 9) if labels[row, place] != -100]
    positions = len(expected_places)
    counts = torch.arange(positions) % 4 + 1
    rng = torch.Generator().manual_seed(1)
    ids = torch.cat([torch.randperm(VOCAB, generator=rng)[:count] for count in counts.tolist()]).int()
    probs = torch.rand(len(ids), generator=rng) + 0.1

    found = memory(tokens, labels, kl_weight, target_counts=counts, target_ids=ids, target_probs=probs)
    found.loss.backward()
    gradient = memory.decoder.model.layers[0].mlp.up_proj.weight.grad.clone()
    memory.zero_grad()

    hidden = memory.decoder.model(input_ids=tokens).last_hidden_state
    loss, kl, cross_entropy = dense_distillation_loss(
        torch.stack([hidden[row, place - 1] for row, place in expected_places]),
        memory.decoder.lm_head.weight,
        None,
        torch.tensor([int(tokens[row, place]) for row, place in expected_places]),
        dense_targets(counts, ids, probs, VOCAB),
        kl_weight=kl_weight,
        vocab_size=VOCAB,
    )
    loss.backward()
    torch.testing.assert_close(found.loss.double(), loss, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.cross_entropy.double(), cross_entropy, rtol=1e-5, atol=1e-4)
    if kl_weight:
        torch.testing.assert_close(found.kl.double(), kl, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient, memory.decoder.model.layers[0].mlp.up_proj.weight.grad, rtol=1e-3, atol=1e-4)


def test_what_stands_in_the_padding_does_not_change_the_loss() -> None:
    memory = windowed(None)
    tokens = some_tokens(2, 8)
    labels = tokens.clone()
    labels[0, 5:] = -100
    other = tokens.clone()
    other[0, 5:] = 7
    assert memory(tokens, labels, 0.0).loss == memory(other, labels, 0.0).loss


def test_label_log_probs_equal_a_plain_forward_at_temperature_one() -> None:
    memory = windowed(None)
    tokens = some_tokens(2, 10)
    labels = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], 1)
    with torch.no_grad():
        scores = memory.label_log_probs(memory.step(tokens), labels)
        plain = memory.decoder(input_ids=tokens).logits[..., :VOCAB].log_softmax(-1)
    expected = plain[:, :-1].gather(2, tokens[:, 1:, None]).flatten()
    torch.testing.assert_close(scores["label"], expected, **CLOSE)


def test_the_temperature_divides_the_logits() -> None:
    memory = windowed(None)
    tokens = some_tokens(1, 6)
    with torch.no_grad():
        plain = memory.decoder(input_ids=tokens).logits[..., :VOCAB]
        memory.settings = memory.settings.model_copy(update={"memory_temperature": 2.5})
        votes = memory.votes(memory.step(tokens), slice(None))
    torch.testing.assert_close(votes, (plain / 2.5).log_softmax(-1), **CLOSE)


def test_settings_come_from_the_config_where_none_are_given() -> None:
    memory = MemoryDecoder(family_model("gpt2", VOCAB))
    assert (memory.vocab_size, memory.context_length, memory.window) == (VOCAB, 24, 24)
    assert MemoryDecoder(family_model("bloom", VOCAB)).window is None


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(0, 200))
def test_the_window_jumps_by_half_of_itself_when_it_is_full(window: int, place: int) -> None:
    memory = shared_with(window)
    start = int(memory.reader.window_starts(torch.tensor([place]))[0])
    assert start == window_start(place, window)
    assert 1 <= place - start + 1 <= window
    assert place < window or place - start + 1 > window - window // 2


@pytest.mark.filterwarnings(LONG_TEXT)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bloom", "opt"])
@pytest.mark.parametrize("window", [2, 5, 8, None])
def test_states_equal_a_separate_pass_over_what_each_token_sees(family: str, window: int | None) -> None:
    memory = windowed(window, family)
    tokens = some_tokens(1, 19)
    with torch.no_grad():
        found = memory.step(tokens)[0]
    torch.testing.assert_close(found, windowed_hidden(memory.decoder, tokens[0].tolist(), window), **CLOSE)


@settings(deadline=None, max_examples=40)
@given(
    window=st.integers(2, 9),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    cuts=st.lists(st.integers(1, 7), max_size=6),
)
@pytest.mark.slow
def test_however_a_text_is_cut_and_padded_its_states_are_the_same(
    window: int, lengths: list[int], cuts: list[int]
) -> None:
    memory = shared_with(window)
    width = max(lengths)
    tokens = some_tokens(len(lengths), width)
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths])
    edges = [0, *(e for e in torch.tensor([0, *cuts]).cumsum(0)[1:].tolist() if e < width), width]
    read = memory.new_cache(len(lengths))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the text is longer than the memory's window")
        states = [memory.step(tokens[:, a:b], attention_mask=mask[:, a:b], cache=read) for a, b in pairwise(edges)]
    found = torch.cat(states, 1)
    for row, length in enumerate(lengths):
        by_hand = windowed_hidden(memory.decoder, tokens[row, -length:].tolist(), window)
        torch.testing.assert_close(found[row, -length:], by_hand, **CLOSE)


def test_a_text_beyond_the_window_is_said_once() -> None:
    memory = windowed(8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        memory.step(some_tokens(1, 8))
        assert not caught
        memory.step(some_tokens(1, 9))
        memory.step(some_tokens(1, 30))
    assert [str(w.message) for w in caught] == [
        "the text is longer than the memory's window of 8 tokens; the memory now sees between 4 and 8 of the latest"
        " tokens, the base all of them"
    ]


def test_rows_shorter_than_the_window_still_use_their_cache() -> None:
    memory = windowed(16)
    assert memory.reader.keeps_keys
    kept = memory.new_cache(1)
    read: list[int] = []
    memory.decoder.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for token in some_tokens(1, 17).split(1, 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            memory.step(token, cache=kept)
    assert read == [1] * 16 + [9], "one token at a time, and half of the window again where it jumps"


def test_a_window_cannot_be_longer_than_the_positions_it_has() -> None:
    memory = MemoryDecoder(family_model("gpt2", VOCAB))
    memory.set_window(20)
    assert memory.window == 20
    with pytest.raises(ConfigError, match="memory_window = 25: the memory has positions for 24 tokens"):
        memory.set_window(25)


@pytest.mark.parametrize(("masked", "most"), [(False, 0), (True, 1)])
def test_a_step_within_the_window_asks_the_device_for_no_length(masked: bool, most: int) -> None:
    """Each question makes the host wait: whether a window moves is known without one, padding of a mask is not."""

    class Questions(TorchFunctionMode):
        asked = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names = {"item", "tolist", "equal", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu"}
            found = sys._getframe(1)
            ours = found.f_code.co_filename.endswith("reading.py")
            self.asked += ours and getattr(func, "__name__", "") in names
            return func(*args, **(kwargs or {}))

    memory = windowed(16)
    kept, tokens = memory.new_cache(2), some_tokens(2, 12)
    for end in range(1, 13):
        mask = torch.ones(2, end, dtype=torch.bool) if masked else None
        with Questions() as questions:
            memory.step(tokens[:, end - 1 : end], attention_mask=mask, cache=kept)
        assert questions.asked <= most
