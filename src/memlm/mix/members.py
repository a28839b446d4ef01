"""What a mixture is made of: base, memories, and the rule that weighs them."""

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, PreTrainedModel

from memlm.corpus.blocks import IGNORE
from memlm.errors import ConfigError
from memlm.files import lasting_name
from memlm.memory.protocol import Memory
from memlm.memory.voter import NoCache, Votes
from memlm.mix.base import BaseVoter
from memlm.mix.cache import MixedCache
from memlm.mix.components import Components
from memlm.mix.config import SIZES, MixedLMConfig
from memlm.mix.gate import Gate, GatedMemory, gate_config, places_of, weight_rule
from memlm.mix.gate_config import GateConfig, GateName
from memlm.mix.loading import (
    MemorySource,
    as_source,
    by_name,
    check_names,
    check_window,
    load_beside,
    settings_of,
)
from memlm.mix.mixture import logsumexp
from memlm.mix.sleep import Unread
from memlm.mix.weights import FixedWeights, MixWeight, Step, WeightRule, settle_weights
from memlm.models.adapters import has_adapter


class Mixture(PreTrainedModel):
    """A frozen base and its memories, which vote together; `MixedLM` speaks."""

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
            memory: One memory or name to memory: a folder, a hub id, a loaded memory, or a loaded causal LM, which
                serves as a Memory Decoder.
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
        given: dict[str, MemorySource] = {**by_name(memory)}
        check_names(given)
        if not all(isinstance(part, Memory) for part in given.values()):
            given = {**load_beside(base, given)}
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
            memory: As one of the constructor's.
            mix_weight: In [0, 1]; what it was validated with if None.
            kwargs: For loading it: `dtype` (default the base's), `revision` …

        Raises:
            ConfigError: The name is taken, the weights would sum to more than 1, or the gate asks for confidence and it
                has no head.
            TokenizerMismatchError: It has another tokenizer than the base.
            ModelError: It cannot be reached, or reads activations that the base does not have.
        """
        source = as_source(memory)
        check_names([name])
        if name in self.memories:
            raise ConfigError(f"memory name {name!r} is taken; remove that memory first")
        settings = settings_of(source, kwargs)
        recorded = {**self._weights, name: settings.mix_weight if settings else None}
        given = {} if mix_weight is None else {name: mix_weight}
        weights = settle_weights(recorded, given, together=self._gate.gate == "none")
        place, where = self.config.base, self.config.base_where
        self._adopt(name, load_beside(self.base, {name: source}, kwargs, name=place, where=where)[name])
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
        base, memories, read = self._voter, self.named_memories(), read or {}
        length, past = input_ids.shape[1], cache.get_seq_length() if cache is not None else 0
        caches = {name: cache.of(name, memory) if cache is not None else None for name, memory in memories.items()}
        heard = {memory.tap for memory in memories.values() if memory.tap is not None}
        state = base.step(
            input_ids,
            attention_mask=attention_mask,
            cache=cache.of_base if cache is not None else None,
            position_ids=position_ids,
            taps={*taps, *heard},
            **kwargs,
        )
        keep = _kept(logits_to_keep)
        logits = base.logits(state, keep)
        normaliser = logsumexp(logits)

        tokens, asked, missed = input_ids, rule.places(keep, length), Unread()
        if cache is not None:
            if isinstance(cache.rule, NoCache):  # begun at fixed weights
                cache.rule = rule.new_state(len(input_ids))
            if rule.asleep(cache.rule, past, len(cache.unread), length):
                cache.unread.add(input_ids, state.hidden, {tap: state.activations[tap] for tap in heard})
                return Components(state, logits, normaliser, {}, [0.0] * len(memories), {})
            missed, cache.unread = cache.unread, missed
        unread = len(missed)
        if unread:  # the memories wake, and read what they missed
            tokens = missed.before(input_ids)
            keep, asked = places_of(keep, length) + unread, slice(None)

        votes, states = {}, {}
        for name, memory in memories.items():
            if name in read:
                states[name], known = read[name]
            else:
                activations = state.activations[memory.tap] if memory.tap is not None else None
                if unread and memory.tap is not None and activations is not None:
                    activations = missed.before_activations(memory.tap, activations)
                hint = {"keep": asked} if _takes_keep(type(memory).step) else {}
                states[name] = memory.step(
                    tokens, activations, attention_mask=attention_mask, cache=caches[name], **hint
                )
                known = memory.votes(states[name], keep)
            votes[name] = known.to(logits.device)

        def columns(began: int, end: int) -> list[dict[str, Tensor]]:
            labels = torch.full_like(tokens, IGNORE)
            labels[:, began:end] = tokens[:, began + 1 : end + 1]
            whole = replace(state, hidden=missed.before_hidden(state.hidden)) if unread else state
            found = [base.columns(whole, labels.to(base.device))]
            found += [memory.columns(states[name], labels.to(memory.device)) for name, memory in memories.items()]
            shape = len(tokens), end - began
            return [{name: values.view(shape).to(logits.device) for name, values in part.items()} for part in found]

        width = tokens.shape[1]
        before = (
            attention_mask[:, -width - 1] if attention_mask is not None and attention_mask.shape[1] > width else None
        )
        step = Step(
            tokens=tokens.to(logits.device),
            past=past - unread,
            keep=keep,
            base=logits,
            normaliser=normaliser,
            memories=votes,
            real=None if attention_mask is None else attention_mask[:, -width:].bool().to(logits.device),
            real_before=None if before is None else before.bool().to(logits.device),
            evidence=_evidence(evidence_mask, past - unread, tokens.to(logits.device)),
            confidence=lambda name: memories[name].confidence(states[name], keep).to(logits.device),
            unread=unread,
            columns=columns,
        )
        weights = rule.weights(step, cache.rule if cache is not None else None)
        return Components(state, logits, normaliser, votes, weights, states)

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

    @property
    def _is_stateful(self) -> bool:  # transformers asks before it drafts
        voter = self._voter
        drafts = voter.keeps_cache and voter.abilities.chunks and voter.abilities.takes_back
        return bool(getattr(self.base, "_is_stateful", False)) or not drafts


@functools.cache
def _takes_keep(step: Callable[..., Any]) -> bool:
    """Whether a memory's `step` is told at which places it will vote."""
    return "keep" in inspect.signature(step).parameters


def _kept(logits_to_keep: int | Tensor) -> slice | Tensor:
    if isinstance(logits_to_keep, Tensor):
        return logits_to_keep
    return slice(-logits_to_keep, None) if logits_to_keep else slice(None)


def _evidence(mask: Tensor | None, past: int, tokens: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"] | None:
    """A mask of a text at these tokens, that come after `past` others; True beyond its end."""
    if mask is None or mask.shape[1] <= past:
        return None
    here = mask[:, past : past + tokens.shape[1]].bool()
    return nn.functional.pad(here, (0, tokens.shape[1] - here.shape[1]), value=True).to(tokens.device)
