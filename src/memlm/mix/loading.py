"""A mixture from paths and hub ids, checked before any weights are loaded; and its folder."""

import contextlib
import copy
import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from memlm.errors import ArtifactError, ConfigError, ModelError, TokenizerMismatchError
from memlm.files import check_no_links, read_json
from memlm.memory.confidence import ConfidenceHead
from memlm.memory.config import named
from memlm.memory.decoder import MemoryDecoder
from memlm.memory.loading import load_memory, read_head, read_settings
from memlm.memory.protocol import Memory, MemorySettings
from memlm.memory.retrieval import RetrievalSettings, Validated
from memlm.mix.config import MixedLMConfig
from memlm.mix.gate import GatedMemory, gate_config, weight_rule
from memlm.mix.gate_config import GateConfig, GateName
from memlm.mix.weights import settle_weights
from memlm.models.adapters import active_adapters, has_adapter, save_adapter, save_without_adapter
from memlm.models.identity import commit_of, is_what_is_stored
from memlm.models.loading import adapted_base, device_of, load_causal_lm, load_config, resolve, where_from
from memlm.models.tokenizers import ADVICE, check_same, find_tokenizer, fingerprint, load_tokenizer, vocabulary_size

_Source = str | Path | Memory
MemorySource = _Source | PreTrainedModel
"""Folder, hub id, loaded memory, or any causal LM that is loaded."""


def load_mixture(
    kind: type[Any],
    base: str | Path | PreTrainedModel,
    memory: MemorySource | Mapping[str, MemorySource] | None,
    mix_weight: float | Mapping[str, float] | None,
    gate: GateName | GateConfig | None,
    memory_window: int | None,
    memory_kwargs: dict[str, Any] | None,
    base_kwargs: dict[str, Any],
) -> Any:
    """What `MixedLM.from_pretrained` gives, with its arguments and errors."""
    _check_spelling(base_kwargs)
    if isinstance(base, nn.Module):
        if base_kwargs:
            raise ConfigError(f"{next(iter(base_kwargs))} is for loading the base, and this base is loaded already")
        if memory is None:
            raise ConfigError("memory is missing: name the one to put beside the base")
        beside = load_beside(base, memory, memory_kwargs)
        return kind(base, beside, mix_weight, gate=gate, memory_window=memory_window)
    config = base_kwargs.get("config")
    if isinstance(config, MixedLMConfig):  # AutoModel hands over the config it found, and in it how to attend
        del base_kwargs["config"]
        if config._attn_implementation is not None:
            base_kwargs.setdefault("attn_implementation", config._attn_implementation)
    place, other = Path(base), memory is not None
    base, memory, saved = _open_saved(str(base), memory)
    sources = by_name(memory)
    gate = gate_config(gate, weight_given=mix_weight is not None)
    if saved is not None:
        if gate.gate is None:
            own = GateConfig(gate="none") if saved.gate is None else GateConfig.parse(saved.gate, f"{place}: gate.")
            gate = own.model_copy(update=gate.model_dump(exclude_unset=True, exclude={"gate"}))
        if not other and (mix_weight is None or isinstance(mix_weight, Mapping)):
            kept = {n: weight for n, weight in (saved.mix_weights or {}).items() if n in sources and weight is not None}
            mix_weight = kept | dict(mix_weight or {})
        memory_window = saved.memory_window if memory_window is None else memory_window
        base_kwargs |= {n: value for n, value in (saved.base_where or {}).items() if not base_kwargs.get(n)}
    memory_kwargs = dict(memory_kwargs or {})
    check_names(sources)
    check_window(memory_window)
    settings = {name: settings_of(source, memory_kwargs) for name, source in sources.items()}
    recorded = {name: found.mix_weight if found else None for name, found in settings.items()}
    weights = settle_weights(recorded, mix_weight, together=gate.gate == "none")
    if gate.gate != "none":
        heads = {name: _head_of(source, settings[name], memory_kwargs) for name, source in sources.items()}
        weight_rule(gate, {name: GatedMemory(weights[name], head) for name, head in heads.items()})
    size = check_tokenizers(base, sources, base_kwargs, memory_kwargs)
    model = load_causal_lm(base, **base_kwargs)
    where = where_from(base_kwargs)
    memories = _load_memories(model, base, sources, memory_kwargs, lambda: _by_name_alone(base, where))
    options: dict[str, Any] = {"gate": gate, "vocab_size": size, "memory_window": memory_window}
    mixed = kind(model, memories, mix_weight, base_name=resolve(base), **options)
    mixed.config.base_where = {name: where[name] for name in ("subfolder", "gguf_file") if name in where}
    if not Path(mixed.config.base).is_dir():  # a hub id, whose weights may become others
        mixed.config.base_where["revision"] = commit_of(mixed.config.base, **where)
    if saved is not None and (place / GENERATION_CONFIG_NAME).is_file():
        mixed.generation_config = GenerationConfig.from_pretrained(place)
    return mixed


