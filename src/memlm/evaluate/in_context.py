"""In-context retrieval: the base reads a passage of the training text that fits what came last, and goes on from there.

Source: In-Context RALM (arXiv:2302.00083); Memory Decoder (arXiv:2508.09874) compares with it.
"""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from memlm.corpus.blocks import Block, Corpus, Split
from memlm.errors import ConfigError, InputError
from memlm.evaluate.config import InContextConfig
from memlm.files import digest
from memlm.models.identity import model_identity
from memlm.models.loading import default_device, load_config, load_encoder, longest_context, parse_dtype, resolve
from memlm.models.tokenizers import load_tokenizer
from memlm.progress import progress_bar
from memlm.scores.table import BASE, Scorers, Text

_LONGEST_READ = 8192  # tokens of a text that an encoder reads
_BETWEEN = 4  # tokens at most beside passage and text: a BOS, and what parts them


@dataclass(frozen=True, eq=False)
class InContext:
    """Blocks with a passage in front, each predicting a few positions of a split."""

    blocks: Sequence[Block]
    positions: NDArray[np.int64]
    """Their numbers in the split."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """`(blocks,)` tokens in each block."""
        return np.array([len(block.input_ids) for block in self.blocks], dtype=np.int64)

    @property
    def position_starts(self) -> NDArray[np.int64]:
        """`(blocks + 1,)` the first position of each block, and the number of positions."""
        return self._starts

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.append(0, np.cumsum([int(block.predicted.sum()) for block in self.blocks])).astype(np.int64)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> Block:
        return self.blocks[index]


def passages_of(split: Split, tokens: int, bos: int | None = None, eos: int | None = None) -> list[NDArray[np.int32]]:
    """The documents of a split in pieces of so many tokens at most, without a BOS in front and an EOS behind."""
    found = []
    for start, end in zip(split.offsets[:-1], split.offsets[1:], strict=True):
        start += bos is not None and end > start and split.tokens[start] == bos
        end -= eos is not None and end > start and split.tokens[end - 1] == eos
        found += [np.asarray(split.tokens[at : min(at + tokens, end)]) for at in range(int(start), int(end), tokens)]
    return found


def in_context_blocks(corpus: Corpus, split: str, config: InContextConfig) -> InContext:
    """The blocks that in-context retrieval reads to predict some positions of a split.

    Each is what the base would read there without retrieval, with the passage of the training split that is found for
    the latest tokens in front; a BOS stays first. What does not fit into the context is left out at the far end.

    Raises:
        ConfigError: bm25s is not installed, or passage and text do not fit the context.
        InputError: The training split is empty.
        ModelError: The encoder cannot be reached.
    """
    context = config.context or corpus.config.block_size + config.passage_tokens + _BETWEEN
    check_in_context(config, context)
    text, tokenizer = corpus.split(split), corpus.tokenizer
    bos, eos = (i if isinstance(i, int) else None for i in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    passages = passages_of(corpus.split("train"), config.passage_tokens, bos, eos)
    if not passages:
        raise InputError(f"corpus {corpus.folder} has no training text to retrieve from")
    windows = _windows(text, config)
    queries = [block.input_ids[max(0, at - config.query_tokens) : at] for block, at in windows]
    between = np.array(tokenizer("\n\n", add_special_tokens=False)["input_ids"], np.int32)
    between = between if tokenizer.decode(between) == "\n\n" and len(between) <= _BETWEEN - 1 else between[:0]
    known, asked = ([str(tokenizer.decode(t, skip_special_tokens=True)) for t in part] for part in (passages, queries))
    best = by_words(known, asked) if config.encoder is None else by_meaning(known, asked, config.encoder)
    blocks, positions, first = [], [], 0
    for (block, at), number in zip(windows, best, strict=True):
        predicted = np.flatnonzero(block.predicted)
        place = int(np.searchsorted(predicted, at))
        ahead = predicted[place : place + config.stride]
        count = int((ahead == at + np.arange(len(ahead))).sum())  # a document may end before
        end = at + count
        ids = block.input_ids[:end]
        front = ids[:1] if bos is not None and ids[0] == bos else ids[:0]
        room = context - config.passage_tokens - len(front) - len(between)
        rest = ids[max(len(front), end - room) :]
        whole = np.concatenate([front, passages[number], between, rest]).astype(np.int32)
        marks = np.zeros(len(whole), bool)
        marks[len(whole) - count :] = True
        blocks.append(Block(whole, marks, first))
        positions.append(block.first_position + place + np.arange(count))
        first += count
    return InContext(blocks, np.concatenate(positions).astype(np.int64))


def context_of(config: InContextConfig, block_size: int, base: str) -> int:
    """Tokens that are read at a time, as far as the base has positions: as asked for, else passage and text.

    Raises:
        ConfigError: Passage and text do not fit.
    """
    wanted, longest = (
        config.context or block_size + config.passage_tokens + _BETWEEN,
        longest_context(load_config(base)),
    )
    context = wanted if longest is None else min(wanted, longest)
    check_in_context(config, context)
    return context


def check_in_context(config: InContextConfig, context: int) -> None:
    """Raise unless passage and some text fit into the context, and the search is installed.

    Raises:
        ConfigError: They do not, or it is not.
    """
    if config.passage_tokens + config.stride + _BETWEEN > context:
        raise ConfigError(
            f"in_context.passage_tokens = {config.passage_tokens}: leaves no room for text in a context of {context};"
            " lower it"
        )
    if config.encoder is None and find_spec("bm25s") is None:
        raise ConfigError("in-context retrieval needs bm25s: pip install 'memlm[compare]'")


def in_context_label_log_probs(
    corpus: Corpus, base: str, config: InContextConfig, *, dtype: str, batch_tokens: int = 4096, split: str = "test"
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Positions of a split, and the label log-probs that the base gives there with a passage in front.

    Scores are kept in the cache, and an interrupted pass goes on.

    Args:
        corpus: Passages are its training split's.
        base: Path, hub id or packaged name.
        dtype: `float32`, `bfloat16`, `float16` or `auto`.

    Raises:
        ConfigError: bm25s is not installed; passage and text do not fit the context, or this not the base.
    """
    config = config.model_copy(update={"context": context_of(config, corpus.config.block_size, base)})
    found = in_context_blocks(corpus, split, config)
    scorers = Scorers(
        base, {}, vocab_size=corpus.vocab_size, dtype=parse_dtype(dtype, default_device()), batch_tokens=batch_tokens
    )
    how = "bm25" if config.encoder is None else model_identity(config.encoder)
    name = digest([corpus.manifest.hash, config.model_dump(exclude={"encoder"}), how])
    text = Text(name, split, found, corpus.manifest.tokenizer, str(corpus.folder))
    return found.positions, scorers.score(text)[BASE].label.astype(np.float64)


