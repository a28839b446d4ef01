"""Folders changed at random and read, in processes that may not grow.

FOLDER holds one folder of every stage, as `test_fuzz.py` makes them. A case changes one of them, gives its manifest the
checksums of what is there now, reads all of it, and puts it back. It fails where anything but a `MemlmError` comes out;
`python tests/fuzzing.py FOLDER KIND SEED` shows it again.
"""

import contextlib
import copy
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from strangers import reseal
from transformers.utils import logging

from memlm import cli
from memlm import manifest as manifest_module
from memlm.corpus.blocks import SPLITS, Corpus
from memlm.datastore.store import Datastore
from memlm.errors import MemlmError
from memlm.memory.loading import load_memory
from memlm.scores.table import read_scores as open_scores
from memlm.targets.shards import TRAIN_SCHEMA
from memlm.train.data import TrainingData, collate

GROWTH_BYTES = 1 << 30
SECONDS = 10
"""Longest time of a case; the slowest takes half a second."""
_OUT_OF_MEMORY = ("bad_alloc", "allocate", "out of memory")  # what libraries call it

NUMBERS = [-(2**63), -1, 0, 1, 2, 255, 256, 10**6, 2**31 - 1, 2**31, 2**32, 10**12, 2**63 - 1, 2**63, 10**40]
NAMES = ["", ".", "..", "/", "../outside", "/etc/hostname", "a/../b", "./a", "a//b", "a/", "a\\b", "a\0b", "a\nb"]
NAMES += [
    "\ud800",
    "x" * 300,
    "y/" * 3000,
    "manifest.json",
    "lock",
    "keys",
    "tokenizer",
    "\u202etxt",
    "é",
    "~",
    "$HOME",
]
VALUES = [None, True, False, 0.5, -0.0, 1e308, float("nan"), float("inf"), [], {}, [[]], "x" * 10_000, *NUMBERS, *NAMES]