def load_beside(
    base: PreTrainedModel,
    memory: MemorySource | Mapping[str, MemorySource],
    memory_kwargs: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    where: Mapping[str, Any] | None = None,
) -> dict[str, Memory]:
    """Name to memory, loaded where they are folders or hub ids, beside a base that is loaded already.

    Args:
        base, memory, memory_kwargs: As `load_mixture` takes them.
        name: Where the base came from; as its config says if None.
        where: Which of its files are meant, as `where_from` gives it.

    Raises:
        TokenizerMismatchError: One has another tokenizer than the base, as far as that is known.
        ModelError: One cannot be reached.
    """
    sources = by_name(memory)
    name = name or base.config.name_or_path or None
    if name is not None and find_tokenizer(name, **(where or {})) is not None:
        check_tokenizers(name, sources, where, memory_kwargs)
    return _load_memories(base, name, sources, memory_kwargs or {}, lambda: _is_named(base, name, where or {}))


def by_name(memory: MemorySource | Mapping[str, MemorySource]) -> dict[str, _Source]:
    """Memories by name; a causal LM that is loaded serves as a Memory Decoder, as one at a path does.

    Raises:
        ConfigError: One is none of these.
    """
    return {name: as_source(part) for name, part in named(memory).items()}


def as_source(memory: MemorySource) -> _Source:
    """One memory, as `by_name` has it."""
    if isinstance(memory, PreTrainedModel):
        return MemoryDecoder(memory)
    if not isinstance(memory, _Source):
        raise ConfigError(
            f"a memory is a folder, a hub id, a loaded memory or a causal LM, not a {type(memory).__name__}"
        )
    return memory


def _by_name_alone(name: str, where: Mapping[str, Any]) -> bool:
    """Whether the bare name, by which a datastore knows its teacher, stands for the same model."""
    if where.keys() & {"subfolder", "gguf_file"}:
        return False
    told = "revision" in where and not Path(resolve(name)).is_dir()
    return not told or commit_of(name, **where) == commit_of(name)


def _is_named(base: PreTrainedModel, name: str | None, where: Mapping[str, Any]) -> bool:
    """Whether a loaded base is what its name stands for, adapters and all."""
    if name is None or has_adapter(base) or not _by_name_alone(name, where):
        return False
    return is_what_is_stored(base, name, **where)


def _load_memories(
    base: PreTrainedModel,
    name: str | None,
    sources: Mapping[str, _Source],
    kwargs: Mapping[str, Any],
    is_named: Callable[[], bool] = lambda: True,
) -> dict[str, Memory]:
    """Folders and hub ids are loaded in the base's precision; all stand where the base is, unless told otherwise.

    A datastore reads the base's activations only where that is its teacher by more than its name (`is_named`).
    """
    options = {"dtype": base.dtype, **kwargs}

    def reads(source: _Source) -> str | None:
        searches = not isinstance(source, Memory) and isinstance(settings_of(source, kwargs), RetrievalSettings)
        return None if searches and not is_named() else name

    found = {
        label: source if isinstance(source, Memory) else _load(source, reads(source), options)
        for label, source in sources.items()
    }
    return found if "device_map" in kwargs else {label: part.to(device_of(base)) for label, part in found.items()}


