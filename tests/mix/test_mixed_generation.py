"""MixedLM in transformers' generate and pipeline, against a plain loop without any cache."""

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CACHED, family_model, token_ids
from memories import LONG_TEXT, decoder_memory
from reference_lm import greedy
from torch import Tensor
from transformers import (
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TextStreamer,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer
from typer.testing import CliRunner

from memlm.cli import app
from memlm.errors import ModelError
from memlm.memory.decoder import MemoryDecoder
from memlm.mix.components import Watch
from memlm.mix.mixed_lm import MixedLM

VOCAB = 40


def tiny_memory(window: int | None = None, vocab_size: int = VOCAB, seed: int = 7) -> MemoryDecoder:
    return decoder_memory(vocab_size, window=window, seed=seed)


def mixed(mix_weight: float = 0.5, *, family: str = "llama", window: int | None = 6, seed: int = 0) -> MixedLM:
    """A mixture whose windowed memory is overrun by most texts below."""
    return MixedLM(family_model(family, VOCAB, seed=seed), tiny_memory(window), mix_weight)


some_tokens = partial(token_ids, vocab_size=VOCAB)
pytestmark = pytest.mark.filterwarnings(LONG_TEXT)


def twin(model: MixedLM, prompt: Tensor, new_tokens: int, end: int | None = None) -> list[int]:
    return greedy(
        model.base,
        model.named_memories(),  # type: ignore[arg-type]
        model.mix_weights,
        prompt.tolist(),
        new_tokens=new_tokens,
        size=model.vocab_size,
        end=end,
    )


def generate(model: PreTrainedModel, tokens: Tensor, **options: Any) -> Tensor:
    """New tokens only."""
    output = model.generate(tokens, **{"do_sample": False, **options})  # type: ignore[operator]
    return output[:, tokens.shape[1] :]


@pytest.mark.parametrize("family", CACHED)
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("weight", [0.5, 0.8])
def test_greedy_equals_the_plain_loop(family: str, window: int | None, weight: float) -> None:
    model = mixed(weight, family=family, window=window)
    prompt = some_tokens(1, 5)
    found = generate(model, prompt, max_new_tokens=14)[0].tolist()
    assert found == twin(model, prompt[0], 14)
    assert found != generate(model.base, prompt, max_new_tokens=14)[0].tolist(), "the case must need the memory"


@pytest.mark.parametrize("family", CACHED)
@pytest.mark.parametrize("use_cache", [True, False])
def test_left_padded_rows_equal_rows_alone(family: str, use_cache: bool) -> None:
    model = mixed(family=family)
    tokens = some_tokens(3, 9)
    lengths = [9, 4, 1]
    mask = torch.stack([(torch.arange(9) >= 9 - length).long() for length in lengths])
    tokens = tokens * mask
    together = generate(model, tokens, attention_mask=mask, max_new_tokens=12, use_cache=use_cache)
    for row, length in enumerate(lengths):
        assert together[row].tolist() == twin(model, tokens[row, -length:], 12)


def test_two_memories_generate_as_the_plain_loop() -> None:
    memories = {"law": tiny_memory(6, seed=1), "medicine": tiny_memory(None, seed=2)}
    model = MixedLM(family_model("llama", VOCAB), memories, {"medicine": 0.3, "law": 0.4})
    prompt = some_tokens(1, 5)
    assert generate(model, prompt, max_new_tokens=10)[0].tolist() == twin(model, prompt[0], 10)


@pytest.mark.parametrize("penalty", [1.3, 0.8])
@pytest.mark.parametrize("beams", [1, 2])
def test_at_weight_zero_the_repetition_penalty_acts_as_on_the_base(penalty: float, beams: int) -> None:
    model = mixed(0.0)
    options = {"max_new_tokens": 15, "repetition_penalty": penalty, "num_beams": beams}
    prompt = some_tokens(2, 6)
    assert torch.equal(generate(model, prompt, **options), generate(model.base, prompt, **options))


def test_sampling_is_repeated_by_its_seed() -> None:
    model = mixed()
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 12}
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(generate(model, some_tokens(2, 5), **options))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_sampling_draws_from_the_mixture() -> None:
    model = mixed(0.5)
    prompt = some_tokens(1, 5)
    with torch.no_grad():
        probs = model(prompt).logits[0, -1].softmax(-1)
    torch.manual_seed(0)
    drawn = generate(model, prompt, do_sample=True, top_k=0, max_new_tokens=1, num_return_sequences=4000)[:, 0]
    counts = drawn.bincount(minlength=VOCAB)
    # each count is binomial; five standard deviations (and one draw) are exceeded once in a million times
    allowed = 5 * (4000 * probs * (1 - probs)).sqrt() + 1
    assert ((counts - 4000 * probs).abs() <= allowed).all()


