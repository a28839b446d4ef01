"""What transformers' `generate` asks of a mixture: caches, checks, and which loop decodes."""

import warnings
from functools import partial
from typing import Any, Literal, cast

from jaxtyping import Int
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    StaticCache,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation import GenerationMode

from memlm.errors import ConfigError
from memlm.mix.base import narrowed
from memlm.mix.components import Watch
from memlm.mix.decoding import Call, strange_processor
from memlm.mix.drafting import Judge, check_drafting, decode_drafted, warn_plain, why_plain
from memlm.mix.drawing import decode_drawn, why_not_drawn
from memlm.mix.members import Mixture
from memlm.mix.pace import Pace
from memlm.models.abilities import CACHE
from memlm.models.compiling import Room
from memlm.models.loading import longest_context


class GeneratingMixture(Mixture, GenerationMixin):
    """The part of `MixedLM` that decodes; hooks of transformers, in the order in which `generate` calls them."""

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
        if isinstance(weight := kwargs.get("mix_weight"), Tensor) and not weight.ndim:
            kwargs["mix_weight"] = float(weight)  # a tensor has a row for each text, where texts are multiplied
        watch = Watch(deferred=self.device.type != "cpu")
        found = cast(Any, super()).generate(*args, **kwargs, watch=watch)
        watch.end()
        return found

    def _validate_generation_mode(self, mode: Any, config: GenerationConfig, options: dict[str, Any]) -> None:
        drafter, rows = options.get("assistant_model"), self.base.config.get_text_config().vocab_size
        if drafter is not None and rows > self.vocab_size and drafter.config.get_text_config().vocab_size == rows:
            options["assistant_model"] = narrowed(drafter, self.vocab_size)  # both pad beyond the tokenizer's ids
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

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        asked = model_kwargs.get("drafting") is not None or model_kwargs.get("drawing")
        if asked and generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ConfigError("drafting and drawing are for greedy decoding and sampling, not for beams or assistants")
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
        if isinstance(own.get(CACHE), StaticCache):
            single = generation_mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
            part = model_kwargs[CACHE] if single else model_kwargs[CACHE].of_base  # beams move a memory's rows
            part.hold(Room(max_cache_length, generation_config, compiles=single))

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        return False  # base and memories are compiled each for itself

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        if kwargs["generation_config"].assistant_early_exit is not None:
            raise NotImplementedError("a mixture cannot draft by leaving its layers early: give an assistant_model")
        own = {n: value for n, value in model_kwargs.items() if n not in ("mix_weight", "evidence_mask", "watch")}
        return cast(Any, super())._get_candidate_generator(*args, model_kwargs=own, **kwargs)

    def _get_logits_processor(self, *args: Any, model_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        found = cast(Any, super())._get_logits_processor(*args, model_kwargs=model_kwargs, **kwargs)
        for processor in found:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):  # asks the model by itself
                processor.model = partial(processor.model, mix_weight=(model_kwargs or {}).get("mix_weight"))
        return found

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = cast(Any, super()).prepare_inputs_for_generation(*args, **kwargs)
        if inputs["input_ids"].shape[1] == 1:  # pictures and sounds belong to the prompt
            inputs = {n: value for n, value in inputs.items() if not n.startswith(("pixel_", "image_", "input_feat"))}
        return inputs

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
            call = Call(*given, streamer, model_kwargs)
            if drawing:
                if why := why_not_drawn(self, call, warp) or why_plain(self, call):
                    raise ConfigError(f"nothing can be drawn: {why}")
                return decode_drawn(self, call)
            why = why_plain(self, call)
            if why is None and (strange := strange_processor(logits_processor, len(input_ids))):
                why = f"{strange} may be more than a function of text and scores"
            if why is None:
                pace = drafting if isinstance(drafting, Pace) else Pace(None if drafting == "auto" else drafting)
                return decode_drafted(self, call, pace, draft_judge)
            warn_plain(why)
        plain = {"synced_gpus": synced_gpus, "streamer": streamer, "watch": watch}
        return cast(Any, super())._sample(*given, **plain, **model_kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Not for a mixed model, whose memories keep no pages.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("a mixture cannot generate with paged caches (generate_batch): call generate")
