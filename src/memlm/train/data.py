"""Training rows, from a targets folder or straight from a corpus, and how they become batches."""

import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets.table import MemoryMappedTable, concat_tables
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from memlm.corpus.blocks import IGNORE, MAX_VOCABULARY, Block, Blocks, Corpus, CorpusFacts, Split, open_tokenizer
from memlm.corpus.config import CorpusConfig
from memlm.datastore.index import Keys
from memlm.errors import ArtifactError, ConfigError
from memlm.manifest import Facts, Manifest, payload_file, read_manifest
from memlm.memory.protocol import predicting_places
from memlm.models.tokenizers import check_reads
from memlm.targets.config import IMPORTED, TargetsConfig
from memlm.targets.shards import TRAIN_SCHEMA, VALIDATION_FILE, VALIDATION_SCHEMA, check_rows


class _OwnCorpusFacts(CorpusFacts):
    hash: str
    """Of the corpus manifest."""


class TargetsFacts(Facts):
    """What readers of targets rely on."""

    positions: int = Field(ge=1)
    vocab_size: int = Field(ge=1, le=MAX_VOCABULARY)
    corpus: _OwnCorpusFacts
    corpus_config: dict[str, Any]


class TrainingData:
    """The training rows, validation blocks and tokenizer of a corpus or targets folder."""

    def __init__(self, folder: str | Path, *, with_targets: bool, left_out: tuple[int, int] | None = None) -> None:
        """
        Args:
            folder: What the corpus or the targets stage wrote.
            with_targets: Whether rows must carry targets.
            left_out: Number, from 0, of the fold of documents that is not read, of how many.

        Raises:
            ArtifactError: The folder is neither, or damaged; its rows are looked at when they are asked for.
            ConfigError: Targets are wanted and the folder is a corpus, or a fold is left out and it is none.
        """
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(folder, "targets", "corpus")
        self.with_targets, self._left_out = with_targets, left_out
        if left_out is not None and self.manifest.kind != "corpus":
            raise ConfigError(f"left_out: {folder} has targets of all documents; train such a teacher on the corpus")
        if self.manifest.kind == "corpus":
            if with_targets:
                how = "run memlm datastore and memlm targets, or leave out --kl-weight"
                raise ConfigError(f"{folder} is a corpus without targets: {how}")
            self._corpus = Corpus(folder)
            self.vocab_size, self.corpus_config = self._corpus.vocab_size, self._corpus.config
            self.corpus_hash, self.corpus_facts = self.manifest.hash, self.manifest.facts
        else:
            self._corpus, facts = None, TargetsFacts.of(folder, self.manifest)
            if self.manifest.config != IMPORTED:
                TargetsConfig.parse(self.manifest.config, "targets.")
            self.vocab_size, self.corpus_config = facts.vocab_size, CorpusConfig.parse(facts.corpus_config, "corpus.")
            self.corpus_hash, self.corpus_facts = facts.corpus.hash, self.manifest.facts["corpus"]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return open_tokenizer(self.folder, self.manifest, self.vocab_size)

    def check_read_by(self, model: str, role: str) -> None:
        """Raise as `check_reads` does unless `model`, called `role` in an error, can read these token ids."""
        names = {"data": str(self.folder), "label": f"{role} {model}"}
        check_reads(model, self.tokenizer, self.vocab_size, self.token_ids, **names)

    def token_ids(self) -> Iterator[NDArray[np.int32]]:
        """All its token ids, some at a time."""
        if self._corpus is not None:
            yield from self._corpus.token_ids()
        else:
            for part in (self.train, self.validation):
                assert isinstance(part, _ArrowTable)
                yield from part.token_ids()

    @property
    def longest_block(self) -> int:
        """Tokens of its longest row."""
        return int(max(part.lengths.max(initial=0) for part in (self.train, self.validation)))

    @cached_property
    def train(self) -> "Rows":
        if self._corpus is not None:
            split = self._corpus.split("train")
            if self._left_out is not None:
                fold, count = self._left_out
                split = split.only(split.folds(count) != fold)
            return CorpusRows(split)
        names = sorted(name for name in self.manifest.payload if re.fullmatch(r"train-\d{5,}\.arrow", name))
        rows = TargetRows([self._checked(name, TRAIN_SCHEMA) for name in names], with_targets=self.with_targets)
        if (there := int(rows.position_starts[-1])) != (positions := self.manifest.facts["positions"]):
            raise ArtifactError(f"{self.folder} holds targets of {there} positions, its manifest says {positions}")
        return rows

    @cached_property
    def validation(self) -> Blocks:
        if self._corpus is not None:
            return self._corpus.split("validation")
        return ArrowBlocks(self._checked(VALIDATION_FILE, VALIDATION_SCHEMA))

    def _checked(self, name: str, schema: pa.Schema) -> Path:
        path = payload_file(self.folder, self.manifest, name)
        check_rows(path, schema, self.vocab_size)
        return path