@pytest.mark.parametrize("family", ["llama", "gemma3", "bloom"])
def test_beams_are_the_same_with_and_without_cache(family: str) -> None:
    model = mixed(family=family)
    options = {
        "num_beams": 3,
        "num_return_sequences": 2,
        "max_new_tokens": 12,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :3] = 0
    prompt = some_tokens(2, 6) * mask
    with_cache, without = (
        model.generate(prompt, attention_mask=mask, use_cache=use_cache, **options) for use_cache in (True, False)
    )
    assert with_cache.sequences.shape == (4, 18)
    assert torch.equal(with_cache.sequences, without.sequences)
    torch.testing.assert_close(with_cache.sequences_scores, without.sequences_scores, rtol=1e-4, atol=1e-5)
    assert not torch.equal(with_cache.sequences[0], with_cache.sequences[1])


def test_generation_stops_at_the_end_token_and_pads_the_other_rows() -> None:
    model = mixed()
    prompts = some_tokens(2, 5)
    free = [twin(model, row, 12) for row in prompts]
    end = next(token for token in free[0][2:] if token not in free[1])
    expected = twin(model, prompts[0], 12, end=end)
    found = generate(model, prompts, max_new_tokens=12, eos_token_id=end, pad_token_id=0)
    assert found[0].tolist() == expected + [0] * (12 - len(expected))
    assert found[1].tolist() == free[1]
    assert generate(model, prompts[:1], max_new_tokens=12, eos_token_id=end)[0].tolist() == expected


@pytest.mark.parametrize("count", [1, 2, 13])
def test_max_new_tokens_is_exact(count: int) -> None:
    for options in ({}, {"num_beams": 3}, {"do_sample": True}, {"use_cache": False}, {"min_new_tokens": count}):
        assert generate(mixed(), some_tokens(2, 5), max_new_tokens=count, **options).shape == (2, count)


def test_several_sequences_are_returned_per_row() -> None:
    model = mixed()
    found = generate(model, some_tokens(2, 5), do_sample=True, num_return_sequences=3, max_new_tokens=8)
    assert found.shape == (6, 8)
    assert len({tuple(row) for row in found.tolist()}) == 6


class Listener(BaseStreamer):
    def __init__(self) -> None:
        self.heard: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.heard += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_hears_every_token() -> None:
    listener, model, prompt = Listener(), mixed(), some_tokens(1, 5)
    found = generate(model, prompt, max_new_tokens=7, streamer=listener)
    assert listener.heard == [*prompt[0].tolist(), *found[0].tolist()]
    assert listener.ended


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 4, 11, 50])
@pytest.mark.parametrize("family", ["llama", "gemma3", "bloom"])
def test_a_prompt_read_in_chunks_gives_the_same(family: str, chunk: int) -> None:
    model = mixed(family=family)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, :6] = 0
    prompt = some_tokens(2, 11) * mask
    found = generate(model, prompt, attention_mask=mask, max_new_tokens=8, prefill_chunk_size=chunk)
    assert found[0].tolist() == twin(model, prompt[0], 8)
    assert found[1].tolist() == twin(model, prompt[1, 6:], 8)


@pytest.mark.slow
@pytest.mark.parametrize("family", CACHED)
@pytest.mark.parametrize(("beams", "gate"), [(1, "none"), (3, "none"), (1, "posterior"), (3, "posterior")])
def test_a_static_cache_of_the_base_gives_the_same(family: str, beams: int, gate: Any) -> None:
    model = mixed(family=family)
    model.set_gate(gate)
    options = {"max_new_tokens": 10, "num_beams": beams}
    prompt = some_tokens(2, 6)
    found = generate(model, prompt, cache_implementation="static", **options)
    assert torch.equal(found, generate(model, prompt, **options))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("assistant", ["base", "memory", "stranger"])
