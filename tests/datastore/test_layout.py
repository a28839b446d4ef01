import struct
from pathlib import Path

import numpy as np
import pytest

from memlm.datastore.config import DatastoreConfig
from memlm.datastore.index import INDEXES, IVFIndex, Keys
from memlm.datastore.layout import IndexFacts, IndexLayout
from memlm.errors import ArtifactError

KINDS = ("ivf-flat", "ivf-pq")


def written(path: Path, kind: str, entries: int = 200, nlist: int = 5) -> IndexFacts:
    """An index over random keys 12 wide, saved."""
    keys = Keys([np.random.default_rng(0).normal(size=(entries, 12)).astype(np.float16)])
    config = DatastoreConfig(nlist=nlist, code_bytes=4, nprobe=2)
    index = INDEXES[kind].build(keys, config)  # type: ignore[index]
    index.save(path)
    return IndexFacts.model_validate(index.describe())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entries", [3, 40, 200])  # from codebooks of two centroids to such of 128
def test_what_faiss_writes_is_found_good(tmp_path: Path, kind: str, entries: int) -> None:
    facts = written(tmp_path / "i", kind, entries, nlist=2)
    IndexLayout(tmp_path / "i").check(facts, (entries, 12))


@pytest.mark.parametrize("kind", KINDS)
def test_lists_of_which_most_are_empty_are_found_good(tmp_path: Path, kind: str) -> None:
    facts = written(tmp_path / "i", kind, nlist=40)
    keys = Keys([np.zeros((200, 12), np.float16)])
    index = INDEXES[kind].load(tmp_path / "i", keys, facts, (200, 12))  # type: ignore[index]
    assert isinstance(index, IVFIndex)
    stays = np.full(200, -1)
    stays[:5] = np.arange(5)
    index.extend(Keys([np.zeros((5, 12), np.float16)]), stays, DatastoreConfig())
    index.save(tmp_path / "i")
    assert b"sprs" in (tmp_path / "i").read_bytes()
    IndexLayout(tmp_path / "i").check(facts, (5, 12))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_that_is_no_centroid_and_no_code_decides(tmp_path: Path, kind: str) -> None:
    facts = written(tmp_path / "i", kind, entries=30, nlist=2)
    content = (tmp_path / "i").read_bytes()
    ignored = 0
    for at in range(len(content)):
        (tmp_path / "j").write_bytes(content[:at] + bytes([content[at] ^ 0x80]) + content[at + 1 :])
        try:
            IndexLayout(tmp_path / "j").check(facts, (30, 12))
        except ArtifactError:
            continue
        ignored += 1
    code_size = 24 if kind == "ivf-flat" else 2
    codebook = 0 if kind == "ivf-flat" else 4 * 12 << 4
    free = 8 + 2 * 16 + 4 * 2 * 12 + codebook + 30 * code_size  # nprobe, unused fields, centroids, codebook, codes
    assert ignored == free


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_and_any_more_bytes_are_refused(tmp_path: Path, kind: str) -> None:
    facts = written(tmp_path / "i", kind, entries=30, nlist=2)
    content = (tmp_path / "i").read_bytes()
    for size in range(0, len(content), 7):
        (tmp_path / "j").write_bytes(content[:size])
        with pytest.raises(ArtifactError, match=r"j cannot be read: .*; rebuild the datastore"):
            IndexLayout(tmp_path / "j").check(facts, (30, 12))
    (tmp_path / "j").write_bytes(content + b"\0")
    with pytest.raises(ArtifactError, match="end: 1 more bytes"):
        IndexLayout(tmp_path / "j").check(facts, (30, 12))


def test_an_id_beyond_the_entries_is_refused(tmp_path: Path) -> None:
    facts = written(tmp_path / "i", "ivf-flat", entries=30, nlist=2)
    content = (tmp_path / "i").read_bytes()
    for number in (30, -1):
        (tmp_path / "j").write_bytes(content[:-8] + struct.pack("<q", number))
        with pytest.raises(ArtifactError, match="entry ids: not all below 30"):
            IndexLayout(tmp_path / "j").check(facts, (30, 12))


@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_that_is_in_two_lists_is_refused(tmp_path: Path, kind: str) -> None:
    facts = written(tmp_path / "i", kind, entries=30, nlist=2)
    content = (tmp_path / "i").read_bytes()
    (tmp_path / "i").write_bytes(content[:-8] + content[-16:-8])
    with pytest.raises(ArtifactError, match="entry ids: one is there twice"):
        IndexLayout(tmp_path / "i").check(facts, (30, 12))


@pytest.mark.parametrize("change", [{"nlist": 6}, {"code_bytes": 3}, {"kind": "ivf-flat"}])
def test_facts_that_the_file_does_not_fit_are_refused(tmp_path: Path, change: dict) -> None:
    facts = written(tmp_path / "i", "ivf-pq")
    with pytest.raises(ArtifactError, match="cannot be read"):
        IndexLayout(tmp_path / "i").check(facts.model_copy(update=change), (200, 12))
    with pytest.raises(ArtifactError, match="width and entries"):
        IndexLayout(tmp_path / "i").check(facts, (201, 12))
