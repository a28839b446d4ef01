"""`MixedLM`: a frozen base and its memories as one model of transformers."""

import copy
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import GENERATION_CONFIG_NAME

from memlm.corpus.blocks import IGNORE
from memlm.errors import ConfigError, ModelError, TokenizerMismatchError
from memlm.memory.loading import load_memory, read_settings
from memlm.memory.protocol import Memory, MemorySettings, Votes
from memlm.mix.cache import MixedCache
from memlm.mix.mixture import check_weights, mix_log_probs
from memlm.models.loading import load_causal_lm, load_config, resolve
from memlm.models.taps import capture
from memlm.models.tokenizers import ADVICE, check_same, find_tokenizer, fingerprint, load_tokenizer, vocabulary_size

MemorySource = str | Path | Memory
MixWeight = float | Sequence[float] | Tensor
"""One weight, or one per row of a batch."""


class MixedLMConfig(PreTrainedConfig):
    """References to a base and its memories, and their weights; no weights of its own."""

    model_type = "memlm-mixed"

    base: str = ""
    base_revision: str | None = None
    memories: dict | None = None
    """Name to folder (relative to this config's) or hub id."""
    mix_weights: dict | None = None
    memory_window: int | None = None
    vocab_size: int | None = None


@dataclass(frozen=True)
class Components:
    """What base and memories say of the next token at the same places."""

    output: Any
    """The base's own."""
    logits: Float[Tensor, "B T V"]
    """The base's in float32, over the shared vocabulary."""
    votes: dict[str, Votes]
    """Per memory."""