def test_assisted_generation_equals_plain_greedy(family: str, assistant: str) -> None:
    model = mixed(0.5, family=family)
    helper = {
        "base": lambda: model.base,
        "memory": lambda: family_model("llama", VOCAB, seed=7),
        "stranger": lambda: family_model("opt", VOCAB, seed=99),
    }[assistant]()
    prompt = some_tokens(1, 5)
    found = generate(model, prompt, max_new_tokens=16, assistant_model=helper)
    assert found[0].tolist() == twin(model, prompt[0], 16)


def test_guidance_takes_the_weight_of_the_call() -> None:
    """The processor asks the model by itself what it says without the prompt."""
    model, prompt, options = mixed(0.9), some_tokens(2, 5), {"max_new_tokens": 8, "guidance_scale": 2.0}
    found = generate(model, prompt, mix_weight=0.0, **options)
    assert torch.equal(found, generate(model.base, prompt, **options))


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_a_weight_may_be_a_tensor_without_rows(options: dict[str, Any]) -> None:
    model, prompt = mixed(0.9), some_tokens(2, 5)
    found = [generate(model, prompt, mix_weight=w, max_new_tokens=3, **options) for w in (torch.tensor(0.25), 0.25)]
    assert found[0].shape == found[1].shape
    assert "do_sample" in options or torch.equal(*found)


def test_prompt_lookup_equals_plain_greedy() -> None:
    model = mixed(0.5)
    prompt = some_tokens(1, 5).repeat(1, 3)
    found = generate(model, prompt, max_new_tokens=16, prompt_lookup_num_tokens=3)
    assert found[0].tolist() == twin(model, prompt[0], 16)


def with_one_nan(part: str, *, gate: Any = None) -> MixedLM:
    """A mixture of which one weight, of the base or of the memory, is NaN."""
    memory = {"m": tiny_memory()}
    model = MixedLM(family_model("llama", VOCAB), memory, 0.5 if gate is None else None, gate=gate)
    broken: Any = model.base if part == "base" else model.named_memories()["m"]
    with torch.no_grad():
        next(weight for name, weight in broken.named_parameters() if "down_proj" in name)[0, 0] = torch.nan
    return model


@pytest.mark.parametrize(("part", "named"), [("base", "the base"), ("m", "memory 'm'")])
@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}, {"use_cache": False}],
    ids=str,
)
def test_a_model_with_one_nan_is_named(part: str, named: str, options: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=f"{named} gives no finite scores"):
        generate(with_one_nan(part), some_tokens(1, 5).repeat(1, 3), max_new_tokens=4, **options)


@pytest.mark.parametrize(("part", "named"), [("base", "the base"), ("m", "memory 'm'")])
def test_a_gate_hides_no_nan(part: str, named: str) -> None:
    with pytest.raises(ModelError, match=f"{named} gives no finite scores"):
        generate(with_one_nan(part, gate="posterior"), some_tokens(1, 5), max_new_tokens=4)


@pytest.mark.parametrize(("part", "named"), [("base", "the base"), ("m", "memory 'm'")])
def test_what_waits_for_the_end_gives_a_sampler_numbers_and_names_the_model(part: str, named: str) -> None:
    model, watch = with_one_nan(part), Watch(deferred=True)
    for _ in range(2):
        logits = model(some_tokens(2, 5), logits_to_keep=1, watch=watch).logits
        assert not logits.isnan().any()
        assert not logits.softmax(-1).isnan().any()
    with pytest.raises(ModelError, match=f"{named} gives no finite scores"):
        watch.end()


def test_what_waits_for_the_end_changes_no_logits_that_are_whole() -> None:
    model, watch, tokens = mixed(0.5, window=None), Watch(deferred=True), some_tokens(2, 5)
    assert torch.equal(model(tokens, watch=watch).logits, model(tokens).logits)
    watch.end()


def test_a_mixture_can_itself_assist() -> None:
    model, helper = mixed(0.5), mixed(0.2)
    prompt = some_tokens(1, 5)
    assert generate(model, prompt, max_new_tokens=12, assistant_model=helper)[0].tolist() == twin(model, prompt[0], 12)


