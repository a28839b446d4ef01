"""In-context retrieval: the base reads a passage of the training text that fits what came last, and goes on from there.

Source: In-Context RALM (arXiv:2302.00083); Memory Decoder (arXiv:2508.09874) compares with it.
"""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from memlm.config import MAX_COUNT
from memlm.corpus.blocks import Block, Corpus, Split
from memlm.errors import ConfigError, InputError
from memlm.evaluate.config import InContextConfig, PassageConfig
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
        return np.append(0, np.cumsum([int(block.predicted.sum()) for block in self.blocks])).astype(np.int64)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> Block:
        return self.blocks[index]


def passages_of(split: Split, tokens: int, bos: int | None = None, eos: int | None = None) -> list[NDArray[np.int32]]:
    """The documents of a split in pieces of so many tokens at most, without a BOS in front and an EOS behind."""
    found = []
    for document in split.documents():
        start, end = 0, len(document)
        start += bos is not None and end > start and document[start] == bos
        end -= eos is not None and end > start and document[end - 1] == eos
        found += [document[at : min(at + tokens, end)] for at in range(int(start), int(end), tokens)]
    return found


def _training_passages(corpus: Corpus, tokens: int) -> tuple[list[NDArray[np.int32]], int | None]:
    """`passages_of` the training split, and the id of a BOS.

    Raises:
        InputError: There are none.
    """
    special = (corpus.tokenizer.bos_token_id, corpus.tokenizer.eos_token_id)
    bos, eos = (i if isinstance(i, int) else None for i in special)
    if not (found := passages_of(corpus.split("train"), tokens, bos, eos)):
        raise InputError(f"corpus {corpus.folder} has no training text to retrieve from")
    return found, bos


def _between(tokenizer: Any) -> NDArray[np.int32]:
    """What parts passage and text: an empty line, where it is few tokens."""
    found = np.array(tokenizer("\n\n", add_special_tokens=False)["input_ids"], np.int32)
    return found if tokenizer.decode(found) == "\n\n" and len(found) <= _BETWEEN - 1 else found[:0]


def _in_front(
    passage: NDArray[np.int32], text: NDArray[np.int32], between: NDArray[np.int32], bos: int | None, room: int
) -> NDArray[np.int32]:
    """A passage in front of the end of a text, of which, with a BOS that stays first, `room` tokens are kept."""
    front = text[:1] if bos is not None and len(text) and text[0] == bos else text[:0]
    rest = text[max(len(front), len(text) - room + len(front)) :]
    return np.concatenate([front, passage, between, rest]).astype(np.int32)


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
    passages, bos = _training_passages(corpus, config.passage_tokens)
    windows = _windows(text, config)
    queries = [block.input_ids[max(0, at - config.query_tokens) : at] for block, _, at in windows]
    between = _between(tokenizer)
    known, asked = ([str(tokenizer.decode(t, skip_special_tokens=True)) for t in part] for part in (passages, queries))
    best = ByWords(known).best(asked) if config.encoder is None else by_meaning(known, asked, config.encoder)
    blocks, positions, first = [], [], 0
    for (block, place, at), number in zip(windows, best, strict=True):
        ahead = np.flatnonzero(block.predicted)[place : place + config.stride]
        count = int((ahead == at + np.arange(len(ahead))).sum())  # a document may end before
        room = context - config.passage_tokens - len(between)
        whole = _in_front(passages[number], block.input_ids[: at + count], between, bos, room)
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
    wanted = config.context or block_size + config.passage_tokens + _BETWEEN
    longest = longest_context(load_config(base))
    context = wanted if longest is None else min(wanted, longest)
    check_in_context(config, context)
    return context


def check_in_context(config: PassageConfig, context: int) -> None:
    """Raise unless passage and some text fit into the context, and the search is installed.

    Raises:
        ConfigError: They do not, or it is not.
    """
    if config.passage_tokens + config.stride + _BETWEEN > context:
        raise ConfigError(
            f"in_context.passage_tokens = {config.passage_tokens}: leaves no room for text in a context of {context};"
            " lower it"
        )
    if getattr(config, "encoder", None) is None and find_spec("bm25s") is None:
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