class Rows(Dataset):
    """Training rows: dictionaries of arrays."""

    lengths: NDArray[np.int64]
    """Tokens in each row."""
    position_starts: NDArray[np.int64]
    """`(rows + 1,)` the first position that each row predicts, and the number of positions."""
    support_starts: NDArray[np.int64]
    """`(rows + 1,)` the first of the targets' tokens that each row has, and their number; zeros without targets."""

    def __len__(self) -> int:
        return len(self.lengths)


class CorpusRows(Rows):
    """Blocks of a corpus, without targets."""

    def __init__(self, blocks: Split) -> None:
        self._blocks = blocks
        self.lengths = blocks.lengths
        self.position_starts = blocks.position_starts
        self.support_starts = np.zeros_like(blocks.position_starts)

    def __getitem__(self, index: int) -> dict[str, NDArray]:
        block = self._blocks[index]
        return {"input_ids": block.input_ids, "labels": block.labels}


class _ArrowTable:
    """Arrow files of a targets folder as one table, memory-mapped."""

    def __init__(
        self, paths: list[Path], column: str, predicted: Callable[[NDArray[np.int32]], NDArray[np.bool_]]
    ) -> None:
        """
        Args:
            paths: The files.
            column: A list column with an entry per token, read some rows at a time.
            predicted: Which of its entries stand for a predicted token.
        """
        tables = [MemoryMappedTable.from_file(str(path)) for path in paths]
        self._table = datasets.Dataset(concat_tables(tables)).with_format("numpy")  # type: ignore[arg-type]
        lengths, counts = [np.empty(0, np.int64)], [np.zeros(1, np.int64)]
        for chunk in self._table.data.column(column).chunks:
            offsets = chunk.offsets.to_numpy()
            before = np.append(0, predicted(chunk.flatten().to_numpy()).cumsum())
            lengths.append(np.diff(offsets))
            counts.append(np.diff(before[offsets - offsets[0]]))
        self.lengths = np.concatenate(lengths)
        self.position_starts = np.concatenate(counts).cumsum()

    def __len__(self) -> int:
        return len(self.lengths)

    def token_ids(self) -> Iterator[NDArray[np.int32]]:
        """Its token ids, some at a time."""
        yield from (chunk.flatten().to_numpy() for chunk in self._table.data.column("input_ids").chunks)


class TargetRows(_ArrowTable, Rows):
    """Rows of a targets folder."""

    def __init__(self, shards: list[Path], *, with_targets: bool) -> None:
        super().__init__(shards, "target_counts", lambda counts: counts > 0)
        self._with_targets = with_targets
        chunks = self._table.data.column("target_ids").chunks if with_targets else []
        support = [np.diff(chunk.offsets.to_numpy()) for chunk in chunks]
        self.support_starts = np.append(0, np.concatenate(support or [0 * self.lengths]).cumsum(dtype=np.int64))

    def __getitem__(self, index: int) -> dict[str, NDArray]:
        row = self._table[index]
        counts = row["target_counts"]
        row["labels"] = np.where(counts > 0, row["input_ids"], IGNORE)
        if self._with_targets:
            return row | {"target_counts": counts[counts > 0]}
        return {name: row[name] for name in ("input_ids", "labels")}


