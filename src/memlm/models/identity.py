"""Whether two models are the same: by what their files and tensors hold, never by what they are called."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from memlm.errors import ModelError
from memlm.files import cache_dir, digest, file_digest, file_error, read_json, replacing
from memlm.manifest import is_artifact, read_manifest
from memlm.models.adapters import ADAPTER_CONFIG, plain_modules, plain_state
from memlm.models.layers import plain_attributes
from memlm.models.loading import WEIGHTS_FILE, adapted_base, find_file, load_causal_lm, load_config, resolve

_OF_LOADING = {"_name_or_path", "architectures", "dtype", "quantization_config", "transformers_version", "use_cache"}
_UNSETTLED_NS = 2_000_000_000  # a file written this shortly ago may change again without another time


def model_identity(name: str) -> str:
    """A string that two models share only if their weights are equal.

    A memlm folder gives its manifest's hash, any other folder a hash of all bytes of its files, a hub model its id and
    commit; an adapter gives its base's identity too.

    Args:
        name: Path, hub id or packaged name.

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
        own = f"{source}@{commit_of(source)}"
    base = adapted_base(source)
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
    """Whether loading `name` gives the weights, the parts and the config that `model` has apart from its adapters.

    The checkpoint's tensors are read one by one; only where they do not stand under the model's own names, the
    checkpoint is loaded beside it. Weights that were quantised in loading cannot be compared and count as the same.

    Raises:
        ModelError: It cannot be reached.
    """
    ours = {key: tensor for key, tensor in plain_state(model).items() if not tensor.is_meta}
    if getattr(model, "hf_quantizer", None) is not None:
        return True
    if not _is_built_as_stored(model, name, **where):
        return False
    seen: set[tuple] = set()
    for key, stored in _stored_tensors(name, **where):
        if key in ours and _same(ours[key], stored):
            seen.add(_storage(ours[key]))
    if all(_storage(tensor) in seen for tensor in ours.values()):  # tied weights are stored once
        return True
    theirs = load_causal_lm(name, dtype=model.dtype, **where).state_dict()
    return ours.keys() == theirs.keys() and all(_same(tensor, theirs[key]) for key, tensor in ours.items())


def _is_built_as_stored(model: PreTrainedModel, name: str, **where: Any) -> bool:
    """Whether a model of the stored config has the same parts, and they the same numbers beside their weights.

    Where no such model can be made, as with code of its own, that cannot be told and counts as the same.
    """
    try:
        config = load_config(name, **where)
        with init_empty_weights(include_buffers=False):  # buffers are small, and some are stored nowhere
            stored = AutoModelForCausalLM.from_config(config)
    except Exception:  # a model's own code
        return True
    if _compared(config) != _compared(model.config):
        return False
    ours, theirs = plain_modules(model), plain_modules(stored)
    if {n: type(m) for n, m in ours.items()} != {n: type(m) for n, m in theirs.items()}:
        return False
    for place, module in ours.items():
        if not isinstance(module, PreTrainedModel):  # which keeps where it came from, and what it did last
            now, then = dict(plain_attributes(module)), dict(plain_attributes(theirs[place]))
            if any(now[key] != then[key] for key in now.keys() & then.keys()):  # states are tensors by now
                return False
        for key in module._non_persistent_buffers_set:
            buffer, stored_buffer = module._buffers[key], theirs[place]._buffers.get(key)
            if buffer is None or buffer.is_meta or stored_buffer is None:
                continue
            if buffer.shape == stored_buffer.shape and not _same(buffer, stored_buffer.to(buffer.dtype)):
                return False
    return True


def _compared(config: PreTrainedConfig) -> dict[str, Any]:
    """A config's settings, but for those that say how it was loaded."""
    return {key: value for key, value in config.to_dict().items() if key not in _OF_LOADING}


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
