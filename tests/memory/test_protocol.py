"""What every memory must do, whatever its kind. A new kind adds one line to MEMORIES.

A memory with a tap gets activations that depend on the token alone, so what it says is as comparable as what it reads.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from families import token_ids
from memories import LONG_TEXT, decoder_memory
from torch import Tensor

from memlm.errors import ModelError
from memlm.memory.config import KINDS
from memlm.memory.decoder import MemoryDecoder
from memlm.memory.loading import load_memory
from memlm.memory.mlp import FFNStyle, MLPMemory, MLPSettings
from memlm.memory.protocol import Memory
from memlm.memory.retrieval import RetrievalMemory
from memlm.memory.voter import VoterCache
from memlm.models.loading import load_causal_lm
from memlm.targets.config import RetrievalConfig
from memlm.targets.votes import SparseProbs

VOCAB, PADDING = 40, 5
WIDTH = 32  # of the activations, as in tests/conftest.py


def decoder(window: int | None = None, family: str = "llama") -> MemoryDecoder:
    return decoder_memory(VOCAB, padding=PADDING, window=window, family=family, temperature=1.5)


def mlp(*, norm: Literal["layer", "rms"], gated: bool, bias: bool, width: int = WIDTH) -> MLPMemory:
    """All weights are random, those that start at zero too."""
    settings = MLPSettings(
        kind="mlp",
        vocab_size=VOCAB,
        memory_temperature=1.5,
        tap="model.layers.1.mlp",
        input_width=WIDTH,
        base_blocks=2,
        layers=3,
        width=width,
        ffn_width=40,
        style=FFNStyle(gated=gated, bias=bias, norm=norm, norm_eps=1e-5, activation="silu"),
    )
    memory = MLPMemory(settings)
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return memory


def retrieval(datastore: Path, *, own_teacher: bool) -> RetrievalMemory:
    """All entries vote, and nearly alike.

    Queries are rounded to float16. Where another order of sums rounds one to its neighbour, a distance changes by some
    0.003; at this temperature votes do not change visibly, and no entry can drop out of the nearest.
    """
    config = RetrievalConfig(k=1_000_000, target_temperature=100.0)
    memory = RetrievalMemory(datastore, config)
    teacher = load_causal_lm(memory.store.teacher) if own_teacher else None
    return RetrievalMemory(datastore, config, teacher=teacher)


MEMORIES: dict[str, Callable[[Path], Memory]] = {
    "decoder": lambda _: decoder(),
    "decoder-window": lambda _: decoder(window=8),
    "decoder-odd-window": lambda _: decoder(window=7),
    "decoder-gpt2": lambda _: decoder(window=24, family="gpt2"),
    "decoder-gpt2-window": lambda _: decoder(window=8, family="gpt2"),
    "decoder-gemma3": lambda _: decoder(family="gemma3"),
    "decoder-gemma3-window": lambda _: decoder(window=10, family="gemma3"),
    "decoder-bloom": lambda _: decoder(family="bloom"),
    "decoder-bloom-window": lambda _: decoder(window=8, family="bloom"),
    "decoder-opt-window": lambda _: decoder(window=9, family="opt"),
    "mlp-gated": lambda _: mlp(norm="rms", gated=True, bias=False),
    "mlp-plain": lambda _: mlp(norm="layer", gated=False, bias=True),
    "mlp-projected": lambda _: mlp(norm="rms", gated=True, bias=False, width=24),
    "retrieval": lambda datastore: retrieval(datastore, own_teacher=False),
    "retrieval-own-teacher": lambda datastore: retrieval(datastore, own_teacher=True),
}
"""Name to what makes the memory; each is given the folder of a datastore."""
LENGTH = 21  # longer than two and a half of the windows above
# float32 states of order 1 behind a head of 32 products, added up in another order: ten times what is seen
CLOSE = {"rtol": 0, "atol": 1e-4}

pytestmark = pytest.mark.filterwarnings(LONG_TEXT)


QUICK = {"decoder", "decoder-window", "decoder-gpt2-window", "mlp-gated", "retrieval"}


@pytest.fixture(params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MEMORIES])
def memory(request: pytest.FixtureRequest, datastore_folder: Path) -> Memory:
    return MEMORIES[request.param](datastore_folder).eval()


some_tokens = partial(token_ids, length=LENGTH, vocab_size=VOCAB)


ACTIVATIONS = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(2))
"""Of each token."""


@torch.no_grad()
def step(memory: Memory, tokens: Tensor, cache: VoterCache | None = None, mask: Tensor | None = None) -> Any:
    activations = ACTIVATIONS[tokens] if memory.tap is not None else None
    return memory.step(tokens, activations, attention_mask=mask, cache=cache)


@torch.no_grad()
def log_votes(memory: Memory, state: Any, keep: slice | Tensor) -> Tensor:
    """Votes `(B, T, V)` as log-probs, whether they come dense or sparse."""
    found = memory.votes(state, keep)
    if isinstance(found, SparseProbs):
        return found.dense(memory.vocab_size).log().reshape(len(state), -1, memory.vocab_size)
    return found


def read(memory: Memory, tokens: Tensor, cache: VoterCache | None = None, mask: Tensor | None = None) -> Tensor:
    """Log-probs after each of `tokens`."""
    return log_votes(memory, step(memory, tokens, cache, mask), slice(None))


def test_votes_are_normalised_log_probs_in_float32(memory: Memory) -> None:
    votes = read(memory, some_tokens(2))
    assert votes.shape == (2, LENGTH, memory.vocab_size)
    assert votes.dtype == torch.float32
    torch.testing.assert_close(votes.logsumexp(-1), torch.zeros(2, LENGTH), rtol=0, atol=1e-5)


def test_votes_are_given_only_where_asked(memory: Memory) -> None:
    state = step(memory, some_tokens(2))
    everywhere = log_votes(memory, state, slice(None))
    torch.testing.assert_close(log_votes(memory, state, slice(-1, None)), everywhere[:, -1:], **CLOSE)
    places = torch.tensor([0, 4, 5])
    torch.testing.assert_close(log_votes(memory, state, places), everywhere[:, places], **CLOSE)


@pytest.mark.grid(3)
@pytest.mark.parametrize("chunks", [[1] * LENGTH, [5, 1, 1, 9, 5], [20, 1], [2, 19]], ids=str)
def test_reading_with_a_cache_equals_reading_at_once(memory: Memory, chunks: list[int]) -> None:
    tokens = some_tokens(2)
    cache = memory.new_cache(2)
    pieces = [read(memory, piece, cache) for piece in tokens.split(chunks, 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), read(memory, tokens), **CLOSE)


def test_a_batch_equals_its_rows_alone(memory: Memory) -> None:
    tokens = some_tokens(3)
    together = read(memory, tokens)
    for row in range(3):
        torch.testing.assert_close(together[row : row + 1], read(memory, tokens[row : row + 1]), **CLOSE)


@pytest.mark.grid(2)
@pytest.mark.parametrize("chunks", [[LENGTH], [1] * LENGTH, [12, 3, 6]], ids=str)
def test_left_padding_changes_nothing(memory: Memory, chunks: list[int]) -> None:
    lengths = [LENGTH, LENGTH - 4, 3]
    tokens = some_tokens(3)
    mask = torch.stack([torch.arange(LENGTH) >= LENGTH - length for length in lengths])
    cache = memory.new_cache(3)
    pieces = [
        read(memory, piece, cache, there)
        for piece, there in zip(tokens.split(chunks, 1), mask.split(chunks, 1), strict=True)
    ]
    together = torch.cat(pieces, 1)
    for row, length in enumerate(lengths):
        alone = read(memory, tokens[row : row + 1, -length:])
        torch.testing.assert_close(together[row : row + 1, -length:], alone, **CLOSE)
    garbage = torch.where(mask, tokens, 3 + (tokens + 1) % (VOCAB - 3))
    torch.testing.assert_close(read(memory, garbage, mask=mask)[mask], together[mask], **CLOSE)


@pytest.mark.grid(3)
@pytest.mark.parametrize("cropped", [0, 1, 3, 11, LENGTH])
def test_crop_then_going_on_equals_a_fresh_read(memory: Memory, cropped: int) -> None:
    tokens, others = some_tokens(2), some_tokens(2, length=14, seed=1)
    cache = memory.new_cache(2)
    for piece in tokens.split([15, 6], 1):
        read(memory, piece, cache)
    cache.crop(cropped)
    went_on = torch.cat([read(memory, piece, cache) for piece in others.split([2, 12], 1)], 1)
    fresh = read(memory, torch.cat([tokens[:, : LENGTH - cropped], others], 1))[:, -14:]
    torch.testing.assert_close(went_on, fresh, **CLOSE)


def test_selected_rows_go_on_as_themselves(memory: Memory) -> None:
    tokens, others = some_tokens(3), some_tokens(4, length=6, seed=1)
    mask = torch.arange(LENGTH)[None] >= torch.tensor([[0], [5], [2]])
    rows = torch.tensor([2, 0, 2, 1])
    cache = memory.new_cache(3)
    read(memory, tokens, cache, mask)
    cache.select(rows)
    went_on = read(memory, others, cache)
    whole_mask = torch.cat([mask[rows], torch.ones(4, 6, dtype=torch.bool)], 1)
    fresh = read(memory, torch.cat([tokens[rows], others], 1), mask=whole_mask)[:, -6:]
    torch.testing.assert_close(went_on, fresh, **CLOSE)


def test_repeated_rows_stand_side_by_side(memory: Memory) -> None:
    tokens, others = some_tokens(2), some_tokens(6, length=4, seed=1)
    cache = memory.new_cache(2)
    read(memory, tokens, cache)
    cache.repeat(3)
    went_on = read(memory, others, cache)
    fresh = read(memory, torch.cat([tokens.repeat_interleave(3, 0), others], 1))[:, -4:]
    torch.testing.assert_close(went_on, fresh, **CLOSE)


def test_rows_of_an_empty_cache_can_be_repeated_and_selected(memory: Memory) -> None:
    cache = memory.new_cache(1)
    cache.repeat(3)
    cache.select(torch.tensor([0, 2]))
    tokens = some_tokens(2)
    torch.testing.assert_close(read(memory, tokens, cache), read(memory, tokens), **CLOSE)


def test_a_reset_cache_has_read_nothing(memory: Memory) -> None:
    cache = memory.new_cache(2)
    read(memory, some_tokens(2, seed=1), cache)
    cache.reset()
    torch.testing.assert_close(read(memory, some_tokens(2), cache), read(memory, some_tokens(2)), **CLOSE)


def test_label_scores_equal_those_read_off_the_votes(memory: Memory) -> None:
    tokens = some_tokens(2)
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    labels[1, :7] = -100
    there = labels != -100
    votes = read(memory, tokens)[there]
    with torch.no_grad():
        scores = memory.label_log_probs(step(memory, tokens), labels)
    assert {name: values.shape for name, values in scores.items()} == dict.fromkeys(
        ("label", "entropy", "top1", "top1_id"), (int(there.sum()),)
    )
    torch.testing.assert_close(scores["label"], votes.gather(1, labels[there][:, None])[:, 0], **CLOSE)
    torch.testing.assert_close(scores["entropy"], -torch.xlogy(votes.exp(), votes.exp()).sum(1), **CLOSE)
    torch.testing.assert_close(scores["top1"], votes.exp().amax(1), **CLOSE)
    chosen = votes.gather(1, scores["top1_id"].long()[:, None])[:, 0]  # of two nearly as likely, either will do
    torch.testing.assert_close(chosen, votes.amax(1), **CLOSE)


def test_a_saved_memory_votes_as_before(memory: Memory, model_folder: str, tmp_path: Path) -> None:
    memory.save_pretrained(tmp_path)
    loaded = load_memory(tmp_path, base=model_folder if memory.tap is not None else None)
    assert type(loaded) is type(memory)
    assert loaded.settings == memory.settings
    torch.testing.assert_close(read(loaded, some_tokens(2)), read(memory, some_tokens(2)), rtol=0, atol=0)
    assert not list(tmp_path.rglob("*.bin"))
    assert list(tmp_path.rglob("*.safetensors")) or memory.kind == "retrieval", "its weights are its datastore"


def test_every_kind_is_listed_here(datastore_folder: Path) -> None:
    assert {make(datastore_folder).kind for make in MEMORIES.values()} == set(KINDS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("make", [decoder, partial(mlp, norm="rms", gated=True, bias=False)], ids=["decoder", "mlp"])
def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(
    make: Callable[[], Memory], value: float, tmp_path: Path
) -> None:
    memory = make()
    memory.save_pretrained(tmp_path / "good")
    list(memory.parameters())[-1].data[3] = value
    match = r"has \d+ of [\d,]+ weights that are not finite, the first in \w+"
    with pytest.raises(ModelError, match=f"the memory for {tmp_path / 'bad'} {match}"):
        memory.save_pretrained(tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    memory.save_weights(tmp_path / "good")
    with pytest.raises(ModelError, match=f"memory {tmp_path / 'good'} {match}"):
        load_memory(tmp_path / "good")


def test_large_weights_whose_sum_overflows_are_finite(tmp_path: Path) -> None:
    memory = decoder().half()
    memory.decoder.get_input_embeddings().weight.data.fill_(60_000.0)
    memory.save_pretrained(tmp_path / "m")
    assert load_memory(tmp_path / "m").decoder.get_input_embeddings().weight.max() == 60_000