class MixedLM(PreTrainedModel, GenerationMixin):
    """A frozen base mixed with memories: `p = w * p_memory + (1 - w) * p_base`, per token.

    `generate`, `pipeline`, caches and processors work as on any causal LM. What comes back as `logits` is
    `log p_mix + logsumexp(base logits)`, so softmax of it is the mixture, and at weight 0 it is the base's own logits.

    Source: Memory Decoder, eq. 7 (arXiv:2508.09874).
    """

    config_class = MixedLMConfig  # type: ignore[assignment]
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(
        self,
        base: PreTrainedModel,
        memory: Memory | Mapping[str, Memory],
        mix_weight: float | Mapping[str, float] | None = None,
        *,
        vocab_size: int | None = None,
        memory_window: int | None = None,
        base_name: str | None = None,
    ) -> None:
        """
        Args:
            base: Any causal LM; its weights and config are left as they are.
            memory: One memory, or name to memory.
            mix_weight: In [0, 1] (α in Memory Decoder, λ in MLP Memory); what the memory was validated with if None.
            vocab_size: Ids of the shared tokenizer are below it; the smallest of all parts if None.
            memory_window: Tokens a memory may look back; what it was trained with if None.
            base_name: Where the base came from, for `save_pretrained`.

        Raises:
            ConfigError: A weight is missing or outside [0, 1], they sum to more than 1, or the window is too small.
        """
        _check_window(memory_window)
        given = dict(memory) if isinstance(memory, Mapping) else {"memory": memory}
        _check_names(given)
        size = int(base.config.get_text_config().vocab_size)
        size = size if vocab_size is None else min(size, vocab_size)
        config = MixedLMConfig(
            base=_absolute(base_name or base.config.name_or_path or ""),
            base_revision=getattr(base.config, "_commit_hash", None),
            vocab_size=size,
            memory_window=memory_window,
        )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(base.config.get_text_config(), name, None))
        config._attn_implementation = "eager"  # has no attention of its own; the base keeps what it was loaded with
        super().__init__(config)
        self.base: PreTrainedModel = base
        self.memories = nn.ModuleDict()
        self.generation_config = copy.deepcopy(base.generation_config) if base.generation_config else GenerationConfig()
        parameters = inspect.signature(base.forward).parameters
        self._base_arguments = set(parameters)
        self._base_takes_more = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self._weights: dict[str, float] = {}
        self._base_vocab_size = size
        self._vocab_sizes: dict[str, int] = {}
        for name, part in given.items():
            self._adopt(name, part)
        self.set_mix_weight(mix_weight)
        self.requires_grad_(False).eval()

    def _adopt(self, name: str, memory: Memory) -> None:
        """Put a memory beside the base."""
        memory.check_base(self.base)
        # a shallow copy shares weights; vocabulary and window are this mixture's own, so mixtures can share a memory
        part = copy.copy(memory)
        if self.config.memory_window is not None:
            part.set_window(self.config.memory_window)
        self.memories[name] = part
        self._vocab_sizes[name] = memory.vocab_size
        self._share_vocabulary()

    def _share_vocabulary(self) -> None:
        """Make the vocabulary what all parts share."""
        self.config.vocab_size = min([self._base_vocab_size, *self._vocab_sizes.values()])
        for part in self.named_memories().values():
            part.settings = part.settings.model_copy(update={"vocab_size": self.config.vocab_size})

    # --- the parts ----------------------------------------------------------------------------------------------

    def named_memories(self) -> dict[str, Memory]:
        """Name to memory."""
        return {name: cast(Memory, memory) for name, memory in self.memories.items()}

    @property
    def mix_weights(self) -> dict[str, float]:
        """Name to weight; the base gets the rest."""
        return dict(self._weights)

    def set_mix_weight(self, mix_weight: float | Mapping[str, float] | None) -> None:
        """Change the weight of the memory, or of some by name, from the next forward pass on.

        Args:
            mix_weight: In [0, 1] each; what the memories were validated with if None. Memories that are not named
                keep theirs.

        Raises:
            ConfigError: A weight is missing, of an unknown memory, outside [0, 1], or they sum to more than 1.
        """
        recorded = {name: memory.settings.mix_weight for name, memory in self.named_memories().items()}
        present = self._weights if mix_weight is not None else {}
        self._weights = settle_weights(recorded | present, mix_weight)
        self.config.mix_weights = dict(self._weights)

    def add_memory(self, name: str, memory: MemorySource, mix_weight: float | None = None, **kwargs: Any) -> None:
        """Put one more memory beside the base.

        Args:
            name: A new one: letters, digits, `_` and `-`.
            memory: Folder, hub id or loaded memory.
            mix_weight: In [0, 1]; what it was validated with if None.
            kwargs: For loading it: `dtype` (default the base's), `revision` …

        Raises:
            ConfigError: The name is taken, or the weights would sum to more than 1.
            TokenizerMismatchError: It has another tokenizer than the base.
            ModelError: It cannot be reached, or reads activations that the base does not have.
        """
        _check_names([name])
        if name in self.memories:
            raise ConfigError(f"memory name {name!r} is taken; remove that memory first")
        settings = _settings_of(memory, kwargs)
        recorded = {**self._weights, name: settings.mix_weight if settings else None}
        weights = settle_weights(recorded, {} if mix_weight is None else {name: mix_weight})
        if self.config.base:
            check_tokenizers(self.config.base, {name: memory}, {"revision": self.config.base_revision}, kwargs)
        if not isinstance(memory, Memory):
            memory = load_memory(memory, base=self.config.base or None, **{"dtype": self.base.dtype, **kwargs})
        self._adopt(name, memory if "device_map" in kwargs else memory.to(self.base.device))
        self.requires_grad_(False).eval()
        self._weights = weights
        self.config.mix_weights = dict(weights)

    def remove_memory(self, name: str) -> None:
        """Take a memory away; the base gets its weight.

        Raises:
            ConfigError: There is no such memory.
        """
        if name not in self.memories:
            raise ConfigError(f"no memory is called {name!r}; the memories are {', '.join(self.memories) or 'none'}")
        del self.memories[name], self._weights[name], self._vocab_sizes[name]
        self._share_vocabulary()
        self.config.mix_weights = dict(self._weights)

    @property
    def vocab_size(self) -> int:
        """Ids that base and memories share are below it."""
        return self.config.vocab_size

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> None:  # type: ignore[override]
        return None  # two heads give the logits; neither is the model's

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        pass  # the parts tied theirs when they were loaded

    # --- forward and cache --------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        mix_weight: MixWeight | Mapping[str, MixWeight] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Mixed logits of the next token.

        Args:
            input_ids: The new tokens.
            attention_mask: `(B, past + T)`, 0 at padding.
            position_ids: For the base; each memory counts for itself.
            past_key_values: A `MixedCache` from an earlier call.
            labels: Gives `loss`, the mean cross-entropy of the mixture; -100 is ignored; shifted here.
            use_cache: Whether to return a cache; default false, unless `past_key_values` is given.
            logits_to_keep: Only the last so many places, or these places; 0 means all.
            mix_weight: For this call only, a number or one per row of the batch, by name where there are several
                memories; `generate` passes it on. Where rows are fewer than the batch's, as with beams, each stands
                for as many neighbours.
            kwargs: Passed to the base where its `forward` knows them.

        Raises:
            TypeError: `past_key_values` is not a `MixedCache`.
            ConfigError: A weight is outside [0, 1], they sum to more than 1, or do not fit the batch; or the cache is
                older than a memory.
        """
        if past_key_values is not None and not isinstance(past_key_values, MixedCache):
            raise TypeError(
                f"past_key_values is a {type(past_key_values).__name__}; a mixed model needs its own MixedCache"
            )
        use_cache = use_cache if use_cache is not None else past_key_values is not None
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache(len(input_ids))
        weights = self._weights_of_call(mix_weight, len(input_ids))
        parts = self.components(
            input_ids, attention_mask, position_ids, past_key_values, logits_to_keep, use_cache=use_cache, **kwargs
        )
        logits = self._mix(parts.logits, list(parts.votes.values()), weights)

        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device), ignore_index=IGNORE
            )
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=parts.output.hidden_states,
            attentions=parts.output.attentions,
        )
        return result if return_dict is not False else result.to_tuple()

    def components(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: MixedCache | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> Components:
        """What base and memories say of the next token, each for itself.

        Args:
            input_ids, attention_mask, position_ids, logits_to_keep, kwargs: As `forward` takes them.
            cache: Extended by `input_ids`; None: they are all there is.
            use_cache: Passed to the base.
        """
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        keep = slice(None) if isinstance(keep, int) else keep

        inputs: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids}
        inputs = {name: value for name, value in inputs.items() if value is not None and name in self._base_arguments}
        inputs |= {n: value for n, value in kwargs.items() if n in self._base_arguments or self._base_takes_more}
        if cache is not None:
            inputs["past_key_values"] = cache.base
        if "logits_to_keep" in self._base_arguments:
            inputs["logits_to_keep"] = logits_to_keep
        memories = self.named_memories()
        caches = {name: cache.of(name, memory) if cache is not None else None for name, memory in memories.items()}
        taps = {memory.tap for memory in memories.values() if memory.tap is not None}
        with capture(self.base, taps) as activations:
            output = self.base(input_ids=input_ids, use_cache=use_cache, return_dict=True, **inputs)
        logits = output.logits if "logits_to_keep" in inputs else output.logits[:, keep]
        logits = logits[..., : self.vocab_size].float()

        mask = attention_mask[:, -input_ids.shape[1] :].bool() if attention_mask is not None else None
        votes = {}
        for name, memory in memories.items():
            found = activations_for(memory, activations, input_ids)
            state = memory.step(input_ids, found, attention_mask=mask, cache=caches[name])
            votes[name] = memory.votes(state, keep).to(logits.device)
        return Components(output, logits, votes)

    def _weights_of_call(
        self, mix_weight: MixWeight | Mapping[str, MixWeight] | None, rows: int
    ) -> list[float] | list[float | Tensor]:
        """One weight per memory; a tensor `(B, 1)` where rows differ."""
        if mix_weight is None:
            return list(self._weights.values())
        given = settle_weights(self._weights, mix_weight, per_row=True).values()
        return [_for_rows(weight, rows) if isinstance(weight, Tensor) else weight for weight in given]

    def _mix(self, logits: Tensor, votes: list[Votes], weights: Sequence[float | Tensor]) -> Tensor:
        if not any(isinstance(weight, Tensor) or weight for weight in weights):
            return logits
        weights = [weight.to(logits.device) if isinstance(weight, Tensor) else weight for weight in weights]
        normaliser = torch.logsumexp(logits, -1, keepdim=True)
        mixed = mix_log_probs(logits - normaliser, votes, weights) + normaliser
        total = sum(weights)
        return torch.where(total[..., None] == 0, logits, mixed) if isinstance(total, Tensor) else mixed

    def new_cache(self, batch_size: int, base_cache: Cache | None = None) -> MixedCache:
        """An empty cache for `forward`; a dynamic one for the base unless another is given."""
        if base_cache is None:
            base_cache = DynamicCache(config=self.base.config.get_text_config(decoder=True))
        return MixedCache(base_cache, self.named_memories(), batch_size)

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        given = model_kwargs.get("past_key_values") is not None
        own: dict[str, Any] = model_kwargs if given else {}
        cast(Any, self.base)._prepare_cache_for_generation(
            generation_config, own, generation_mode, batch_size, max_cache_length
        )
        if given or generation_config.use_cache is False:
            return
        rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        model_kwargs["past_key_values"] = self.new_cache(rows, own.get("past_key_values"))

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        own = {name: value for name, value in model_kwargs.items() if name != "mix_weight"}  # not the assistant's
        return cast(Any, super())._get_candidate_generator(*args, model_kwargs=own, **kwargs)

    if TYPE_CHECKING:  # GenerationMixin binds it to a protocol that type checkers do not find fulfilled

        def generate(self, *args: Any, **kwargs: Any) -> Any: ...

    # --- loading and saving -------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        base: str | Path,
        *,
        memory: MemorySource | Mapping[str, MemorySource] | None = None,
        mix_weight: float | Mapping[str, float] | None = None,
        memory_window: int | None = None,
        memory_kwargs: dict[str, Any] | None = None,
        **base_kwargs: Any,
    ) -> Self:
        """A base and its memories from paths or hub ids.

        Args:
            base: Path, hub id or packaged name of a causal LM; or a folder that `save_pretrained` wrote.
            memory: Folder, hub id or loaded memory, or name to any of these; may be left out for a saved folder.
            mix_weight: In [0, 1]; what the memory was validated with if None.
            memory_window: Tokens a memory may look back; what it was trained with if None.
            memory_kwargs: For loading the memory: `dtype` (default the base's), `device_map`, `revision`, `retrieval` …
            base_kwargs: For loading the base: `dtype`, `device_map`, `quantization_config`, `revision`,
                `trust_remote_code` …

        Raises:
            TokenizerMismatchError: Base and memory have different tokenizers.
            ModelError: One of them cannot be reached.
            ConfigError: A weight is missing or out of range.
        """
        if isinstance(base_kwargs.get("config"), MixedLMConfig):  # AutoModel hands over the config it found
            base_kwargs.pop("config")
        place = Path(base)
        base, memory, saved = _open_saved(str(base), memory)
        sources = dict(memory) if isinstance(memory, Mapping) else {"memory": memory}
        if saved is not None:
            if mix_weight is None or isinstance(mix_weight, Mapping):
                kept = {name: weight for name, weight in (saved.mix_weights or {}).items() if name in sources}
                mix_weight = kept | dict(mix_weight or {})
            memory_window = saved.memory_window if memory_window is None else memory_window
            base_kwargs.setdefault("revision", saved.base_revision)
        memory_kwargs = dict(memory_kwargs or {})
        _check_names(sources)
        _check_window(memory_window)
        settings = {name: _settings_of(source, memory_kwargs) for name, source in sources.items()}
        settle_weights({name: found.mix_weight if found else None for name, found in settings.items()}, mix_weight)
        size = check_tokenizers(base, sources, base_kwargs, memory_kwargs)
        model = load_causal_lm(base, **base_kwargs)
        memory_kwargs.setdefault("dtype", model.dtype)
        memories = {}
        for name, source in sources.items():
            loaded = source if isinstance(source, Memory) else load_memory(source, base=base, **memory_kwargs)
            memories[name] = loaded if "device_map" in memory_kwargs else loaded.to(model.device)
        mixed = cls(model, memories, mix_weight, vocab_size=size, memory_window=memory_window, base_name=resolve(base))
        if saved is not None and (place / GENERATION_CONFIG_NAME).is_file():
            mixed.generation_config = GenerationConfig.from_pretrained(place)
        return mixed

    def save_pretrained(self, save_directory: str | Path, *, include_base: bool = False, **kwargs: Any) -> None:  # type: ignore[override]
        """Write references (with revisions), weights and the memories themselves.

        Args:
            save_directory: Folder to write.
            include_base: Copy the base's weights too, so that the folder needs nothing else.
            kwargs: For the base's `save_pretrained`.

        Raises:
            ConfigError: The base came from no folder or hub id, and is not to be copied.
        """
        if not self.config.base and not include_base:
            raise ConfigError("the base came from no folder or hub id to refer to; save it too with include_base=True")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = copy.deepcopy(self.config)
        config.memories = {name: f"memories/{name}" for name in self.memories}
        for name, memory in self.named_memories().items():
            memory.save_pretrained(folder / "memories" / name)
        if include_base:
            self.base.save_pretrained(folder / "base", **kwargs)
            config.base, config.base_revision = "base", None
        config.architectures = [type(self).__name__]
        config.save_pretrained(folder)
        self.generation_config.save_pretrained(folder)
        try:
            load_tokenizer(self.config.base, revision=self.config.base_revision).save_pretrained(folder)
            if include_base:
                load_tokenizer(self.config.base).save_pretrained(folder / "base")
        except ModelError:
            pass  # a base without tokenizer, as in tests, is saved without

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Not for a mixed model: push the memory, and name base and weight where it is loaded.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("push the memory: memlm.push_to_hub(folder, repo_id); its card says how to load it")


def activations_for(
    memory: Memory, captured: Mapping[str, Tensor], input_ids: Int[Tensor, "B T"]
) -> Float[Tensor, "B T D"] | None:
    """What `memory` reads of the base, from `capture` around a pass over `input_ids`; None where it reads tokens."""
    found = captured.get(memory.tap or "")
    return found.reshape(*input_ids.shape, -1) if found is not None else None  # some models flatten rows


def settle_weights(
    present: Mapping[str, float | None],
    mix_weight: MixWeight | Mapping[str, MixWeight] | None,
    *,
    per_row: bool = False,
) -> dict[str, Any]:
    """Name to weight, in the order of the memories: a number, or a tensor `(rows,)`.

    Args:
        present: Per memory the weight in force where none is given, or None.
        mix_weight: One weight for a single memory, or some by name.
        per_row: Whether a weight may be one per row of a batch.

    Raises:
        ConfigError: A weight is missing, of an unknown memory, outside [0, 1], or they sum to more than 1.
    """
    names = ", ".join(present)
    if mix_weight is None:
        mix_weight = {}
    elif not isinstance(mix_weight, Mapping):
        if len(present) != 1:
            raise ConfigError(f"mix_weight: give one weight per memory ({names or 'there is none'}), by name")
        mix_weight = dict.fromkeys(present, mix_weight)
    if unknown := [name for name in mix_weight if name not in present]:
        raise ConfigError(f"mix_weight names {', '.join(unknown)}; the memories are {names or 'none'}")
    weights: dict[str, Any] = {}
    for name, there in present.items():
        weight = mix_weight.get(name, there)
        if weight is None:
            raise ConfigError(
                f"mix_weight of {name!r} is missing: the memory records none from validation data; give one"
            )
        shape = tuple(torch.as_tensor(weight).shape)
        if len(shape) > int(per_row):
            allowed = "a number, or one per row" if per_row else "a number; one per row is for a single call"
            raise ConfigError(f"mix_weight of {name!r} has shape {shape}: give {allowed}")
        weights[name] = torch.as_tensor(weight).float() if shape else float(weight)  # type: ignore[arg-type]
    rows = {len(weight) for weight in weights.values() if isinstance(weight, Tensor)}
    if len(rows) > 1:
        raise ConfigError(f"mix_weight: the memories have weights for {' and '.join(map(str, sorted(rows)))} rows")
    check_weights(list(weights.values()))
    return weights


def _for_rows(weight: Tensor, rows: int) -> Tensor:
    """`(rows, 1)` from weights of as many rows, or of those that were each repeated, as beams are."""
    if not len(weight) or rows % len(weight):
        raise ConfigError(f"mix_weight: {len(weight)} weights for a batch of {rows} rows")
    return weight.repeat_interleave(rows // len(weight))[:, None]


def _settings_of(source: MemorySource, memory_kwargs: Mapping[str, Any]) -> MemorySettings | None:
    return (
        source.settings if isinstance(source, Memory) else read_settings(source, revision=memory_kwargs.get("revision"))
    )


def _check_names(memories: Iterable[str]) -> None:
    for name in memories:
        if not re.fullmatch(r"[\w-]+", name):  # names a module, and a folder where the mixture is saved
            raise ConfigError(f"memory name {name!r}: use letters, digits, '_' and '-' only")
        if hasattr(nn.ModuleDict(), name):
            raise ConfigError(f"memory name {name!r} is what torch calls something of its own; take another")


def _check_window(memory_window: int | None) -> None:
    if memory_window is not None and memory_window < 2:
        raise ConfigError(f"memory_window = {memory_window}: must be at least 2")


def _absolute(name: str) -> str:
    """A folder's full path, so that a saved reference holds in another working folder; a hub id as it is."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def _open_saved(
    base: str, memory: MemorySource | Mapping[str, MemorySource] | None
) -> tuple[str, MemorySource | Mapping[str, MemorySource], MixedLMConfig | None]:
    """Base and memories, looked up in the config where `base` is a folder that `save_pretrained` wrote."""
    folder = Path(base)
    path = folder / "config.json"
    saved = None
    if path.is_file():
        config = load_config(base)
        saved = config if isinstance(config, MixedLMConfig) else None
    if saved is None:
        if memory is None:
            raise ConfigError(f"memory is missing: {base} is a plain model, so name the memory to put beside it")
        return base, memory, None
    names = {name: str(folder / place) for name, place in (saved.memories or {}).items()}
    inside = folder / saved.base
    return str(inside) if saved.base and inside.is_dir() else saved.base, memory if memory is not None else names, saved


