"""Static caches of base and memories, and steps compiled behind them, against a plain loop without any cache."""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from families import CACHED, family_model, token_ids
from memories import LONG_TEXT, decoder_memory
from reference_lm import greedy
from torch import Tensor
from transformers import CompileConfig, StaticCache

from memlm.memory.mlp import FFNStyle, MLPMemory, MLPSettings
from memlm.memory.reading import TokenCache
from memlm.mix.gate_config import GateConfig
from memlm.mix.mixed_lm import MixedLM
from memlm.models.abilities import CACHE
from memlm.models.loading import block_list
from memlm.models.taps import find_tap, tap_width

VOCAB = 40
pytestmark = [
    pytest.mark.filterwarnings(LONG_TEXT),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*:DeprecationWarning"),  # of torch, while it traces
]


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Compiler:
    """A backend that counts the graphs it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __deepcopy__(self, memo: Any) -> "Compiler":  # transformers copies a configuration
        return self

    def __call__(self, graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward

    def config(self) -> CompileConfig:
        config: Any = CompileConfig(backend=self, mode="default")
        config._compile_all_devices = True  # as transformers' own tests do on a CPU
        return config


def mixed(family: str = "llama", window: int | None = None, seed: int = 0) -> MixedLM:
    return MixedLM(family_model(family, VOCAB, seed=seed), decoder_memory(VOCAB, window=window, seed=7), 0.5)


def twin(model: MixedLM, prompt: Tensor, new_tokens: int) -> list[int]:
    memories: Any = model.named_memories()
    return greedy(
        model.base, memories, model.mix_weights, prompt.tolist(), new_tokens=new_tokens, size=model.vocab_size
    )


def generate(model: Any, tokens: Tensor, **options: Any) -> Any:
    return model.generate(tokens, **{"do_sample": False, "cache_implementation": "static", **options})


def padded(*lengths: int) -> tuple[Tensor, Tensor]:
    """Rows of these lengths, padded on the left, and their mask."""
    mask = torch.stack([(torch.arange(max(lengths)) >= max(lengths) - length).long() for length in lengths])
    return token_ids(len(lengths), max(lengths), vocab_size=VOCAB) * mask, mask


@pytest.mark.grid(3)
@pytest.mark.parametrize(("window", "compiles"), [(None, False), (30, False), (6, False), (6, True)])
@pytest.mark.parametrize("family", CACHED)
def test_greedy_equals_the_plain_loop(family: str, window: int | None, compiles: bool) -> None:
    model, compiler = mixed(family, window), Compiler()
    tokens, mask = padded(9, 4)
    options = {"compile_config": compiler.config()} if compiles else {}
    found = generate(model, tokens, attention_mask=mask, max_new_tokens=14, **options)[:, 9:]
    for row, length in enumerate((9, 4)):
        assert found[row].tolist() == twin(model, tokens[row, -length:], 14)
    assert bool(compiler.graphs) == compiles


@pytest.mark.parametrize("window", [None, 6])
def test_one_graph_each_serves_all_steps_and_calls(window: int | None) -> None:
    model, compiler = mixed(window=window), Compiler()
    prompt, options = token_ids(1, 5, vocab_size=VOCAB), {"max_new_tokens": 12, "compile_config": compiler.config()}
    for _ in range(2):
        found = generate(model, prompt, **options)
        assert found[0, 5:].tolist() == twin(model, prompt[0], 12)
        assert 1 <= compiler.graphs <= 2, "a step of the base and one of the memory, which may be alike"


@pytest.mark.parametrize(
    ("options", "compiles"),
    [({"num_beams": 3}, False), ({"num_return_sequences": 2, "do_sample": True, "top_k": 1}, True)],
)
def test_rows_that_change_places_give_the_same(options: dict[str, Any], compiles: bool) -> None:
    model, compiler = mixed(window=6), Compiler()
    prompt = token_ids(2, 6, vocab_size=VOCAB)
    found = generate(model, prompt, max_new_tokens=10, compile_config=compiler.config(), **options)
    assert torch.equal(found, generate(model, prompt, max_new_tokens=10, cache_implementation="dynamic", **options))
    assert bool(compiler.graphs) == compiles


@pytest.mark.skipif(CACHE != "cache", reason="static caches take tokens back since transformers 5.24")
@pytest.mark.parametrize("window", [None, 6])
def test_drafted_tokens_are_taken_back_where_they_stand(window: int | None) -> None:
    model, compiler = mixed(window=window), Compiler()
    prompt = token_ids(1, 6, vocab_size=VOCAB)
    found = generate(model, prompt, max_new_tokens=14, drafting=3, compile_config=compiler.config())
    assert found[0, 6:].tolist() == twin(model, prompt[0], 14)
    assert compiler.graphs


def test_the_gate_and_sleep_are_the_same() -> None:
    model, compiler = mixed(), Compiler()
    model.set_gate(GateConfig(gate="posterior", sleep=3))
    prompt = token_ids(1, 6, vocab_size=VOCAB)
    found = generate(model, prompt, max_new_tokens=16, compile_config=compiler.config())
    assert torch.equal(found, generate(model, prompt, max_new_tokens=16, cache_implementation="dynamic"))


def test_asked_for_hidden_states_steps_are_not_compiled() -> None:
    model, compiler = mixed(), Compiler()
    options = {"max_new_tokens": 6, "output_hidden_states": True, "return_dict_in_generate": True}
    prompt = token_ids(1, 5, vocab_size=VOCAB)
    found = generate(model, prompt, compile_config=compiler.config(), **options)
    plain = generate(model, prompt, cache_implementation="dynamic", **options)
    assert compiler.graphs == 1, "the memory's"
    for one, other in zip(found.hidden_states, plain.hidden_states, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)  # a static cache's products have other shapes


def test_a_call_that_is_told_not_to_compile_does_not() -> None:
    model, compiler = mixed(), Compiler()
    prompt = token_ids(1, 5, vocab_size=VOCAB)
    generate(model, prompt, max_new_tokens=6, compile_config=compiler.config(), disable_compile=True)
    assert compiler.graphs == 0


def test_a_copy_compiles_its_own_steps() -> None:
    model, compiler = mixed(), Compiler()
    prompt, options = token_ids(1, 5, vocab_size=VOCAB), {"max_new_tokens": 8, "compile_config": compiler.config()}
    generate(model, prompt, **options)
    other = copy.deepcopy(model)
    for part in (other.base, other.memories["memory"]):
        for parameter in part.parameters():
            parameter.data.mul_(-1.0)
    assert generate(other, prompt, **options)[0, 5:].tolist() == twin(other, prompt[0], 8)


def test_what_stands_still_is_let_go_and_caught_again() -> None:
    """A window that moves is read anew, into the place where it stood before."""
    model = mixed(window=6)
    kept: list[Any] = []
    for new in (3, 12):
        output = generate(model, token_ids(1, 3, vocab_size=VOCAB), max_new_tokens=new, return_dict_in_generate=True)
        kept.append(next(iter(output.past_key_values.memories.values())))
    for cache in kept:
        assert isinstance(cache, TokenCache)
        assert isinstance(cache.inner, StaticCache)
    cache = kept[1]
    cache.select(torch.tensor([0, 0]))
    assert not isinstance(cache.inner, StaticCache), "two rows do not fit"


def reading(base: Any) -> MLPMemory:
    """A memory that reads the base, with random weights, so that what it reads matters."""
    style = FFNStyle(gated=True, bias=False, norm="rms", norm_eps=1e-5, activation="silu")
    tap = find_tap(base, 0.5)
    shape = {"input_width": tap_width(base, tap), "base_blocks": len(block_list(base)[1]), "layers": 2, "width": 32}
    memory = MLPMemory(MLPSettings(kind="mlp", vocab_size=VOCAB, style=style, tap=tap, ffn_width=40, **shape))
    for number, parameter in enumerate(memory.parameters()):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(number))
    return memory


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_a_memory_that_reads_the_base_reads_it_from_the_graph(family: str) -> None:
    """It is then taken away and put back."""
    base, compiler = family_model(family, VOCAB), Compiler()
    memory = reading(base)
    model = MixedLM(base, memory, 0.7)
    tokens, mask = padded(6, 4)
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 10}

    def check(graphs: int) -> None:
        found = generate(model, tokens, compile_config=compiler.config(), **options)
        assert torch.equal(found, generate(model, tokens, cache_implementation="dynamic", **options))
        assert compiler.graphs == graphs

    check(1)
    check(1)
    assert not torch.equal(
        generate(model, tokens, **options), generate(base, tokens, cache_implementation="dynamic", **options)
    ), "the case must need the memory"
    model.remove_memory("memory")
    check(2)
    model.add_memory("memory", memory, 0.7)
    check(2)


def test_what_a_graph_leaves_outlives_inference_mode_and_follows_the_precision() -> None:
    base, compiler = family_model("llama", VOCAB), Compiler()
    model = MixedLM(base, reading(base), 0.7).bfloat16()
    prompt = token_ids(1, 5, vocab_size=VOCAB)
    options: dict[str, Any] = {"max_new_tokens": 10, "return_dict_in_generate": True, "output_logits": True}
    with torch.inference_mode():
        generate(model, prompt, compile_config=compiler.config(), **options)
    model.float()
    found = generate(model, prompt, compile_config=compiler.config(), **options)
    plain = generate(model, prompt, cache_implementation="dynamic", **options)
    for one, other in zip(found.logits, plain.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_threads_leave_each_other_what_they_read() -> None:
    """One text is longer than the other, so that a thread reads a prompt while the other takes single steps."""
    base, compiler = family_model("llama", VOCAB), Compiler()
    model = MixedLM(base, reading(base), 0.7)
    prompts = [token_ids(1, length, vocab_size=VOCAB) for length in (5, 9)]
    options: dict[str, Any] = {"max_new_tokens": 12, "compile_config": compiler.config()}
    expected = [generate(model, prompt, cache_implementation="dynamic", max_new_tokens=12) for prompt in prompts]
    for prompt in prompts:
        generate(model, prompt, **options)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda prompt: generate(model, prompt, **options), prompts * 3))
    for one, other in zip(found, expected * 3, strict=True):
        assert torch.equal(one, other)


def test_a_prompt_of_one_token_is_not_traced() -> None:
    """What a traced step makes is not known to stand still."""
    model, compiler = mixed(), Compiler()
    prompt = token_ids(1, 1, vocab_size=VOCAB)
    options: dict[str, Any] = {"max_new_tokens": 12, "return_dict_in_generate": True}
    found = generate(model, prompt, compile_config=compiler.config(), **options)
    assert found.sequences[0, 1:].tolist() == twin(model, prompt[0], 12)
    assert compiler.graphs == 2
    cache: Any = found[CACHE]
    for part in (cache.base, cache.memories["memory"].inner):
        assert all(hasattr(layer.keys, "_dynamo_static_input_type") for layer in part.layers)


@pytest.mark.filterwarnings("ignore:decoded step by step")
@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_a_static_window_of_the_base_takes_nothing_back(family: str) -> None:
    model = mixed(family)
    prompt = token_ids(1, 6, vocab_size=VOCAB)
    found = generate(model, prompt, max_new_tokens=14, drafting=5)
    assert found[0, 6:].tolist() == twin(model, prompt[0], 14)
