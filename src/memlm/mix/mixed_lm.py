"""`MixedLM`: a frozen base and its memories as one model of transformers."""

import contextlib
import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from memlm.corpus.blocks import IGNORE
from memlm.errors import ConfigError
from memlm.files import lasting_name
from memlm.memory.protocol import Memory
from memlm.memory.voter import Votes
from memlm.mix.base import BaseVoter, positions_restart
from memlm.mix.cache import MixedCache
from memlm.mix.components import Components, Watch, read_components
from memlm.mix.config import SIZES, MixedLMConfig, register
from memlm.mix.gate import Gate, GatedMemory, gate_config, weight_rule
from memlm.mix.gate_config import GateConfig, GateName
from memlm.mix.generating import MixedGenerationMixin
from memlm.mix.loading import (
    MemorySource,
    check_keyword,
    check_names,
    check_window,
    load_beside,
    load_mixture,
    save_mixture,
    settings_of,
)
from memlm.mix.weights import FixedWeights, MixWeight, WeightRule, settle_weights
from memlm.models.abilities import CACHE
from memlm.models.adapters import has_adapter
from memlm.models.loading import default_device, parse_dtype
from memlm.targets.config import RetrievalConfig


class MixedLM(MixedGenerationMixin, PreTrainedModel):
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
        memory: MemorySource | Mapping[str, MemorySource],
        mix_weight: float | Mapping[str, float] | None = None,
        *,
        gate: GateName | GateConfig | None = None,
        vocab_size: int | None = None,
        memory_window: int | None = None,
        base_name: str | None = None,
    ) -> None:
        """
        Args:
            base: Any causal LM; its weights and config are left as they are.
            memory: One memory or name to memory, loaded, or its folder or hub id.
            mix_weight: In [0, 1] (α in Memory Decoder, λ in MLP Memory), at every token; what the memory was validated
                with if None.
            gate: What weighs the memories token by token: see `GateConfig`. If None: nothing where `mix_weight` is
                given, else their confidence and the posterior where all have a head, else the posterior.
            vocab_size: Ids of the shared tokenizer are below it; the smallest of all parts if None.
            memory_window: Tokens a memory may look back; what it was trained with if None.
            base_name: Where the base came from, for `save_pretrained`.

        Raises:
            ConfigError: A weight is missing or outside [0, 1], they sum to more than 1, the window is too small, or the
                gate asks for confidence and a memory has no head.
            TokenizerMismatchError: A memory that is loaded here has another tokenizer than the base.
            ModelError: It cannot be reached.
        """
        check_window(memory_window)
        given = dict(memory) if isinstance(memory, Mapping) else {"memory": memory}
        check_names(given)
        if not all(isinstance(part, Memory) for part in given.values()):
            given = load_beside(base, given)
        size = int(base.config.get_text_config().vocab_size)
        size = size if vocab_size is None else min(size, vocab_size)
        config = MixedLMConfig(
            base=lasting_name(base_name or base.config.name_or_path or ""),
            vocab_size=size,
            memory_window=memory_window,
        )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", *SIZES):
            with contextlib.suppress(Exception):  # some configs tell of every layer alone, and refuse to tell of all
                setattr(config, name, getattr(base.config.get_text_config(), name, None))
        config._attn_implementation = "eager"  # has no attention of its own; the base keeps what it was loaded with
        super().__init__(config)
        self.base: PreTrainedModel = base
        self.memories = nn.ModuleDict()
        self.generation_config = copy.deepcopy(base.generation_config) if base.generation_config else GenerationConfig()
        self._voter = BaseVoter(base, size)
        self._weights: dict[str, Any] = {}
        self._gate = gate_config(gate, weight_given=mix_weight is not None)
        self._rule: WeightRule = FixedWeights({})
        self._vocab_sizes = {"": size}  # the base's; a memory's below its name
        for name, part in given.items():
            self._adopt(name, cast(Memory, part))
        self._weigh(self._settled(mix_weight))
        if not has_adapter(base):  # whose weights may be in training elsewhere
            base.requires_grad_(False)
        self.eval()

    def _adopt(self, name: str, memory: Memory) -> None:
        """Put a memory beside the base."""
        memory.check_base(self.base)
        # a shallow copy shares weights; vocabulary and window are this mixture's own, so mixtures can share a memory
        part = copy.copy(memory)
        if self.config.memory_window is not None:
            part.set_window(self.config.memory_window)
        self.memories[name] = part.requires_grad_(False).eval()
        self._vocab_sizes[name] = memory.vocab_size
        self._share_vocabulary()

    def _forget(self, name: str) -> None:
        """Take a memory from beside the base."""
        del self.memories[name], self._vocab_sizes[name]
        self._share_vocabulary()

    def _share_vocabulary(self) -> None:
        """Make the vocabulary what all parts share."""
        self.config.vocab_size = self._voter.vocab_size = min(self._vocab_sizes.values())
        for part in self.named_memories().values():
            part.settings = part.settings.model_copy(update={"vocab_size": self.config.vocab_size})

    def __repr__(self) -> str:
        gate = self.gate.gate
        weights = [
            f"{gate if gate != 'none' else f'{w:g}'} {name} ({type(self.memories[name]).__name__})"
            for name, w in self._weights.items()
        ]
        base = f"{type(self.base).__name__} {self.config.base}".rstrip()
        return f"MixedLM({' + '.join([base, *weights])}, {self.vocab_size:,} tokens)"

    # --- the parts ----------------------------------------------------------------------------------------------

    def named_memories(self) -> dict[str, Memory]:
        """Name to memory."""
        return {name: cast(Memory, memory) for name, memory in self.memories.items()}

    @classmethod
    def on_default_device(
        cls,
        base: str | Path,
        *,
        dtype: str = "auto",
        retrieval: RetrievalConfig | None = None,
        device: str | torch.device | None = None,
        **options: Any,
    ) -> Self:
        """As `from_pretrained`, where this machine computes; so commands load a mixture.

        Args:
            dtype: As `parse_dtype` takes it.
            retrieval: How datastores are searched; as was said when they were validated if None.
            device: Another device than the default one.
            options: Further ones of `from_pretrained`.
        """
        precision = parse_dtype(dtype, default_device())
        mixed = cls.from_pretrained(base, dtype=precision, memory_kwargs={"retrieval": retrieval}, **options)
        return mixed.to(device or default_device())  # type: ignore[arg-type]

    @property
    def mix_weights(self) -> dict[str, float]:
        """Name to weight: what each counts where no gate weighs them; without those of which that is not known."""
        return {name: weight for name, weight in self._weights.items() if weight is not None}

    @property
    def gate(self) -> GateConfig:
        """What weighs the memories; its `gate` is `none` where the weights are fixed."""
        return self._rule.config if isinstance(self._rule, Gate) else self._gate.model_copy(update={"gate": "none"})

    def set_gate(self, gate: GateName | GateConfig | None) -> None:
        """Change what weighs the memories, from the next text on.

        Args:
            gate: As `MixedLM` takes it; `none` for the fixed weights.

        Raises:
            ConfigError: Confidence is asked for and a memory has no head, or weights are missing.
        """
        before, self._gate = self._gate, gate_config(gate)
        try:
            self._weigh(self._settled(None, self._weights))
        except ConfigError:
            self._gate = before
            raise

    def set_mix_weight(self, mix_weight: float | Mapping[str, float] | None) -> None:
        """Fix the weight of the memory, or of some by name, from the next forward pass on; no gate weighs them then.

        Args:
            mix_weight: In [0, 1] each; what the memories were validated with if None. Memories that are not named
                keep theirs.

        Raises:
            ConfigError: A weight is missing, of an unknown memory, outside [0, 1], or they sum to more than 1.
        """
        before, self._gate = self._gate, self._gate.model_copy(update={"gate": "none"})
        try:
            self._weigh(self._settled(mix_weight, self._weights if mix_weight is not None else {}))
        except ConfigError:
            self._gate = before
            raise

    def _settled(
        self, mix_weight: float | Mapping[str, float] | None, present: Mapping[str, float | None] | None = None
    ) -> dict[str, Any]:
        """Weights by name, from what is given, `present`, and what the memories were validated with."""
        recorded = {name: memory.settings.mix_weight for name, memory in self.named_memories().items()}
        return settle_weights(recorded | dict(present or {}), mix_weight, together=self._gate.gate == "none")

    def _weigh(self, weights: dict[str, Any]) -> None:
        known = {name: GatedMemory(weights[name], part.confidence_head) for name, part in self.named_memories().items()}
        self._rule = weight_rule(self._gate, known)
        self._weights = weights
        self.config.mix_weights = dict(weights)
        self.config.gate = self.gate.model_dump() if isinstance(self._rule, Gate) else None

    def add_memory(self, name: str, memory: MemorySource, mix_weight: float | None = None, **kwargs: Any) -> None:
        """Put one more memory beside the base.

        Args:
            name: A new one: letters, digits, `_` and `-`.
            memory: Folder, hub id or loaded memory.
            mix_weight: In [0, 1]; what it was validated with if None.
            kwargs: For loading it: `dtype` (default the base's), `revision` …

        Raises:
            ConfigError: The name is taken, the weights would sum to more than 1, or the gate asks for confidence and it
                has no head.
            TokenizerMismatchError: It has another tokenizer than the base.
            ModelError: It cannot be reached, or reads activations that the base does not have.
        """
        check_names([name])
        if name in self.memories:
            raise ConfigError(f"memory name {name!r} is taken; remove that memory first")
        settings = settings_of(memory, kwargs)
        recorded = {**self._weights, name: settings.mix_weight if settings else None}
        given = {} if mix_weight is None else {name: mix_weight}
        weights = settle_weights(recorded, given, together=self._gate.gate == "none")
        place, where = self.config.base, self.config.base_where
        self._adopt(name, load_beside(self.base, {name: memory}, kwargs, name=place, where=where)[name])
        try:
            self._weigh(weights)
        except ConfigError:
            self._forget(name)
            raise

    def remove_memory(self, name: str) -> None:
        """Take a memory away; the base gets its weight.

        Raises:
            ConfigError: There is no such memory.
        """
        if name not in self.memories:
            raise ConfigError(f"no memory is called {name!r}; the memories are {', '.join(self.memories) or 'none'}")
        self._forget(name)
        self._weigh({other: weight for other, weight in self._weights.items() if other != name})

    @property
    def vocab_size(self) -> int:
        """Ids that base and memories share are below it."""
        return self.config.vocab_size

    @property
    def device(self) -> torch.device:
        """Where it takes its tokens."""
        return self._voter.device

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> None:  # type: ignore[override]
        return None  # two heads give the logits; neither is the model's

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        pass  # the parts tied theirs when they were loaded

    # --- forward and cache --------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        mix_weight: MixWeight | Mapping[str, MixWeight] | None = None,
        evidence_mask: Tensor | None = None,
        cache: Cache | None = None,
        watch: Watch | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Mixed logits of the next token.

        Args:
            input_ids: The new tokens.
            attention_mask: `(B, past + T)`, 0 at padding.
            position_ids: For the base; each memory counts for itself, so they may not start anew within a row.
            past_key_values: A `MixedCache` from an earlier call.
            labels: Gives `loss`, the mean cross-entropy of the mixture; -100 is ignored; shifted here.
            use_cache: Whether to return a cache; default false, unless `past_key_values` is given.
            logits_to_keep: Only the last so many places, or these places; 0 means all.
            mix_weight: For this call only, a number or one per row of the batch, by name where there are several
                memories; `generate` passes it on. Where rows are fewer than the batch's, as with beams, each stands
                for as many neighbours.
            evidence_mask: `(B, L)`, 0 at tokens that tell a gate nothing, as those of a chat template, from the row's
                first one on, padding included; tokens beyond it count.
            cache: The name of `past_key_values` from transformers 5.24 on; either may be given.
            watch: Of `generate`: looks whether all are finite.
            kwargs: Passed to the base where its `forward` knows them.

        Raises:
            TypeError: `past_key_values` is not a `MixedCache`.
            ConfigError: There are no token ids, the mask is not `(B, L)`, or positions start anew; the base cannot read
                padded rows or behind a cache; a weight is outside [0, 1], they sum to more than 1, or do not fit the
                batch; or the cache is older than a memory.
        """
        for name in kwargs:
            check_keyword(name)
        past_key_values = cache if past_key_values is None else past_key_values
        if input_ids is None:
            raise ConfigError("input_ids are missing: memories read token ids, so embeddings alone are not enough")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ConfigError(f"attention_mask has {attention_mask.ndim} axes: a mixture takes (batch, length) only")
        past = past_key_values.get_seq_length() if isinstance(past_key_values, MixedCache) else 0
        if position_ids is not None and positions_restart(position_ids, attention_mask, past):
            raise ConfigError(
                "position_ids start anew within a row: the base would tell documents apart there, memories read rows"
                " whole; give each document a row of its own"
            )
        if past_key_values is not None and not isinstance(past_key_values, MixedCache):
            raise TypeError(
                f"past_key_values is a {type(past_key_values).__name__}; a mixed model needs its own MixedCache"
            )
        self._voter.check_reads(input_ids, attention_mask, past)
        use_cache = use_cache if use_cache is not None else past_key_values is not None
        use_cache = use_cache and self._voter.keeps_cache
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache(len(input_ids))
        parts = self.components(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            logits_to_keep,
            mix_weight=mix_weight,
            evidence_mask=evidence_mask,
            use_cache=use_cache,
            **kwargs,
        )
        logits = parts.mixed()
        if watch is not None:
            logits = watch.saw(parts, logits)

        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device), ignore_index=IGNORE
            )
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: past_key_values if use_cache else None},
            hidden_states=getattr(parts.base.output, "hidden_states", None),
            attentions=getattr(parts.base.output, "attentions", None),
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
        mix_weight: MixWeight | Mapping[str, MixWeight] | None = None,
        evidence_mask: Tensor | None = None,
        taps: Iterable[str] = (),
        read: Mapping[str, tuple[Any, Votes]] | None = None,
        **kwargs: Any,
    ) -> Components:
        """What base and memories say of the next token, each for itself.

        Args:
            input_ids, attention_mask, position_ids, logits_to_keep: As `forward` takes them.
            mix_weight, evidence_mask, kwargs: As `forward` takes them.
            cache: Extended by `input_ids`; None: they are all there is.
            taps: Modules of the base whose inputs are kept, beside those that memories read.
            read: Memories that have read `input_ids` already: their states there, and their votes at the places that
                are kept.
        """
        rule = self._rule
        if mix_weight is not None:
            rule = FixedWeights(settle_weights(self._weights, mix_weight, per_row=True))
        given = input_ids, attention_mask, position_ids, cache, logits_to_keep
        options: dict[str, Any] = {"evidence_mask": evidence_mask, "taps": taps, "read": read or {}}
        return read_components(self._voter, self.named_memories(), rule, *given, **options, **kwargs)

    def new_cache(self, batch_size: int, base_cache: Cache | None = None) -> MixedCache:
        """An empty cache for `forward`; a dynamic one for the base unless another is given.

        Raises:
            ConfigError: The base keeps no past in a cache of transformers.
        """
        if not self._voter.keeps_cache:
            raise ConfigError(f"{type(self.base).__name__} keeps no past in a cache of transformers: go on without one")
        if base_cache is None:
            base_cache = self._voter.new_cache(batch_size).inner
        return MixedCache(base_cache, self.named_memories(), self._rule.new_state(batch_size), batch_size)

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Not for a mixed model: its base takes adapters.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("adapters belong to the base: call mixture.base.load_adapter or add_adapter")

    add_adapter = load_adapter

    # --- loading and saving -------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        base: str | Path | PreTrainedModel,
        *,
        memory: MemorySource | Mapping[str, MemorySource] | None = None,
        mix_weight: float | Mapping[str, float] | None = None,
        gate: GateName | GateConfig | None = None,
        memory_window: int | None = None,
        memory_kwargs: dict[str, Any] | None = None,
        **base_kwargs: Any,
    ) -> Self:
        """A base and its memories from paths or hub ids.

        Args:
            base: Path, hub id or packaged name of a causal LM, or a loaded one; or what `save_pretrained` wrote.
            memory: Folder, hub id or loaded memory, or name to any of these; may be left out for a saved folder.
            mix_weight: In [0, 1], at every token; what the memory was validated with if None.
            gate: What weighs the memories token by token, as `MixedLM` takes it; as it was saved if None.
            memory_window: Tokens a memory may look back; what it was trained with if None.
            memory_kwargs: For loading the memory: `dtype` (default the base's), `device_map`, `revision`, `retrieval` …
            base_kwargs: For loading the base: `dtype`, `device_map`, `quantization_config`, `revision`,
                `subfolder`, `cache_dir`, `token`, `gguf_file`, `trust_remote_code` …

        Raises:
            TokenizerMismatchError: Base and memory have different tokenizers.
            ModelError: One of them cannot be reached.
            ConfigError: A weight is missing or out of range.
        """
        return load_mixture(cls, base, memory, mix_weight, gate, memory_window, memory_kwargs, base_kwargs)

    def save_pretrained(self, save_directory: str | Path, *, include_base: bool = False, **kwargs: Any) -> None:  # type: ignore[override]
        """Write a reference to the base (with its revision), its adapter, the weights and the memories themselves.

        Args:
            save_directory: Folder to write.
            include_base: Copy the base's weights too, so that the folder needs nothing else.
            kwargs: For the base's `save_pretrained`.

        Raises:
            ConfigError: The base is not to be copied, and came from no folder or hub id or is not what is stored there.
        """
        save_mixture(self, save_directory, include_base, kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Not for a mixed model: push the memory, and name base and weight where it is loaded.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("push the memory: memlm.push_to_hub(folder, repo_id); its card says how to load it")


register()
AutoModelForCausalLM.register(MixedLMConfig, MixedLM, exist_ok=True)  # type: ignore[arg-type]
