"""`MixedLM`: a frozen base and its memories as one model of transformers."""

import contextlib
import copy
import inspect
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from memlm.corpus.blocks import IGNORE
from memlm.errors import ConfigError
from memlm.files import lasting_name
from memlm.memory.protocol import Memory
from memlm.memory.voter import Votes
from memlm.mix.base import BaseState, BaseVoter, narrowed
from memlm.mix.cache import MixedCache
from memlm.mix.config import SIZES, MixedLMConfig, register
from memlm.mix.decoding import Watch, strange_processor
from memlm.mix.drafting import Judge, check_drafting, decode_drafted, warn_plain, why_plain
from memlm.mix.drawing import decode_drawn, why_not_drawn
from memlm.mix.gate import Gate, GatedMemory, gate_config, places_of, weight_rule
from memlm.mix.gate_config import GateConfig, GateName
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
from memlm.mix.mixture import mix_log_probs
from memlm.mix.pace import Pace
from memlm.mix.sleep import Unread
from memlm.mix.weights import FixedWeights, MixWeight, Step, Weight, WeightRule, settle_weights
from memlm.models.abilities import CACHE
from memlm.models.adapters import has_adapter
from memlm.models.loading import embedding_rows, longest_context


@dataclass(frozen=True)
class Components:
    """What base and memories say of the next token at the same places."""

    base: BaseState
    """What the base made of the tokens."""
    logits: Float[Tensor, "B T V"]
    """The base's in float32, over the shared vocabulary."""
    normaliser: Float[Tensor, "B T 1"]
    """Their logsumexp."""
    votes: dict[str, Votes]
    """Per memory; none where all sleep."""
    weights: list[Weight]
    """Per memory, as the rule weighs them here."""
    states: dict[str, Any]
    """Per memory, what it made of the tokens, and of those before that it had not read; none where all sleep."""


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
        self._gate = gate_config(gate)
        self._rule: WeightRule = FixedWeights({})
        self._vocab_sizes = {"": size}  # the base's; a memory's below its name
        for name, part in given.items():
            self._adopt(name, cast(Memory, part))
        if mix_weight is not None and gate is None:
            self._gate = GateConfig(gate="none")
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
        before, self._gate = self._gate, GateConfig(gate="none")
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
            ConfigError: The name is taken, or the weights would sum to more than 1.
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
        self._weigh(weights)

    def remove_memory(self, name: str) -> None:
        """Take a memory away; the base gets its weight.

        Raises:
            ConfigError: There is no such memory.
        """
        if name not in self.memories:
            raise ConfigError(f"no memory is called {name!r}; the memories are {', '.join(self.memories) or 'none'}")
        del self.memories[name], self._vocab_sizes[name]
        self._share_vocabulary()
        self._weigh({other: weight for other, weight in self._weights.items() if other != name})

    @property
    def vocab_size(self) -> int:
        """Ids that base and memories share are below it."""
        return self.config.vocab_size

    @property
    def _is_stateful(self) -> bool:  # transformers asks before it drafts
        voter = self._voter
        drafts = voter.keeps_cache and voter.abilities.chunks and voter.abilities.takes_back
        return bool(getattr(self.base, "_is_stateful", False)) or not drafts

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
        if position_ids is not None and _restart(position_ids, attention_mask, past):
            raise ConfigError(
                "position_ids start anew within a row: the base would tell documents apart there, memories read rows"
                " whole; give each document a row of its own"
            )
        if past_key_values is not None and not isinstance(past_key_values, MixedCache):
            raise TypeError(
                f"past_key_values is a {type(past_key_values).__name__}; a mixed model needs its own MixedCache"
            )
        self._check_ability(input_ids, attention_mask, past_key_values)
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
        logits = self._mix(parts)
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

    def check_reads(self, input_ids: Int[Tensor, "B T"]) -> None:
        """Raise unless the base can read a text of these tokens at once.

        Raises:
            ConfigError: It is longer than the base has positions for, or a token has no row.
        """
        self._check_ability(input_ids, None, None)

    def _check_ability(self, input_ids: Tensor, mask: Tensor | None, cache: MixedCache | None) -> None:
        """Raise unless the base can read this: these ids, so many, padded, behind a cache.

        Raises:
            ConfigError: It cannot.
        """
        name, known = type(self.base).__name__, cache.get_seq_length() if cache is not None else 0
        rows, longest = embedding_rows(self.base), longest_context(self.base.config)
        if longest is not None and known + input_ids.shape[1] > longest:
            length = known + input_ids.shape[1]
            raise ConfigError(f"{length} tokens are more than the {longest} that base {name} has positions for")
        if not known and input_ids.numel() and (largest := int(input_ids.max())) >= rows:  # a token made later has one
            raise ConfigError(f"token id {largest} is outside the {rows} of base {name}; leave that token out")
        if mask is not None and bool((mask[:, 1:] > mask[:, :-1]).any()) and not self._voter.abilities.padding:
            raise ConfigError(f"{name} reads padding on the left as text: give it rows one by one, or of one length")
        if known and input_ids.shape[1] > 1 and not self._voter.abilities.chunks:
            raise ConfigError(f"{name} goes on behind a cache by single tokens only: give one at a time, or no cache")

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
        use_cache: bool = False,
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
            use_cache: Passed to the base.
        """
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        keep = slice(None) if isinstance(keep, int) else keep
        memories, rule = self.named_memories(), self._rule
        if mix_weight is not None:
            rule = FixedWeights(settle_weights(self._weights, mix_weight, per_row=True))
        asked = rule.places(keep, input_ids.shape[1])
        past = cache.get_seq_length() if cache is not None else 0
        caches = {name: cache.of(name, memory) if cache is not None else None for name, memory in memories.items()}
        base = self._voter.step(
            input_ids,
            attention_mask=attention_mask,
            cache=cache.of_base if cache is not None else None,
            position_ids=position_ids,
            taps={*taps, *(memory.tap for memory in memories.values() if memory.tap is not None)},
            use_cache=use_cache,
            **kwargs,
        )
        logits = self._voter.logits(base, keep)
        normaliser = torch.logsumexp(logits, -1, keepdim=True)
        state = cache.rule if cache is not None else None
        unread = len(cache.unread) if cache is not None else 0
        length = input_ids.shape[1]
        if cache is not None and rule.asleep(state, past, unread, length):
            heard = {memory.tap for memory in memories.values() if memory.tap is not None}
            cache.unread.add(input_ids, base.hidden, {tap: base.activations[tap] for tap in heard})
            return Components(base, logits, normaliser, {}, [0.0] * len(memories), {})
        tokens = input_ids
        if cache is not None and unread:  # the memories wake, and read what they missed
            missed, cache.unread = cache.unread, Unread()
            tokens = missed.before(input_ids)
            keep, asked = places_of(keep, length) + unread, slice(None)
        else:
            missed = None
        votes, states = {}, {}
        for name, memory in memories.items():
            if read is not None and name in read:
                states[name], votes[name] = read[name][0], cast(Any, read[name][1]).to(logits.device)
                continue
            activations = base.activations[memory.tap] if memory.tap is not None else None
            if missed is not None and memory.tap is not None and activations is not None:
                activations = missed.before_activations(memory.tap, activations)
            hint = {"keep": asked} if "keep" in inspect.signature(memory.step).parameters else {}
            states[name] = memory.step(tokens, activations, attention_mask=attention_mask, cache=caches[name], **hint)
            votes[name] = memory.votes(states[name], keep).to(logits.device)

        def columns(began: int, end: int) -> list[dict[str, Tensor]]:
            labels = torch.full_like(tokens, IGNORE)
            labels[:, began:end] = tokens[:, began + 1 : end + 1]
            whole = base if missed is None else replace(base, hidden=missed.before_hidden(base.hidden))
            found = [self._voter.columns(whole, labels.to(self._voter.device))]
            found += [memory.columns(states[name], labels.to(memory.device)) for name, memory in memories.items()]
            shape = len(tokens), end - began
            return [{name: values.view(shape).to(logits.device) for name, values in part.items()} for part in found]

        step = Step(
            tokens.to(logits.device),
            past - unread,
            keep,
            logits,
            normaliser,
            votes,
            None if attention_mask is None else attention_mask[:, -tokens.shape[1] :].bool().to(logits.device),
            _from(evidence_mask, past - unread, tokens.to(logits.device)),
            lambda name: memories[name].confidence(states[name], keep).to(logits.device),
            unread,
            columns,
        )
        return Components(base, logits, normaliser, votes, rule.weights(step, state), states)

    def _mix(self, parts: Components) -> Tensor:
        logits, weights = parts.logits, parts.weights
        if not any(isinstance(weight, Tensor) or weight for weight in weights):
            return logits
        mixed = mix_log_probs(logits, list(parts.votes.values()), weights, parts.normaliser)
        total = sum(weights)
        return torch.where(total[..., None] == 0, logits, mixed) if isinstance(total, Tensor) else mixed

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

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        beams = (generation_config.num_beams or 1) > 1
        if not self._voter.keeps_cache or (beams and not self._voter.abilities.rows):
            name = type(self.base).__name__
            what = "keeps no past in a cache" if not self._voter.keeps_cache else "mixes up the rows of its cache"
            warnings.warn(f"{name} {what}; all text is read anew for every token", stacklevel=2)
            generation_config.use_cache = model_kwargs["use_cache"] = False
            return
        given = model_kwargs.get(CACHE) is not None
        own: dict[str, Any] = model_kwargs if given else {}
        cast(Any, self.base)._prepare_cache_for_generation(
            generation_config, own, generation_mode, batch_size, max_cache_length
        )
        if given or generation_config.use_cache is False:
            return
        rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        model_kwargs[CACHE] = self.new_cache(rows, own.get(CACHE))

    def _validate_generation_mode(self, mode: Any, config: GenerationConfig, options: dict[str, Any]) -> None:
        drafter, rows = options.get("assistant_model"), self.base.config.get_text_config().vocab_size
        if drafter is not None and rows > self.vocab_size and drafter.config.get_text_config().vocab_size == rows:
            options["assistant_model"] = narrowed(
                drafter, self.vocab_size
            )  # both are padded beyond the tokenizer's ids
        cast(Any, super())._validate_generation_mode(mode, config, options)

    def _validate_generated_length(
        self, generation_config: GenerationConfig, input_ids_length: int, *args: Any
    ) -> None:
        cast(Any, super())._validate_generated_length(generation_config, input_ids_length, *args)
        longest = longest_context(self.base.config)
        if longest is not None and (generation_config.max_length or 0) > longest:
            raise ConfigError(
                f"a prompt of {input_ids_length} tokens and {generation_config.max_length - input_ids_length} new ones"
                f" are more than the {longest} that base {type(self.base).__name__} has positions for: lower"
                " max_new_tokens or shorten the prompt"
            )

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        check_drafting(model_kwargs.get("drafting"), bool(model_kwargs.get("drawing")), model_kwargs.get("warp"))
        own = {*self._voter.arguments, "drafting", "drawing", "warp", "draft_judge"}
        strange = {name: value for name, value in model_kwargs.items() if name not in own}
        cast(Any, super())._validate_model_kwargs(strange)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if kwargs.get("drafting") is not None or kwargs.get("drawing"):
            raise ConfigError("drafting and drawing are for greedy decoding and sampling, not for beams or assistants")
        inputs = cast(Any, super()).prepare_inputs_for_generation(*args, **kwargs)
        if inputs["input_ids"].shape[1] == 1:  # pictures and sounds belong to the prompt
            inputs = {n: value for n, value in inputs.items() if not n.startswith(("pixel_", "image_", "input_feat"))}
        return inputs

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Not for a mixed model, whose memories keep no pages.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("a mixture cannot generate with paged caches (generate_batch): call generate")

    def _sample(
        self,
        input_ids: Int[Tensor, "B N"],
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        drafting: int | Literal["auto"] | Pace | None = None,
        drawing: bool = False,
        warp: Literal["components"] | None = None,
        draft_judge: Judge | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """transformers' loop of greedy decoding and sampling; with `drafting` or `drawing` ours, see `generate`."""
        watch = model_kwargs.pop("watch", None)  # the loops of ours look for themselves
        given = input_ids, logits_processor, stopping_criteria, generation_config
        if drafting is not None or drawing:
            why = why_plain(self, input_ids, stopping_criteria, streamer, generation_config, model_kwargs)
            if drawing:
                one_text = None if len(input_ids) == 1 else "components are drawn for one text at a time"
                refused = (
                    one_text or why or why_not_drawn(self, logits_processor, generation_config, warp, model_kwargs)
                )
                if refused:
                    raise ConfigError(f"nothing can be drawn: {refused}")
                return decode_drawn(self, *given, streamer, model_kwargs)
            if why is None and (strange := strange_processor(logits_processor, len(input_ids))):
                why = f"{strange} may be more than a function of text and scores"
            if why is None:
                pace = drafting if isinstance(drafting, Pace) else Pace(None if drafting == "auto" else drafting)
                return decode_drafted(self, *given, streamer, pace, model_kwargs, draft_judge)
            warn_plain(why)
        return cast(Any, super())._sample(
            *given, synced_gpus=synced_gpus, streamer=streamer, watch=watch, **model_kwargs
        )

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Not for a mixed model: its base takes adapters.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("adapters belong to the base: call mixture.base.load_adapter or add_adapter")

    add_adapter = load_adapter

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        if kwargs["generation_config"].assistant_early_exit is not None:
            raise NotImplementedError("a mixture cannot draft by leaving its layers early: give an assistant_model")
        if model_kwargs.get("drafting") is not None or model_kwargs.get("drawing"):
            raise ConfigError("an assistant drafts already: leave out drafting and drawing")
        own = {n: value for n, value in model_kwargs.items() if n not in ("mix_weight", "evidence_mask", "watch")}
        return cast(Any, super())._get_candidate_generator(*args, model_kwargs=own, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, and three keywords more.

        Args:
            drafting: Tokens that the memory drafts at a time, or auto: what gives most tokens a second; or a
                `Pace`, which tells afterwards what was accepted.
            drawing: Sample by drawing a component for each token, of which only that one is read.
            warp: components: processors may act on each component that is drawn, instead of the mixture.
            draft_judge: Decides in place of `memlm.mix.drafting.judge` which drafted tokens are accepted, for
                measurements; the text is then not the mixture's.

        Raises:
            ModelError: Base or memory gives scores that are not finite.
        """
        watch = Watch(deferred=self.device.type != "cpu")
        found = cast(Any, super()).generate(*args, **kwargs, watch=watch)
        watch.end()
        return found

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


def _restart(position_ids: Tensor, attention_mask: Tensor | None, past: int) -> bool:
    """Whether positions go down from a token to the next, as where documents are packed into a row.

    Of `past` tokens before them, those that the mask shows count. One token at a time is not looked at on an
    accelerator, which would have to be waited for at each.
    """
    if position_ids.ndim != 2 or (position_ids.shape[1] < 2 and (not past or position_ids.device.type != "cpu")):
        return False
    there = torch.ones_like(position_ids, dtype=torch.bool)
    before = torch.full_like(position_ids[:, 0], past)
    if attention_mask is not None and attention_mask.shape[1] >= position_ids.shape[1]:
        there = attention_mask[:, -position_ids.shape[1] :].bool().to(there.device)
        before = attention_mask[:, : -position_ids.shape[1]].sum(1).to(there.device)
    down = (position_ids[:, 1:] <= position_ids[:, :-1]) & there[:, 1:] & there[:, :-1]
    behind = (position_ids[:, 0] < before) & there[:, 0] if past else down[:, :0]
    return bool(down.any() | behind.any())


def _from(mask: Tensor | None, past: int, tokens: Int[Tensor, "B T"]) -> Tensor | None:
    """A mask of a text at these tokens, that come after `past` others; True beyond its end."""
    if mask is None or mask.shape[1] <= past:
        return None
    here = mask[:, past : past + tokens.shape[1]].bool()
    return nn.functional.pad(here, (0, tokens.shape[1] - here.shape[1]), value=True).to(tokens.device)


register()
AutoModelForCausalLM.register(MixedLMConfig, MixedLM, exist_ok=True)  # type: ignore[arg-type]
