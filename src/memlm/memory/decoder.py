"""Memory Decoder: a small causal LM that imitates a retriever."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from memlm.errors import ConfigError
from memlm.memory.config import DecoderStart
from memlm.memory.protocol import MemorySettings, ParametricMemory
from memlm.memory.reading import WindowedReader
from memlm.models.abilities import check_causal
from memlm.models.adapters import (
    beside_all_linear,
    check_no_prompt,
    check_peft,
    has_layers_of_peft,
    unwrapped,
    without_layers_of_peft,
)
from memlm.models.heads import find_head
from memlm.models.layers import check_layers, chosen_layers, depth, fresh_model, keep_layers, layered_config, model_size
from memlm.models.loading import load_causal_lm, load_config, longest_context


class MemoryDecoder(ParametricMemory):
    """A causal LM as a memory; it reads tokens only, so one memory serves every base of its tokenizer.

    Source: Memory Decoder (arXiv:2508.09874).
    """

    kind = "decoder"
    can_draft = True
    reader: WindowedReader

    def __init__(self, decoder: PreTrainedModel, settings: MemorySettings | None = None) -> None:
        """
        Args:
            decoder: Any causal LM of transformers.
            settings: Read from the decoder's config if None.

        Raises:
            ModelError: Tokens of the decoder see those to come, or its head does not split off.
            ConfigError: It has fewer positions than the settings say, or an adapter that changes no weights.
        """
        check_no_prompt(decoder, "a decoder")
        decoder = unwrapped(decoder)
        check_causal(decoder)
        rows, longest = decoder.config.get_text_config(decoder=True).vocab_size, longest_context(decoder.config)
        settings = settings or MemorySettings(kind=self.kind, vocab_size=rows, context_length=longest)
        if longest is not None and (settings.context_length or 0) > longest:
            raise ConfigError(
                f"context_length = {settings.context_length}: the decoder has positions for {longest} tokens;"
                " write that into memory.json"
            )
        ours = {"vocab_size": min(rows, settings.vocab_size), "context_length": settings.context_length or longest}
        super().__init__(settings.model_copy(update=ours))
        self.decoder = decoder
        self._adapters: list[Any] = []  # of peft, in training; in a list, for they are no module of the memory's own
        self.head = find_head(decoder)
        self.reader = WindowedReader(decoder, self.context_length)

    @classmethod
    def load(cls, source: str, settings: MemorySettings | None, *, base: str | None = None, **kwargs: Any) -> Self:
        """The memory in `source`, or a plain causal LM as a memory where there are no settings."""
        return cls(load_causal_lm(source, exact=True, **kwargs), settings).eval()

    def save_weights(self, folder: Path) -> None:
        whole = self.decoder
        if has_layers_of_peft(whole) and not self._adapters:  # it was loaded with them; its folder stands alone
            whole = without_layers_of_peft(copy.deepcopy(whole))
        whole.save_pretrained(folder)

    # --- training -----------------------------------------------------------------------------------------------

    @classmethod
    def check_start(cls, config: DecoderStart, *, init: str | None, goes_on: bool, block_size: int) -> None:
        if init is None:
            raise ConfigError("init is missing: name the start model of the memory (--init)")
        whole = load_config(init)
        text_config = whole.get_text_config(decoder=True)
        if config.lora_rank is not None:
            check_peft()
            if config.fresh:
                raise ConfigError("lora_rank and fresh: adapters beside random weights learn little; give one of them")
        if config.layers is not None and config.fresh:
            layered_config(whole, chosen_layers(config.layers, depth(whole)))
        elif config.layers is not None:
            check_layers(whole, config.layers)
        longest = longest_context(text_config)
        if longest and block_size > longest:
            raise ConfigError(f"block_size = {block_size} of the training data is above the {longest} of {init}")

    @classmethod
    def start(
        cls, config: DecoderStart, settings: MemorySettings, *, init: str | None, base: PreTrainedModel, seed: int
    ) -> Self:
        assert init is not None
        if config.fresh:
            return cls(fresh_model(load_config(init), config.layers, seed), settings)
        model = without_layers_of_peft(load_causal_lm(init, dtype=torch.float32))
        memory = cls(model if config.layers is None else keep_layers(model, config.layers), settings)
        if config.lora_rank is not None:
            memory._adapters = [beside_all_linear(memory.decoder, config.lora_rank)]
        return memory

    @classmethod
    def size(cls, config: DecoderStart, *, init: str | None, base: PreTrainedConfig) -> int:
        assert init is not None
        return model_size(init, config.layers)

    def training_hidden(
        self, input_ids: Int[Tensor, "B T"], activations: Tensor | None, places: Int[Tensor, "P"]
    ) -> Float[Tensor, "P D"]:
        return self.decoder.base_model(input_ids=input_ids, use_cache=False)[0].flatten(0, 1)[places]

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        if not self.decoder.supports_gradient_checkpointing:
            raise ConfigError(f"trainer.activation_checkpointing: {type(self.decoder).__name__} has none; leave it out")
        getattr(self.decoder, "activation_checkpointing_enable", self.decoder.gradient_checkpointing_enable)(**kwargs)

    def merge_adapters(self) -> None:
        while self._adapters:
            self._adapters.pop().merge_and_unload()

    def own_parameters(self) -> Iterator[nn.Parameter]:
        return (p for name, p in self.named_parameters() if ".lora_" not in name)

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    # --- inference ----------------------------------------------------------------------------------------------

    def set_window(self, tokens: int) -> None:
        longest = longest_context(self.decoder.config)
        if longest is not None and tokens > longest:
            raise ConfigError(f"memory_window = {tokens}: the memory has positions for {longest} tokens")
        self.reader = WindowedReader(self.decoder, tokens)

    @property
    def window(self) -> int | None:
        """Tokens it looks back on at most; None: no limit."""
        return self.reader.window

    def hidden(self, state: Float[Tensor, "B T D"], places: Any) -> Float[Tensor, "... D"]:
        return state[places]
