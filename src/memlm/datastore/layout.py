"""What stands in an index file, walked before faiss sees it, for faiss believes the sizes it reads."""

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from memlm.datastore.config import IndexKind
from memlm.errors import ArtifactError
from memlm.manifest import Facts


class IndexFacts(Facts):
    """Settings of an index in force, as `Index.describe` gives them."""

    kind: IndexKind
    nlist: int = Field(default=1, ge=1)
    nprobe: int = Field(default=1, ge=1)
    rerank_factor: int = Field(default=1, ge=1)
    code_bytes: int = Field(default=1, ge=1)


class IndexLayout:
    """The bytes of an inverted-file index as faiss writes it, read from the front."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._bytes = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
        self._at = 0

    def check(self, facts: IndexFacts, shape: tuple[int, int]) -> list[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        """Codes and entry ids of each list, if the whole file is an index of this kind over `shape` (entries, width).

        Every size, setting and entry id is checked. Centroids and codes may be any numbers: they decide what a search
        finds, not what memory it touches.

        Raises:
            ArtifactError: The file is anything else; the part that does not fit is named.

        Source: `index_write.cpp` of faiss.
        """
        entries, width = shape
        flat = facts.kind == "ivf-flat"
        self._expect("kind", "4s", b"IwSq" if flat else b"IwPQ")
        self._header(entries, width)
        self._expect("lists", "Q", facts.nlist)
        self._read("Q")  # nprobe, which the settings decide
        self._expect("quantizer", "4s", b"IxF2")
        self._header(facts.nlist, width)
        self._expect("centroids", "Q", facts.nlist * width)
        self._skip("centroids", 4 * facts.nlist * width)
        self._expect("direct map", "BQ", 0, 0)
        code_size = self._scalar_quantizer(width) if flat else self._product_quantizer(width, facts.code_bytes)
        lists = self._lists(facts.nlist, code_size, entries)
        if self._at != len(self._bytes):
            raise self._error("end", f"{len(self._bytes) - self._at} more bytes")
        return lists

    def _header(self, entries: int, width: int) -> None:
        self._expect("width and entries", "iq", width, entries)
        self._read("qq")  # unused
        self._expect("training and metric", "Bi", 1, 1)

    def _scalar_quantizer(self, width: int) -> int:
        float16, code_size = 4, 2 * width
        self._expect("scalar quantizer", "iiIQQQ", float16, 0, 0, width, code_size, 0)
        self._expect("code size", "QB", code_size, 0)
        return code_size

    def _product_quantizer(self, width: int, code_size: int) -> int:
        self._expect("code size", "BQ", 1, code_size)
        there, pieces, bits = self._read("QQQ")
        fits = there == width and 0 < pieces <= width and width % pieces == 0 and 0 < bits <= 8
        if not fits or (pieces * bits + 7) // 8 != code_size:
            raise self._error("product quantizer", f"width {there}, {pieces} pieces of {bits} bits")
        self._expect("codebook", "Q", width << bits)
        self._skip("codebook", 4 * width << bits)
        return code_size

    def _lists(self, nlist: int, code_size: int, entries: int) -> list[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        self._expect("inverted lists", "4sQQ", b"ilar", nlist, code_size)
        form, count = self._read("4sQ")
        if (form, count) != (b"full", nlist) and not (form == b"sprs" and count % 2 == 0 and count <= 2 * nlist):
            raise self._error("inverted lists", f"{form!r} with {count} sizes")
        sizes = np.frombuffer(self._skip("list sizes", 8 * count), "<u8")
        if form == b"sprs":  # pairs of a list's number and its size
            numbers, sizes = sizes[::2], sizes[1::2]
            if (numbers >= nlist).any() or (numbers[1:] <= numbers[:-1]).any():
                raise self._error("list numbers", "they do not ascend")
        if (sizes > entries).any() or int(sizes.sum()) != entries:
            raise self._error("list sizes", f"they do not add up to {entries}")
        there, lists = np.zeros(entries, bool), []
        for size in sizes.tolist():
            codes = self._skip("codes", size * code_size)
            ids = np.frombuffer(self._skip("entry ids", 8 * size), "<i8")
            if size and (ids.min() < 0 or ids.max() >= entries):
                raise self._error("entry ids", f"not all below {entries}")
            there[ids] = True
            lists.append((np.frombuffer(codes, np.uint8), ids))
        if not there.all():
            raise self._error("entry ids", "one is there twice")
        return lists

    def _skip(self, part: str, count: int) -> memoryview:
        if count > len(self._bytes) - self._at:
            raise self._error(part, "the file ends within")
        self._at += count
        return self._bytes[self._at - count : self._at].data

    def _read(self, form: str) -> tuple:
        return struct.unpack("<" + form, self._skip("numbers", struct.calcsize("<" + form)))

    def _expect(self, part: str, form: str, *values: object) -> None:
        found = self._read(form)
        if found != values:
            raise self._error(part, f"{found[:8]}, expected {values}")

    def _error(self, part: str, found: str) -> ArtifactError:
        return ArtifactError(f"{self._path} cannot be read: {part}: {found}; rebuild the datastore")