class AroundRows(Rows):
    """Rows that are made of others."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.lengths, self.position_starts = rows.lengths, rows.position_starts
        self.support_starts = rows.support_starts


class WithActivations(AroundRows):
    """Rows with the base's activations at the places that predict, read from a datastore's keys."""

    def __init__(self, rows: Rows, keys: Keys) -> None:
        super().__init__(rows)
        self._keys = keys

    def __getitem__(self, index: int) -> dict[str, NDArray]:
        return self.rows[index] | {"activations": self._keys.rows(*self.position_starts[index : index + 2])}


class WithBlank(AroundRows):
    """Rows, and as number -1 one that predicts nothing."""

    def __getitem__(self, index: int) -> dict[str, NDArray]:
        row = self.rows[max(index, 0)]
        if index >= 0:
            return row
        first = row["input_ids"][:1]
        return {name: values[:0] for name, values in row.items()} | {"input_ids": first, "labels": first * 0 + IGNORE}


class Share:
    """Every `count`-th block, from block `index` on."""

    def __init__(self, blocks: Blocks, index: int, count: int) -> None:
        self._blocks = blocks
        self._numbers = np.arange(index, len(blocks), count)
        starts = blocks.position_starts
        ranges = [np.arange(starts[i], starts[i + 1]) for i in self._numbers]
        self.positions: NDArray[np.int64] = np.concatenate([np.empty(0, np.int64), *ranges])
        """Numbers of their positions, in order."""
        self.lengths = blocks.lengths[self._numbers]
        self.position_starts = np.append(0, np.diff(starts)[self._numbers].cumsum())

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Block:
        return self._blocks[int(self._numbers[index])]


class ArrowBlocks(_ArrowTable):
    """The validation blocks of a targets folder."""

    def __init__(self, path: Path) -> None:
        super().__init__([path], "labels", lambda labels: labels != IGNORE)

    def __getitem__(self, index: int) -> Block:
        row = self._table[index]
        first = int(self.position_starts[index])
        return Block(row["input_ids"].astype(np.int32), row["labels"] != IGNORE, first)


def collate(rows: list[dict[str, NDArray]]) -> dict[str, Tensor]:
    """Rows as one batch: tokens padded on the right, targets of all predicted tokens one after another.

    Returns:
        `input_ids` and `labels` (B, T); `places` (P,), flat numbers of the places that predict; with targets
        `target_counts` (P,), `target_ids` and `target_probs` (S,); with stored activations `activations` (P, D); with
        a base beside `base_labels` (P,) and `base_targets` (S,).
    """
    input_ids = pad_sequence([torch.from_numpy(row["input_ids"].astype(np.int64)) for row in rows], batch_first=True)
    given = [torch.from_numpy(row["labels"].astype(np.int64)) for row in rows]
    labels = pad_sequence(given, batch_first=True, padding_value=IGNORE)
    batch = {"input_ids": input_ids, "labels": labels, "places": predicting_places(labels)}
    for name in ("target_counts", "target_ids", "target_probs", "activations", "base_labels", "base_targets"):
        if name in rows[0]:
            batch[name] = torch.from_numpy(np.concatenate([row[name] for row in rows]))
    return batch


class LengthGroupedSampler(Sampler[int]):
    """Shuffled rows, those of one batch of similar length. The order depends on seed and epoch alone.

    So a resumed run sees the rows an uninterrupted one would have seen. transformers has such a sampler, but draws its
    order from the global generator.
    """

    def __init__(
        self, lengths: NDArray[np.int64], batch_size: int, seed: int, pool: int = 32, fill_to: int = 1
    ) -> None:
        """
        Args:
            lengths: Tokens per row.
            batch_size: Rows of one optimizer step.
            seed: With the epoch, decides the order.
            pool: Batches whose rows are sorted together.
            fill_to: An epoch is filled up to a multiple of this many rows, with rows of number -1.
        """
        self._fill = -len(lengths) % fill_to
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._pool = pool
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self._epoch = int(epoch)

    def __len__(self) -> int:
        return len(self._lengths) + self._fill

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self._seed, self._epoch])
        order = rng.permutation(len(self._lengths))
        size = self._pool * self._batch_size
        pools = [order[i : i + size] for i in range(0, len(order), size)]
        grouped = np.concatenate([pool[np.argsort(-self._lengths[pool], kind="stable")] for pool in pools])
        batches = [grouped[i : i + self._batch_size] for i in range(0, len(grouped), self._batch_size)]
        whole, rest = (batches, []) if len(batches[-1]) == self._batch_size else (batches[:-1], batches[-1:])
        rng.shuffle(whole)
        yield from (int(i) for batch in [*whole, *rest] for i in batch)
        yield from [-1] * self._fill
