import gc
import inspect
import weakref
from typing import Any

import pytest
import torch
from architectures import tiny_model
from families import FAMILIES, family_model, token_ids
from transformers import LlamaForCausalLM

from memlm import MixedLM
from memlm.errors import ModelError
from memlm.memory.decoder import MemoryDecoder
from memlm.mix.base import BaseVoter
from memlm.models.abilities import CACHE, abilities, cache_argument, check_causal
from memlm.models.taps import capture, find_tap, resolve_tap


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mamba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_families_that_the_tests_name_can_do_all(family: str, dtype: torch.dtype) -> None:
    model = family_model(family, deviation=0.2).to(dtype)  # type: ignore[call-overload]
    assert abilities(model).all
    check_causal(model)


KEEPS_STATES = CACHE == "cache"  # state-space models keep their past in a cache since transformers 5.24


@pytest.mark.parametrize(
    ("architecture", "lacking"),
    [
        ("mamba", {"chunks", "takes_back", "padding"} if KEEPS_STATES else {"steps", "chunks", "takes_back", "rows"}),
        ("jamba", {"chunks", "takes_back"}),
        ("qwen3_next", {"takes_back"}),
        ("bart", {"padding"}),
        ("recurrent_gemma", {"chunks", "takes_back", "rows", "padding"}),
    ],
)
def test_what_a_model_does_wrong_is_known(architecture: str, lacking: set[str]) -> None:
    found = abilities(tiny_model(architecture))
    assert {name for name, can in vars(found).items() if not can} == lacking
    assert not found.all


@pytest.mark.parametrize("broken", ["cache", "padding"])
def test_a_model_that_forgets_or_reads_padding_is_found_out(broken: str) -> None:
    class Forgets(type(family_model("llama"))):
        def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
            if broken == "padding":
                attention_mask = None
            elif (cache := kwargs.get(CACHE)) is not None and cache.get_seq_length() > 4:
                cache.reset()
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    model = family_model("llama")
    assert abilities(family_model("llama")).all
    model.__class__ = Forgets
    found = abilities(model)
    assert not (found.steps if broken == "cache" else found.padding)
    assert found.steps or broken == "cache"


def test_an_encoder_is_refused_as_base_memory_and_teacher_and_a_decoder_is_not() -> None:
    model = tiny_model("bert")
    line = "^BertLMHeadModel lets tokens see those to come, so it is no causal language model; one that can"
    for use in (lambda: MixedLM(model, {}), lambda: MemoryDecoder(model), lambda: check_causal(model)):
        with pytest.raises(ModelError, match=line):
            use()
    check_causal(tiny_model("bert", is_decoder=True))


def test_nobody_is_told_of_the_probe_and_nothing_is_kept_of_the_model() -> None:
    model = family_model("llama")
    tap = find_tap(model)
    with torch.no_grad(), capture(model, [tap]) as found:
        model(token_ids(1, 3))
        assert abilities(model).all
    assert found[tap].shape[:2] == (1, 3)
    assert resolve_tap(model, tap) == tap
    kept = weakref.ref(model)
    del model, found
    gc.collect()
    assert kept() is None


class Renamed(LlamaForCausalLM):
    """Calls its cache as transformers does from 5.24 on."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        cache: Any = None,
        **rest: Any,
    ) -> Any:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return super().forward(**inputs, **{cache_argument(OWN) or "": cache}, **rest)


OWN = inspect.signature(LlamaForCausalLM.forward).parameters


def test_a_cache_by_its_newer_name_is_found() -> None:
    assert cache_argument(["input_ids", "cache", "past_key_values"]) == "cache"
    assert cache_argument(["input_ids", "past_key_values"]) == "past_key_values"
    assert cache_argument(["input_ids"]) is None
    model = Renamed(family_model("llama").config).eval()
    assert abilities(model).all
    assert BaseVoter(model, 40).keeps_cache
