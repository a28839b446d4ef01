"""Whether two models are the same: by what their files and tensors hold, never by what they are called."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from memlm.errors import ModelError
from memlm.files import cache_dir, digest, file_digest, file_error, read_json, replacing
from memlm.manifest import is_artifact, read_manifest
from memlm.models.adapters import ADAPTER_CONFIG, plain_state
from memlm.models.loading import WEIGHTS_FILE, adapted_base, find_file, load_causal_lm, resolve

_UNSETTLED_NS = 2_000_000_000  # a file written this shortly ago may change again without another time


def model_identity(name: str, **where: Any) -> str:
    """A string that two models share only if their weights are equal.

    A memlm folder gives its manifest's hash, any other folder a hash of all bytes of its files, a hub model its id and
    commit; an adapter gives its base's identity too.

    Args:
        name: Path, hub id or packaged name.
        where: As `where_from` gives it.

    Raises:
        ModelError: It cannot be reached.
        ArtifactError: A file of it cannot be read.
    """
    source = resolve(name)
    if is_artifact(source):
        return f"memlm:{read_manifest(source).hash}"
    if Path(source).is_dir():
        try:
            files = sorted(path for path in Path(source).iterdir() if path.is_file())
            own = f"files:{digest([[path.name, known_digest(path)] for path in files])}"
        except OSError as error:
            raise file_error(error, source) from None
    else:
        own = f"{source}@{commit_of(source, **where)}"
    base = adapted_base(source, **where)
    return own if base is None else f"{own}+{model_identity(base)}"


def commit_of(repository: str, **where: Any) -> str:
    """The commit of a hub repository that a revision stands for.

    Raises:
        ModelError: It cannot be reached.
    """
    for name in (*filter(None, [where.get("gguf_file")]), "config.json", ADAPTER_CONFIG):
        path = find_file(repository, name, **where)
        parts = path.parts if path is not None else ()
        if "snapshots" in parts[:-2]:  # as the hub's cache lays its files
            return parts[parts.index("snapshots") + 1]
    raise ModelError(f"model {repository!r} cannot be told from its other versions: no commit of it is known")


def known_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, remembered in the cache for as long as its size and times stay the same."""
    path = path.resolve()
    found = path.stat()
    state = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
    memo = cache_dir() / "digests" / digest(str(path))
    try:
        *remembered, sha256 = memo.read_text(encoding="ascii").split()
        if remembered == [str(number) for number in state]:
            return sha256
    except (OSError, ValueError):
        pass
    sha256 = file_digest(path)
    if time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) > _UNSETTLED_NS:
        with contextlib.suppress(OSError), replacing(memo) as temporary:  # a cache that cannot be written is none
            temporary.write_text(" ".join(map(str, [*state, sha256])), encoding="ascii")
    return sha256


def is_what_is_stored(model: PreTrainedModel, name: str, **where: Any) -> bool:
    """Whether loading `name` gives the weights and the config that `model` has apart from its adapters.

    The checkpoint's tensors are read one by one; only where they do not stand under the model's own names, the
    checkpoint is loaded beside it. Weights that were quantised in loading cannot be compared and count as the same.

    Raises:
        ModelError: It cannot be reached.
    """
    ours = {key: tensor for key, tensor in plain_state(model).items() if not tensor.is_meta}
    if getattr(model, "hf_quantizer", None) is not None:
        return True
    seen: set[tuple] = set()
    for key, stored in _stored_tensors(name, **where):
        if key in ours and _same(ours[key], stored):
            seen.add(_storage(ours[key]))
    if all(_storage(tensor) in seen for tensor in ours.values()):  # tied weights are stored once
        return True
    theirs = load_causal_lm(name, dtype=model.dtype, **where).state_dict()
    return ours.keys() == theirs.keys() and all(_same(tensor, theirs[key]) for key, tensor in ours.items())


def _storage(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _same(ours: Tensor, stored: Tensor) -> bool:
    return ours.shape == stored.shape and torch.equal(ours.cpu(), stored.to(ours.dtype))


def _stored_tensors(name: str, **where: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint, one at a time; none where it holds no safetensors."""
    source = resolve(name)
    index = find_file(source, f"{WEIGHTS_FILE}.index.json", **where)
    files = [WEIGHTS_FILE] if index is None else sorted(set(read_json(index, limit=1 << 26)["weight_map"].values()))
    for file in files:
        if (path := find_file(source, file, **where)) is not None:
            with safe_open(path, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    yield key, tensors.get_tensor(key)