def test_a_cache_can_be_carried_from_turn_to_turn() -> None:
    model, prompt = mixed(), some_tokens(1, 5)
    cache = model.new_cache(1)
    first = model.generate(prompt, past_key_values=cache, max_new_tokens=6, do_sample=False)
    turn = torch.cat([first, some_tokens(1, 3, seed=1)], 1)
    second = model.generate(turn, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert first[0, 5:].tolist() == twin(model, prompt[0], 6)
    assert second[0, turn.shape[1] :].tolist() == twin(model, turn[0], 6)


def test_another_cache_is_refused_rather_than_replaced() -> None:
    with pytest.raises(TypeError, match="past_key_values is a DynamicCache; a mixed model needs its own MixedCache"):
        generate(mixed(), some_tokens(1, 5), past_key_values=DynamicCache(), max_new_tokens=2)


# --- with a tokenizer ---------------------------------------------------------------------------------------------


@pytest.fixture
def spoken(tokenizer: PreTrainedTokenizerFast) -> MixedLM:
    """A mixture over the tiny tokenizer's vocabulary; it never ends by itself."""
    return MixedLM(family_model("llama", len(tokenizer) + 8), tiny_memory(8, vocab_size=len(tokenizer)), 0.5)


def test_stop_strings_end_the_text(spoken: MixedLM, tokenizer: PreTrainedTokenizerFast) -> None:
    inputs = tokenizer("the memory reads", return_tensors="pt")
    options = {"max_new_tokens": 20, "do_sample": False, "attention_mask": inputs["attention_mask"]}
    free = tokenizer.decode(spoken.generate(inputs["input_ids"], **options)[0])
    new = free[len("the memory reads") :]
    stop = next(new[i : i + 2] for i in range(4, len(new)) if new[i : i + 2].isascii() and new[i : i + 2].isprintable())
    found = tokenizer.decode(
        spoken.generate(inputs["input_ids"], stop_strings=[stop], tokenizer=tokenizer, **options)[0]
    )
    assert free.startswith(found)
    assert stop in found[len("the memory reads") :]
    assert len(found) < len(free)


def test_a_text_streamer_prints_the_text(
    spoken: MixedLM, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = tokenizer("the memory reads", return_tensors="pt")
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    output = spoken.generate(**inputs, max_new_tokens=9, do_sample=False, streamer=streamer)
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


class Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def transformers_log() -> Iterator[list[str]]:
    """What transformers logs; its logger does not propagate, so caplog hears nothing."""
    log = Log()
    logger = logging.getLogger("transformers")
    logger.addHandler(log)
    yield log.lines
    logger.removeHandler(log)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_pipeline_takes_the_model_without_complaint(
    spoken: MixedLM, tokenizer: PreTrainedTokenizerFast, transformers_log: list[str], batch_size: int
) -> None:
    generator = pipeline("text-generation", model=spoken, tokenizer=tokenizer)
    prompts = ["the memory reads a corpus", "the"]
    found = generator(prompts, max_new_tokens=6, do_sample=False, return_full_text=False, batch_size=batch_size)
    assert not [line for line in transformers_log if "not supported" in line]
    for prompt, output in zip(prompts, found, strict=True):
        expected = twin(spoken, tokenizer(prompt, return_tensors="pt")["input_ids"][0], 6)
        assert output[0]["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_the_log_would_show_a_model_that_pipelines_refuse(
    tokenizer: PreTrainedTokenizerFast, transformers_log: list[str]
) -> None:
    model = family_model("llama", len(tokenizer))
    model.__class__ = type("Unlisted", (type(model),), {})
    pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert [line for line in transformers_log if "'Unlisted' is not supported for text-generation" in line]


def test_transformers_has_nothing_to_warn_of(transformers_log: list[str]) -> None:
    generate(mixed(), some_tokens(2, 5), max_new_tokens=4, attention_mask=torch.ones(2, 5, dtype=torch.long))
    assert not transformers_log


@pytest.mark.parametrize("more", [[], ["--temperature", "1"], ["--gate", "posterior"], ["--drafting", "off"]], ids=str)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_the_commands_name_a_base_that_gives_no_numbers(
    command: str, more: list[str], nan_base: str, memory_folder: Path
) -> None:
    prompt = ["the memory"] if command == "generate" else []
    models = ["--base", nan_base, "--memory", str(memory_folder), "--max-new-tokens", "3"]
    told = CliRunner().invoke(app, [command, *prompt, *models, *more], input="the memory\n\n")
    assert isinstance(told.exception, ModelError)  # which the entry point makes one line and exit code 2
    assert str(told.exception) == "the base gives no finite scores"