# --- changes ------------------------------------------------------------------------------------------------------


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def change_json(rng: random.Random, value: Any) -> Any:
    """A copy with one to three values, keys or levels changed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = list(places(value))
        if not found:
            break
        container, key = rng.choice(found)
        old = container[key]
        match rng.randrange(8):
            case 0 | 1 | 2:
                container[key] = rng.choice(VALUES)
            case 3 if isinstance(old, int):
                container[key] = rng.choice((old + 1, old - 1, -old, 2 * old, old * 10**6, float(old), str(old)))
            case 4:
                del container[key]
            case 5 if isinstance(container, dict):
                container[rng.choice(NAMES)] = container.pop(key)
            case 6:
                for _ in range(rng.choice((1, 5, 50, 300))):
                    container[key] = rng.choice(([container[key]], {"a": container[key]}))
            case _:
                other, there = rng.choice(found)
                container[key] = copy.deepcopy(other.get(there) if isinstance(other, dict) else old)
    return value


def change_bytes(rng: random.Random, content: bytes) -> bytes:
    """`content` with bits flipped, numbers written over, parts cut, doubled or exchanged."""
    new = bytearray(content)
    match rng.randrange(7):
        case 0 | 1:
            for _ in range(rng.choice((1, 1, 2, 8, 40))):
                if new:
                    new[rng.randrange(len(new))] ^= 1 << rng.randrange(8)
        case 2 | 3:
            for _ in range(rng.choice((1, 1, 3))):
                form = rng.choice("bhiq")
                size = struct.calcsize(form)
                at = rng.randrange(max(1, len(new) - size)) // size * size
                limit = 1 << (8 * size - 1)
                number = rng.choice((*NUMBERS, rng.randrange(1000))) % (2 * limit) - limit
                new[at : at + size] = struct.pack(f"<{form}", number)
        case 4:
            del new[rng.randrange(len(new) + 1) :]
        case 5:
            new += bytes(rng.choice((1, 8, 4096)))
        case _:
            size = rng.choice((4, 8, 64))
            one, other = (rng.randrange(max(1, len(new) - size)) for _ in range(2))
            new[one : one + size], new[other : other + size] = new[other : other + size], new[one : one + size]
    return bytes(new)


def change_text(rng: random.Random, content: bytes) -> bytes:
    """`content`, which is JSON, as something that is hardly JSON any more."""
    odd: list[Callable[[bytes], bytes]] = [
        lambda content: b"[" * 100_000,
        lambda content: b'{"a":' * 5000,
        lambda content: b"\xff\xfe" + content,
        lambda content: b"\xef\xbb\xbf" + content,
        lambda content: content + content,
        lambda content: content.replace(b"{", b'{"kind": 1, "kind": 2, ', 1),
        lambda content: b"1" * 5000,
        lambda content: b"[" + b"{}," * 200_000 + b"{}]",
        lambda content: b'{"format_version": 1, "payload": {' + b",".join(b'"%d": 0' % i for i in range(9999)) + b"}}",
        lambda content: b" " * (17 << 20),
        lambda content: b"",
    ]
    return rng.choice(odd)(content) if rng.random() < 0.1 else change_bytes(rng, content)


def change_array(rng: random.Random, content: bytes) -> bytes:
    """`content`, which is a .npy file, with another header or other data."""
    length = int.from_bytes(content[8:10], "little")
    header, data = content[10 : 10 + length].decode("latin1"), content[10 + length :]
    types = ["<i4", "<i8", "<f2", "<f4", ">i4", "|O", "|b1", "<U9", "|V4", "<M8[s]", "<c16", "[('a', '<i4')]"]
    match rng.randrange(8):
        case 0:
            header = header.replace(header.split("'")[3], rng.choice(types))
        case 1:
            header = header.replace("False", rng.choice(("True", "1", "None", "[]", "(" * 500)))
        case 2 | 3:
            shape = ", ".join(str(rng.choice(NUMBERS)) for _ in range(rng.randrange(4)))
            header = header[: header.index("(")] + f"({shape},), }}\n"
        case 4:
            data = change_bytes(rng, data)
        case 5:
            header = change_bytes(rng, header.encode("latin1")).decode("latin1")
        case 6:
            return b"\x80\x04cos\nsystem\n(S'true'\ntR." + content[26:]
        case _:
            return change_bytes(rng, content)
    raw = header.encode("latin1")
    return content[:8] + (len(raw) % 65536).to_bytes(2, "little") + raw + data


def change_safetensors(rng: random.Random, content: bytes) -> bytes:
    """`content`, which is a safetensors file, with another header or other data."""
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.3:
        return change_bytes(rng, content)
    header = json.loads(content[8 : 8 + length])
    if rng.random() < 0.3:
        tensor = header[rng.choice([name for name in header if name != "__metadata__"])]
        tensor["dtype"] = rng.choice(("F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "C64", "x"))
    else:
        header = change_json(rng, header)
    raw = json.dumps(header).encode()
    claimed = len(raw) if rng.random() < 0.9 else rng.choice(NUMBERS) % 2**64
    return struct.pack("<Q", claimed) + raw + content[8 + length :]


def change_rows(rng: random.Random, path: Path) -> None:
    """Rows in a whole Arrow file that no stage writes: other types, codecs, missing values, lists that do not fit."""
    with pa.memory_map(str(path)) as file:
        table = pa.ipc.open_stream(file).read_all()
    names, options = (
        list(table.column_names),
        pa.ipc.IpcWriteOptions(compression=rng.choice((None, None, "zstd", "lz4"))),
    )
    columns = {name: table[name].to_pylist() for name in names}
    column = columns[rng.choice(names)]
    row = rng.randrange(len(column))
    match rng.randrange(6):
        case 0:
            column[row] = None
        case 1:
            column[row] = [*column[row], rng.choice((0, 1, 5))]
        case 2 if column[row]:
            column[row][rng.randrange(len(column[row]))] = rng.choice(
                (-(2**31), -101, -100, -1, 0, 319, 320, 2**31 - 1, 60000, None)
            )
        case 3:
            columns["more"] = column
        case 4:
            columns[rng.choice(names)] = rng.choice((["x"] * len(column), [1] * len(column), [[[1]]] * len(column)))
        case _:
            del column[row][:1]
    with contextlib.suppress(pa.ArrowException, OverflowError, TypeError, ValueError):  # no such value in the type
        types = {field.name: field.type for field in TRAIN_SCHEMA}
        types["labels"] = types["input_ids"]
        arrays = {
            name: pa.array(values, type=types.get(name) if rng.random() < 0.9 else None)
            for name, values in columns.items()
        }
        changed = pa.table(arrays)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, changed.schema, options=options) as writer:
            writer.write_table(changed)


def change_place(rng: random.Random, folder: Path, name: str) -> None:
    """A payload file that is none: a link, a folder, a pipe; or gone, or its folder a link."""
    path = folder / name
    match rng.randrange(6):
        case 0:
            path.unlink()
            path.symlink_to(rng.choice(("/etc/hostname", "/dev/zero", path.name, "..", "nowhere")))
        case 1:
            path.unlink()
            path.mkdir()
        case 2:
            path.unlink()
            os.mkfifo(path)
        case 3 if path.parent != folder:
            path.parent.rename(folder.parent / "outside")
            path.parent.symlink_to(folder.parent / "outside")
        case _:
            path.unlink()


# --- readers ------------------------------------------------------------------------------------------------------


def read_corpus(folder: Path) -> None:
    corpus = Corpus(folder)
    for name in SPLITS:
        split = corpus.split(name)
        for index in range(min(3, len(split))):
            split[index].labels.sum()
        corpus.document_names(name)


def read_datastore(folder: Path) -> None:
    store = Datastore(folder)
    width = store.facts.key_width
    queries = np.linspace(-1, 1, 2 * width, dtype=np.float32).reshape(2, width)
    _, ids = store.index.search(queries, 5)
    store.values[ids.clip(0)].sum()
    if store.keys is not None:
        store.keys.rows(0, 5).sum()
    len(store.corpus.split("train"))


def read_targets(folder: Path) -> None:
    data = TrainingData(folder, with_targets=True)
    rows = data.train
    collate([rows[index] for index in (0, len(rows) - 1)])
    if len(data.validation):
        _ = data.validation[0].labels
    _ = data.corpus_config, data.corpus_hash, data.corpus_facts["splits"]


def read_memory(folder: Path) -> None:
    memory = load_memory(folder)
    state = memory.step(torch.tensor([[1, 2]]), torch.zeros(1, 2, 32) if memory.tap is not None else None)
    memory.votes(state, slice(None))


def read_scores(folder: Path) -> None:
    open_scores(folder, _corpus(folder.parent).facts.splits["test"].positions)


def _corpus(root: Path, known: dict[Path, Corpus] = {}) -> Corpus:  # noqa: B006
    return known.setdefault(root, Corpus(root / "reference"))


READERS: dict[str, Callable[[Path], None]] = {
    "corpus": read_corpus,
    "exact": read_datastore,
    "flat": read_datastore,
    "codes": read_datastore,
    "targets": read_targets,
    "mlp": read_memory,
    "decoder": read_memory,
    "scores": read_scores,
}


def read(folder: Path) -> None:
    """Read all of a folder, which is called as in `READERS`."""
    with contextlib.redirect_stdout(io.StringIO()):
        cli.info(folder)
    READERS[folder.name](folder)


# --- cases --------------------------------------------------------------------------------------------------------

LIGHT = ["corpus", "exact", "flat", "codes", "targets", "mlp", "scores"]
KINDS: dict[str, tuple[list[str], str, Callable[[random.Random, bytes], bytes] | None]] = {
    "manifest": (LIGHT, "manifest.json", None),
    "manifest text": (LIGHT, "manifest.json", change_text),
    "place": (LIGHT, "*", None),
    "array": (["corpus", "exact", "scores"], "*.npy", change_array),
    "arrow": (["targets"], "*.arrow", change_bytes),
    "rows": (["targets"], "*.arrow", None),
    "index": (["flat", "codes"], "index.faiss", change_bytes),
    "settings": (["mlp", "mlp", "mlp", "decoder"], "memory.json", None),
    "weights": (["mlp", "mlp", "mlp", "decoder"], "model.safetensors", change_safetensors),
    "model config": (["decoder"], "config.json", None),
    "tokenizer": (["corpus", "targets"], "tokenizer/*", change_text),
    "damage": (LIGHT, "*", change_bytes),
    "inner manifest": (["exact", "codes"], "corpus/manifest.json", None),
}
"""Kind of case to folders, files that are changed, and how their bytes are; None where the case says itself."""


def run_case(root: Path, kind: str, seed: int) -> str:
    """What came out: `read`, or the type of the `MemlmError`. Anything else is raised."""
    rng = random.Random(f"{kind} {seed}")
    folders, pattern, change = KINDS[kind]
    name = rng.choice(folders)
    folder = root / name
    clear(root, folder)
    shutil.copytree(root / "whole" / name, folder)
    manifest_module._verified.clear()
    try:
        files = sorted(path for path in folder.rglob(pattern) if path.is_file() and path.name not in ("run.json",))
        if pattern == "*":
            files = [path for path in files if path.name != "manifest.json"]
        elif "/" not in pattern:
            files = [path for path in files if path.parent == folder or pattern != "manifest.json"]
        path = rng.choice(files)
        if kind == "place":
            change_place(rng, folder, path.relative_to(folder).as_posix())
        elif kind == "rows":
            change_rows(rng, path)
        elif change is None:
            path.write_text(json.dumps(change_json(rng, json.loads(path.read_text()))))
        else:
            path.write_bytes(change(rng, path.read_bytes()))
        if kind not in ("manifest", "manifest text", "place", "inner manifest") and (
            kind != "damage" or rng.random() < 0.5
        ):
            reseal(folder)
            if kind == "index" and rng.random() < 0.1:
                facts = folder / "manifest.json"
                manifest = json.loads(facts.read_text())
                manifest["facts"]["index"] = change_json(rng, manifest["facts"]["index"])
                facts.write_text(json.dumps(manifest))
        try:
            if kind == "tokenizer":
                (Corpus(folder) if name == "corpus" else TrainingData(folder, with_targets=True)).tokenizer("a b")
            else:
                read(folder)
        except MemlmError as error:
            message = str(error)
            if any(word in message.lower() for word in _OUT_OF_MEMORY):
                raise MemoryError(message) from error
            message.encode()
            if "\n" in message.strip() or len(message) > 2000:
                raise ValueError(f"a message of {len(message)} characters: {message[:500]!r}") from error
            return type(error).__name__
        return "read"
    finally:
        clear(root, folder)


def clear(root: Path, folder: Path) -> None:
    """Remove what a case left, also one that died."""
    for left in (root / "outside", folder):
        if left.is_symlink():
            left.unlink()
        shutil.rmtree(left, ignore_errors=True)


def work(root: Path, kind: str, seeds: range, report: int) -> None:
    """Run cases in this process, which may not grow beyond `GROWTH_BYTES`; tell `report` before and after each."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + GROWTH_BYTES, size + GROWTH_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for seed in seeds:
        os.write(report, f"{seed} ".encode())
        signal.setitimer(signal.ITIMER_REAL, SECONDS)  # nothing handles it: a case that hangs is killed
        try:
            found = run_case(root, kind, seed)
        except BaseException as error:  # panics of Rust are no Exception
            found = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(report, f"{found}\n".encode())