def _windows(split: Split, config: InContextConfig) -> list[tuple[Block, int, int]]:
    """Where predictions of `stride` tokens begin, evenly spread: the block, which of its positions, and which token."""
    starts = []
    for number, predicted in enumerate(np.diff(split.position_starts).tolist()):
        starts += [(number, place) for place in range(0, predicted, config.stride)]
    wanted = min(len(starts), -(-config.positions // config.stride))
    chosen = np.linspace(0, len(starts) - 1, wanted).round().astype(int)
    found = []
    for number, place in (starts[i] for i in np.unique(chosen)):
        block = split[number]
        found.append((block, place, int(np.flatnonzero(block.predicted)[place])))
    return found


class ByWords:
    """Finds passages by BM25."""

    def __init__(self, passages: Sequence[str]) -> None:
        import bm25s

        self._index = bm25s.BM25()
        with _no_bars():
            self._index.index(bm25s.tokenize(list(passages), show_progress=False), show_progress=False)

    def best(self, queries: Sequence[str]) -> list[int]:
        """The passage that BM25 likes best for each query; the first where none has a word of it."""
        import bm25s

        found = []
        with _no_bars():
            for query in bm25s.tokenize(list(queries), show_progress=False, return_ids=False):
                known = [str(token) for token in query if token in self._index.vocab_dict]
                found.append(int(self._index.get_scores(known).argmax()) if known else 0)
        return found


def _no_bars() -> contextlib.redirect_stderr:
    return contextlib.redirect_stderr(io.StringIO())  # bm25s draws them even where it is told not to


class InContextBase(nn.Module):
    """A base that goes on from prompts with a passage in front, which is found anew every few tokens.

    Its cache serves no longer than a passage does.
    """

    def __init__(self, base: PreTrainedModel, corpus: Corpus, config: PassageConfig | None = None) -> None:
        """
        Args:
            corpus: Passages are its training split's, and the tokenizer is its.
            config: By default if None.

        Raises:
            ConfigError: bm25s is not installed, or passage and text do not fit the context.
            InputError: The training split is empty.
        """
        super().__init__()
        self.base, self._config, self._tokenizer = base, config or PassageConfig(), corpus.tokenizer
        longest = longest_context(base.config)
        self._context = min(self._config.context or longest or MAX_COUNT, longest or MAX_COUNT)
        check_in_context(self._config, self._context)
        self._passages, self._bos = _training_passages(corpus, self._config.passage_tokens)
        self._between = _between(self._tokenizer)
        self._words = ByWords([self._text(passage) for passage in self._passages])

    @property
    def generation_config(self) -> Any:
        return self.base.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self.base.generation_config = value

    def _text(self, tokens: Any) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def read(self, text: Int[Tensor, "T"]) -> Int[Tensor, "R"]:
        """What the base reads to go on from a text: the passage for its end, and the text as far as there is room."""
        tokens = text.cpu().numpy()
        number = self._words.best([self._text(tokens[-self._config.query_tokens :])])[0]
        room = self._context - self._config.passage_tokens - len(self._between) - self._config.stride
        whole = _in_front(self._passages[number], tokens, self._between, self._bos, room)
        return torch.from_numpy(whole).to(text)

    @torch.inference_mode()
    def generate(
        self, prompts: Int[Tensor, "B T"], *, max_new_tokens: int, streamer: Any = None, **options: Any
    ) -> Int[Tensor, "B T+N"]:
        """As transformers' own, for prompts without padding and so many tokens that no text ends before; what is not
        named here is passed on."""
        texts = prompts
        for name in ("attention_mask", "min_new_tokens"):
            options.pop(name, None)
        if streamer is not None:
            streamer.put(prompts.cpu())
        for start in range(0, max_new_tokens, self._config.stride):
            count = min(self._config.stride, max_new_tokens - start)
            read = [self.read(text) for text in texts]
            padded = pad_sequence(read, batch_first=True, padding_side="left")
            mask = pad_sequence([torch.ones_like(tokens) for tokens in read], batch_first=True, padding_side="left")
            found = self.base.generate(  # type: ignore[operator]
                padded,
                attention_mask=mask,
                max_new_tokens=count,
                min_new_tokens=count,
                streamer=None if streamer is None else _NewOnly(streamer),
                **options,
            )
            texts = torch.cat([texts, found[:, padded.shape[1] :]], 1)
        return texts


class _NewOnly:
    """A streamer that passes on all but what a call was given."""

    def __init__(self, to: Any) -> None:
        self._to, self._begun = to, False

    def put(self, value: Tensor) -> None:
        if self._begun:
            self._to.put(value)
        self._begun = True

    def end(self) -> None:
        pass


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
        order, found = sorted(range(len(ids)), key=lambda number: len(ids[number])), []
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            tokens = pad_sequence([torch.tensor(ids[number]) for number in part], batch_first=True).to(device)
            lengths = torch.tensor([len(ids[number]) for number in part], device=device)[:, None]
            mask = torch.arange(tokens.shape[1], device=device) < lengths
            states = model(input_ids=tokens, attention_mask=mask.long())[0].float()
            means = (states * mask[..., None]).sum(1) / lengths
            found.append(torch.nn.functional.normalize(means, dim=-1).cpu())
            bar.update(len(part))
        return torch.cat(found)[torch.tensor(order).argsort()]

    with progress_bar(len(passages) + len(queries), "embedding", unit="text") as bar:
        keys = embedded(passages, bar)
        return [int(number) for part in embedded(queries, bar).split(1024) for number in (part @ keys.T).argmax(1)]