def _windows(split: Split, config: InContextConfig) -> list[tuple[Block, int]]:
    """Blocks and places in them at which predictions of `stride` tokens begin, evenly spread."""
    starts = []
    for number in range(len(split)):
        predicted = int(np.diff(split.position_starts[number : number + 2])[0])
        starts += [(number, place) for place in range(0, predicted, config.stride)]
    wanted = min(len(starts), -(-config.positions // config.stride))
    chosen = np.linspace(0, len(starts) - 1, wanted).round().astype(int)
    found = []
    for number, place in (starts[i] for i in np.unique(chosen)):
        block = split[number]
        found.append((block, int(np.flatnonzero(block.predicted)[place])))
    return found


def by_words(passages: list[str], queries: list[str]) -> list[int]:
    """The passage that BM25 likes best for each query; the first where none has a word of it."""
    import bm25s

    with contextlib.redirect_stderr(io.StringIO()):  # it draws bars even where it is told not to
        index = bm25s.BM25()
        index.index(bm25s.tokenize(passages, show_progress=False), show_progress=False)
        words = bm25s.tokenize(queries, show_progress=False, return_ids=False)
        best = []
        for query in words:
            known = [str(token) for token in query if token in index.vocab_dict]
            best.append(int(index.get_scores(known).argmax()) if known else 0)
    return best


@torch.no_grad()
def by_meaning(passages: list[str], queries: list[str], encoder: str, *, batch_size: int = 32) -> list[int]:
    """The passage that is nearest to each query: cosine of averaged last hidden states.

    Args:
        encoder: Path, hub id or packaged name of a model of transformers.

    Raises:
        ModelError: It cannot be reached.
    """
    device = default_device()
    model, tokenizer = load_encoder(encoder), load_tokenizer(resolve(encoder))
    model.to(device)  # type: ignore[arg-type]
    longest = min(longest_context(model.config) or _LONGEST_READ, _LONGEST_READ)

    def embedded(texts: list[str], bar: Any) -> Tensor:
        ids = [tokenizer(text, truncation=True, max_length=longest)["input_ids"] or [0] for text in texts]
        order, found = sorted(range(len(ids)), key=lambda number: len(ids[number])), [torch.empty(0)] * len(ids)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            tokens = pad_sequence([torch.tensor(ids[number]) for number in part], batch_first=True).to(device)
            lengths = torch.tensor([len(ids[number]) for number in part], device=device)[:, None]
            mask = torch.arange(tokens.shape[1], device=device) < lengths
            states = model(input_ids=tokens, attention_mask=mask.long())[0].float()
            means = (states * mask[..., None]).sum(1) / lengths
            for number, mean in zip(part, torch.nn.functional.normalize(means, dim=-1).cpu(), strict=True):
                found[number] = mean
            bar.update(len(part))
        return torch.stack(found)

    with progress_bar(len(passages) + len(queries), "embedding", unit="text") as bar:
        keys = embedded(passages, bar)
        return [int(number) for part in embedded(queries, bar).split(1024) for number in (part @ keys.T).argmax(1)]