def run_kind(root: Path, kind: str, count: int) -> tuple[dict[str, int], list[str]]:
    """Outcomes by name, and what failed; a process that dies is named with its case, and another goes on after it."""
    outcomes: dict[str, int] = {}
    failures: list[str] = []
    first = 0
    while first < count:
        read_end, write_end = os.pipe()
        child = os.fork()
        if not child:
            os.close(read_end)
            try:
                work(root, kind, range(first, count), write_end)
            finally:
                os._exit(0)
        os.close(write_end)
        with os.fdopen(read_end) as lines:
            for line in lines:
                seed, _, found = line.rstrip("\n").partition(" ")
                first = int(seed) + 1
                if found in ("read", "") or (":" not in found and found.endswith("Error")):
                    outcomes[found] = outcomes.get(found, 0) + 1
                else:
                    failures.append(f"{kind} {seed}: {found}")
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            outcomes.pop("", None)
            failures.append(f"{kind} {first - 1}: the process died with status {status}")
    return outcomes, failures


def main() -> None:
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    if len(sys.argv) == 4:
        print(run_case(root, sys.argv[2], int(sys.argv[3])))
        return
    for name in READERS:  # before any child is forked, so that each starts with all imports
        read(Path(shutil.copytree(root / "whole" / name, root / name)))
        shutil.rmtree(root / name)
    report = {kind: run_kind(root, kind, count) for kind, count in json.loads(sys.stdin.read()).items()}
    print(
        json.dumps(
            {kind: {"outcomes": outcomes, "failures": failures} for kind, (outcomes, failures) in report.items()}
        )
    )


if __name__ == "__main__":
    main()
