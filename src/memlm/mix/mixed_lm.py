"""`MixedLM`: a frozen base and its memories as one model of transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from memlm.corpus.blocks import IGNORE
from memlm.errors import ConfigError
from memlm.mix.base import positions_restart
from memlm.mix.cache import MixedCache
from memlm.mix.components import Watch
from memlm.mix.config import MixedLMConfig
from memlm.mix.gate_config import GateConfig, GateName
from memlm.mix.generating import GeneratingMixture
from memlm.mix.loading import (
    MemorySource,
    check_keyword,
    load_mixture,
    save_mixture,
)
from memlm.mix.weights import MixWeight
from memlm.models.abilities import CACHE
from memlm.models.loading import default_device, parse_dtype
from memlm.targets.config import RetrievalConfig


class MixedLM(GeneratingMixture):
    """A frozen base mixed with memories: `p = w * p_memory + (1 - w) * p_base`, per token.

    `generate`, `pipeline`, caches and processors work as on any causal LM. What comes back as `logits` is
    `log p_mix + logsumexp(base logits)`, so softmax of it is the mixture, and at weight 0 it is the base's own logits.

    Source: Memory Decoder, eq. 7 (arXiv:2508.09874).
    """

    accepts_loss_kwargs = False  # a Trainer divides by its accumulation steps itself

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
            memory: Folder, hub id, loaded memory or loaded causal LM, or name to any of these; may be left out for a
                saved folder.
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


AutoConfig.register(MixedLMConfig.model_type, MixedLMConfig, exist_ok=True)
AutoModelForCausalLM.register(MixedLMConfig, MixedLM, exist_ok=True)  # type: ignore[arg-type]