def check_tokenizers(
    base: str,
    memories: Mapping[str, MemorySource],
    base_kwargs: Mapping[str, Any] | None = None,
    memory_kwargs: Mapping[str, Any] | None = None,
) -> int | None:
    """The size of the vocabulary that base and memories share; None where the base comes without a tokenizer.

    Reads configs and tokenizers only, so it is done before any weights are loaded.

    Raises:
        TokenizerMismatchError: They differ; the message says in what.
        ModelError: Base or memory cannot be reached.
    """
    options, memory_options = _where_from(base_kwargs), _where_from(memory_kwargs)
    load_config(base, **options)
    ours = find_tokenizer(base, **options)
    for name, source in memories.items():
        settings = _settings_of(source, memory_options)
        if ours is None or (settings is not None and settings.tokenizer == fingerprint(ours)):
            continue
        label = name if isinstance(source, Memory) else str(source)
        theirs = None if isinstance(source, Memory) else find_tokenizer(str(source), **memory_options)
        if theirs is not None:
            check_same(ours, theirs, f"base {base}", f"memory {label}")
        elif settings is not None and settings.tokenizer is not None:
            raise TokenizerMismatchError(f"base {base} and memory {label} have different tokenizers; {ADVICE}")
    return vocabulary_size(ours) if ours is not None else None


def _where_from(kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (kwargs or {}).items() if name in ("revision", "trust_remote_code")}


AutoConfig.register(MixedLMConfig.model_type, MixedLMConfig)
AutoModelForCausalLM.register(MixedLMConfig, MixedLM)  # type: ignore[arg-type]

__all__ = ["MixedLM", "MixedLMConfig", "check_tokenizers"]