def _load(source: str | Path, base: str | None, options: Mapping[str, Any]) -> Memory:
    settings = None if Validated.read(source) is None else settings_of(source, options)
    if not isinstance(settings, RetrievalSettings):
        return load_memory(source, base=base, **options)
    memory = load_memory(source, base=base, **{**options, "retrieval": settings.retrieval})
    memory.settings = memory.settings.model_copy(update=settings.model_dump(include={"mix_weight", "validated_with"}))
    return memory


def save_mixture(mixed: Any, save_directory: str | Path, include_base: bool, kwargs: dict[str, Any]) -> None:
    """What `MixedLM.save_pretrained` does, with its arguments and errors."""
    base, config, folder = mixed.base, copy.deepcopy(mixed.config), Path(save_directory)
    check_no_links(folder)
    adapted, where = active_adapters(base), config.base_where or {}
    original = adapted_base(config.base, **where) or config.base if config.base else ""
    if not include_base:
        if not original:
            raise ConfigError("the base came from no folder or hub id to refer to; save it too with include_base=True")
        if not is_what_is_stored(base, original, **where):
            raise ConfigError(
                f"the base is not what {original} holds (it was merged, trained or edited): a reference would load"
                " another model; save it too with include_base=True"
            )
    place = "base" if include_base else "adapter" if adapted else original
    if adapted:
        save_adapter(base, folder / place, original)
    if include_base and adapted:
        save_without_adapter(base, folder / place)
    elif include_base:
        base.save_pretrained(folder / place, **kwargs)
    for name, memory in mixed.named_memories().items():
        memory.save_pretrained(folder / "memories" / name)
    config.memories = {name: f"memories/{name}" for name in mixed.memories}
    config.base, config.base_where = place, None if include_base else config.base_where
    config.architectures = [type(mixed).__name__]
    config.save_pretrained(folder)
    mixed.generation_config.save_pretrained(folder)
    with contextlib.suppress(ModelError):  # a base without tokenizer, as in tests, is saved without
        tokenizer = load_tokenizer(mixed.config.base, **where)
        for copies in (folder, folder / place) if include_base else (folder,):
            tokenizer.save_pretrained(copies)


def settings_of(source: _Source, memory_kwargs: Mapping[str, Any]) -> MemorySettings | None:
    """What a memory's folder says beside its weights; no weights are loaded."""
    if isinstance(source, Memory):
        return source.settings
    asked = memory_kwargs.get("retrieval")
    settings, validated = read_settings(source, retrieval=asked, **where_from(memory_kwargs)), Validated.read(source)
    if not isinstance(settings, RetrievalSettings) or validated is None:
        return settings
    return validated.settings(settings, asked)


def _head_of(
    source: _Source, settings: MemorySettings | None, memory_kwargs: Mapping[str, Any]
) -> ConfidenceHead | None:
    if isinstance(source, Memory):
        return source.confidence_head
    return read_head(source, settings, **where_from(memory_kwargs))


def _check_spelling(base_kwargs: Mapping[str, Any]) -> None:
    """Raise a ConfigError for a keyword that is nearly one of our own; transformers would take it for its own."""
    for name in base_kwargs:
        check_keyword(name)
    config = base_kwargs.get("config")
    if isinstance(config, MixedLMConfig) and not isinstance(config.mix_weights, dict | None):
        check_keyword("mix_weights")  # AutoModel takes it for the config's own


@lru_cache(1000)  # it is asked at every token
def check_keyword(name: str) -> None:
    """Raise a ConfigError for a keyword that is nearly one of a mixture's own."""
    own = ("memory", "mix_weight", "gate", "memory_window", "memory_kwargs", "evidence_mask")
    near = difflib.get_close_matches(name, own, n=1, cutoff=0.85)
    if near or name in ("weight", "weights", "alpha"):
        raise ConfigError(f"{name} is no setting here; did you mean {near[0] if near else 'mix_weight'}?")


def check_names(memories: Iterable[str]) -> None:
    """Raise a ConfigError unless each name can stand for a module and a folder."""
    for name in memories:
        if not re.fullmatch(r"[\w-]+", name):  # names a module, and a folder where the mixture is saved
            raise ConfigError(f"memory name {name!r}: use letters, digits, '_' and '-' only")
        if hasattr(nn.ModuleDict(), name):
            raise ConfigError(f"memory name {name!r} is what torch calls something of its own; take another")


def check_window(memory_window: int | None) -> None:
    """Raise a ConfigError unless the window holds two tokens at least."""
    if memory_window is not None and memory_window < 2:
        raise ConfigError(f"memory_window = {memory_window}: must be at least 2")


def _open_saved(
    base: str, memory: MemorySource | Mapping[str, MemorySource] | None
) -> tuple[str, MemorySource | Mapping[str, MemorySource], MixedLMConfig | None]:
    """Base and memories, looked up in the config where `base` is a folder that `save_pretrained` wrote.

    Raises:
        ArtifactError: That names places outside of it, or something that is no name.
    """
    folder = Path(base)
    path = folder / "config.json"
    values = None
    with contextlib.suppress(ArtifactError):  # a plain model's config is for transformers to read
        values = read_json(path) if path.is_file() else None
    if not isinstance(values, dict) or values.get("model_type") != MixedLMConfig.model_type:
        if memory is None:
            raise ConfigError(f"memory is missing: {base} is a plain model, so name the memory to put beside it")
        return base, memory, None
    saved = MixedLMConfig.from_pretrained(folder)
    places, home = saved.memories or {}, saved.base
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in (home, *places.values())):
        raise ArtifactError(f"{path}: base and memories must be names of folders or hub ids")
    names = {name: str(_inside(folder, place)) for name, place in places.items()}
    if home and not os.path.isabs(home) and (".." in Path(home).parts or (folder / home).is_dir()):
        home = str(_inside(folder, home))
    return home, memory if memory is not None else names, saved


def _inside(folder: Path, place: str) -> Path:
    """A place that a saved mixture names in its own folder.

    Raises:
        ArtifactError: It is elsewhere.
    """
    real = os.path.realpath(folder / place)
    if os.path.isabs(place) or not real.startswith(os.path.realpath(folder) + os.sep):
        raise ArtifactError(f"{folder}/config.json names a place outside its folder: {place[:80]!r}; save it anew")
    return folder / place


def check_tokenizers(
    base: str,
    memories: Mapping[str, _Source],
    base_kwargs: Mapping[str, Any] | None = None,
    memory_kwargs: Mapping[str, Any] | None = None,
) -> int | None:
    """The size of the vocabulary that base and memories share; None where the base comes without a tokenizer.

    Reads configs and tokenizers only, so it is done before any weights are loaded.

    Raises:
        TokenizerMismatchError: They differ; the message says in what.
        ModelError: Base or memory cannot be reached.
    """
    options, memory_options = where_from(base_kwargs or {}), where_from(memory_kwargs or {})
    load_config(base, **options)
    ours = find_tokenizer(base, **options)
    for name, source in memories.items():
        settings = settings_of(source, memory_options)
        if ours is None or (settings is not None and settings.tokenizer == fingerprint(ours)):
            continue
        label = name if isinstance(source, Memory) else str(source)
        theirs = None if isinstance(source, Memory) else find_tokenizer(str(source), **memory_options)
        if theirs is not None:
            check_same(ours, theirs, f"base {base}", f"memory {label}")
        elif settings is not None and settings.tokenizer is not None:
            raise TokenizerMismatchError(f"base {base} and memory {label} have different tokenizers; {ADVICE}")
    return vocabulary_size(ours) if ours is not None else None
