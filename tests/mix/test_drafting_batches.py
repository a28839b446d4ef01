"""Drafted batches, each text accepted for itself, and drafts that are looked up."""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import family_model
from memories import LONG_TEXT, Make, decoder_memory
from test_drafting import FIXED, GATED, PROCESSED, assert_same_but_for_ties, counted, greedy
from test_gate import VOCAB, mixture, some_tokens
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks.drafting_exactness import chance_of, direct, places_among, processors_of, sampled
from memlm.errors import ModelError
from memlm.memory.decoder import MemoryDecoder
from memlm.memory.retrieval import RetrievalMemory
from memlm.mix.decoding import Text
from memlm.mix.drafts import earlier
from memlm.mix.mixed_lm import MixedLM
from memlm.mix.pace import Pace

pytestmark = pytest.mark.slow

LENGTHS = [7, 4, 11]


def padded(lengths: list[int] = LENGTHS, vocab: int = VOCAB) -> dict[str, Tensor]:
    """Prompts of these lengths, padded on the left."""
    longest = max(lengths)
    rows = [some_tokens(1, length, seed=10 + row) % vocab for row, length in enumerate(lengths)]
    ids = [torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows]
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return {"input_ids": torch.cat(ids), "attention_mask": mask.long()}


def texts_of(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    asked = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0} | options
    return model.generate(**inputs, **asked)


def assert_rows_alike(model: MixedLM, found: Tensor, expected: Tensor, mask: Tensor, **options: Any) -> None:
    """Rows are the same up to a near tie."""
    for row, (one, other) in enumerate(zip(found, expected, strict=True)):
        first = int(mask[row].argmax())
        assert_same_but_for_ties(model, one[None, first:], other[None, first:], **options)


awake = [case for case in GATED if "sleep" not in case]


@pytest.mark.grid(3)
@pytest.mark.parametrize("case", awake, ids=str)
@pytest.mark.parametrize("drafting", [1, 4, "auto"])
def test_drafts_change_no_token_of_a_batch(case: dict[str, Any], drafting: Any) -> None:
    model, inputs = mixture(**case), padded()
    found, expected = texts_of(model, inputs, drafting=drafting), texts_of(model, inputs)
    assert_rows_alike(model, found, expected, inputs["attention_mask"])


@pytest.mark.parametrize("case", awake, ids=str)
def test_what_was_thought_comes_back_and_the_cache_can_be_gone_on_from(case: dict[str, Any]) -> None:
    model, inputs = mixture(**case), padded()
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    plain, found = (texts_of(model, inputs, **asked, **how) for how in ({}, {"drafting": 4}))
    assert found.sequences.tolist() == plain.sequences.tolist()
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(found[name]), torch.stack(plain[name]), rtol=1e-3, atol=1e-3)
    assert found.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 24), value=1)
    with torch.no_grad():
        more = [
            model(text.sequences[:, -1:], attention_mask=mask, past_key_values=text.past_key_values).logits
            for text in (found, plain)
        ]
    torch.testing.assert_close(*more, rtol=1e-3, atol=1e-3)


def test_texts_that_end_early_wait_for_the_others() -> None:
    model, inputs = mixture(gate="none"), padded()
    whole, start = texts_of(model, inputs), max(LENGTHS)
    for place in (0, 7, 15):
        for row in range(3):
            end = int(whole[row, start + place])
            found = texts_of(model, inputs, drafting=4, eos_token_id=end)
            assert found.tolist() == texts_of(model, inputs, eos_token_id=end).tolist()


@pytest.mark.parametrize("case", [FIXED, {}, {"gate": "both", "memories": 2}], ids=str)
@pytest.mark.parametrize("first", [{"drafting": 4}, {}], ids=str)
def test_a_batch_whose_texts_ended_apart_can_be_gone_on_from(case: dict[str, Any], first: dict[str, Any]) -> None:
    model, inputs, start = mixture(**case), padded(), max(LENGTHS)
    whole, more = texts_of(model, inputs), some_tokens(3, 3, seed=77)
    for place in (2, 13):
        end = int(whole[1, start + place])
        made = texts_of(model, inputs, eos_token_id=end, return_dict_in_generate=True, **first)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, made.sequences.shape[1] - start), value=1)
        for row, text in enumerate(made.sequences):
            ends = (text[start:] == end).nonzero()
            mask[row, start + int(ends[0]) + 1 if len(ends) else len(text) :] = 0
        after = torch.cat([made.sequences, more], 1)
        real = torch.cat([mask, torch.ones_like(more)], 1)
        asked = {"max_new_tokens": 6, "eos_token_id": None}
        for how in ({}, {"drafting": 3}):
            cache = copy.deepcopy(made.past_key_values)
            found = texts_of(model, {"input_ids": after, "attention_mask": real}, past_key_values=cache, **asked, **how)
            for row, text in enumerate(after):
                alone = text[real[row].bool()][None]
                expected = texts_of(model, {"input_ids": alone, "attention_mask": torch.ones_like(alone)}, **asked)
                if case == FIXED:  # a gate hears all that was read as text
                    assert found[row, -6:].tolist() == expected[0, -6:].tolist()


def test_texts_that_ended_are_filled_up_as_ever() -> None:
    model, inputs = mixture(gate="none"), padded()
    end = int(texts_of(model, inputs)[1, max(LENGTHS) + 5])
    asked = {"eos_token_id": end, "pad_token_id": None}
    assert texts_of(model, inputs, drafting=4, **asked).tolist() == texts_of(model, inputs, **asked).tolist()


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_texts_may_be_as_long_as_the_base_has_positions(family: str) -> None:
    base = family_model(family, VOCAB)
    longest = base.config.max_position_embeddings
    model = MixedLM(base, decoder_memory(VOCAB, seed=7), 0.6)
    model.generation_config.eos_token_id = None
    inputs = {"input_ids": some_tokens(4, 11, seed=3), "attention_mask": torch.ones(4, 11, dtype=torch.long)}
    expected = texts_of(model, inputs, max_new_tokens=longest - 11)
    for drafting in (1, 4, 32):
        assert texts_of(model, inputs, max_new_tokens=longest - 11, drafting=drafting).tolist() == expected.tolist()


@pytest.mark.parametrize("rows", [1, 3])
def test_a_base_that_reads_long_texts_otherwise_is_not_read_across_the_turn(rows: int) -> None:
    turn = 16
    longer = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0}
    longer |= {"original_max_position_embeddings": turn, "rope_theta": 10000.0}
    base = family_model("llama", VOCAB, rope_parameters=longer)
    model = MixedLM(base, decoder_memory(VOCAB, seed=7), 0.4)
    model.generation_config.eos_token_id = None
    prompt = some_tokens(rows, 7)
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = texts_of(model, inputs)
        for drafting in (2, 4, 7):
            assert texts_of(model, inputs, drafting=drafting).tolist() == expected.tolist()


def test_keys_of_tokens_that_were_refused_are_not_kept() -> None:
    model, inputs = mixture(gate="none"), padded()
    found = texts_of(model, inputs, drafting=8, max_new_tokens=60, return_dict_in_generate=True)
    cache = found.past_key_values.memories["m0"]
    longest = max(LENGTHS) + 60
    assert cache.inner.get_seq_length() <= longest
    assert found.past_key_values.get_seq_length() == longest - 1


@pytest.mark.parametrize("options", PROCESSED, ids=str)
def test_processors_see_each_text(options: dict[str, Any]) -> None:
    model, inputs = mixture(gate="none"), padded()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, expected = (texts_of(model, inputs, **options, **how) for how in ({"drafting": 4}, {}))
    assert found.tolist() == expected.tolist()


@pytest.mark.filterwarnings(LONG_TEXT)
@pytest.mark.parametrize("window", [6, 16])
def test_the_memorys_windows_move_row_by_row(window: int) -> None:
    model, inputs = mixture(gate="none"), padded()
    model = MixedLM(model.base, model.named_memories()["m0"], 0.5, memory_window=window)
    found, expected = texts_of(model, inputs, drafting=4), texts_of(model, inputs)
    assert_rows_alike(model, found, expected, inputs["attention_mask"])


def test_a_sliding_memory_reads_its_windows_anew() -> None:
    part = family_model("mistral", VOCAB, sliding_window=8)
    model, inputs = MixedLM(family_model("llama", VOCAB), MemoryDecoder(part), 0.4), padded()
    model.generation_config.eos_token_id = None
    found, expected = texts_of(model, inputs, drafting=3), texts_of(model, inputs)
    assert_rows_alike(model, found, expected, inputs["attention_mask"])


def test_rows_have_weights_of_their_own() -> None:
    model, inputs = mixture(gate="none"), padded()
    for options in ({"mix_weight": [0.1, 0.5, 0.9]}, {"num_return_sequences": 2}):
        sampling = {"do_sample": True, "top_k": 1} if "num_return_sequences" in options else {}
        found, expected = (texts_of(model, inputs, **options, **sampling, **how) for how in ({"drafting": 3}, {}))
        assert found.tolist() == expected.tolist()


def test_a_prompt_is_heard_as_the_evidence_mask_says() -> None:
    model, inputs = mixture(), padded()
    silent = torch.ones_like(inputs["input_ids"])
    silent[1, 8:] = 0
    found, expected = (texts_of(model, inputs, evidence_mask=silent, **how) for how in ({"drafting": 3}, {}))
    assert found.tolist() == expected.tolist()


def test_each_text_keeps_what_it_accepted() -> None:
    base = family_model("llama", VOCAB)
    memory = decoder_memory(VOCAB, mix_weight=0.5, seed=0)
    memory.decoder.load_state_dict(base.state_dict())
    model, pace = MixedLM(base, memory, 0.5), Pace(4)
    model.generation_config.eos_token_id = None
    expected = texts_of(model, padded())
    read = counted(model)
    assert texts_of(model, padded(), drafting=pace).tolist() == expected.tolist()
    assert read["base"] == [max(LENGTHS), 5, 5, 5, 5, 3]
    assert pace.accepted_tokens == pace.drafted_tokens == 3 * 18


@contextlib.contextmanager
def stopped_after(tokens: int) -> Iterator[None]:
    """Decoding is interrupted when so many tokens were added to texts."""
    add, left = Text.add, [tokens]

    def stops(self: Text, *args: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        add(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(Text, "add", stops)
        yield


@pytest.mark.parametrize("case", [FIXED, {}], ids=str)
def test_a_batch_that_was_stopped_leaves_an_empty_cache(case: dict[str, Any]) -> None:
    inputs = padded()
    for after in (0, 3, 17):
        model = mixture(**case)
        cache, expected = model.new_cache(3), texts_of(model, inputs)
        with stopped_after(after):
            texts_of(model, inputs, drafting=4, past_key_values=cache)
        assert cache.get_seq_length() == 0
        assert texts_of(model, inputs, drafting=4, past_key_values=cache).tolist() == expected.tolist()


@pytest.mark.parametrize("case", [FIXED, {}], ids=str)
def test_a_prompt_that_was_interrupted_leaves_an_empty_cache(case: dict[str, Any]) -> None:
    model, inputs, left = mixture(**case), padded(), [0]

    def stop(*args: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    expected = texts_of(model, inputs)
    for after in (3, 25):
        cache, left[0] = model.new_cache(3), after
        hooks = [part.register_forward_hook(stop) for part in model.modules() if isinstance(part, torch.nn.Linear)]
        with pytest.raises(KeyboardInterrupt):
            texts_of(model, inputs, drafting=4, past_key_values=cache, prefill_chunk_size=4)
        for hook in hooks:
            hook.remove()
        assert cache.get_seq_length() == 0
        assert texts_of(model, inputs, drafting=4, past_key_values=cache).tolist() == expected.tolist()


SAMPLED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (FIXED, {"drafting": 4}),
    ({}, {"drafting": 3, "temperature": 0.7}),
    ({"gate": "both"}, {"drafting": 2, "top_p": 0.8}),
    (FIXED, {"drafting": 4, "repetition_penalty": 1.6}),
]


@pytest.mark.parametrize(("case", "options"), SAMPLED, ids=str)
def test_sampled_batches_have_the_mixtures_own_distribution(case: dict[str, Any], options: dict[str, Any]) -> None:
    torch.manual_seed(2)
    model = mixture(**case)
    texts = sampled(model, some_tokens(1, 7), 40, rows=8, **options)
    found = places_among(model, direct(model, processors_of(options)), texts, 7)
    assert len(found) == 16 * 40
    assert chance_of(found) > 0.01 / len(SAMPLED)


# --- what is looked up ------------------------------------------------------------------------------------------------

FEW = list(range(4, VOCAB))
"""All tokens but a few, of which texts repeat themselves."""


def test_what_followed_the_same_tokens_is_drafted() -> None:
    assert earlier([1, 2, 3, 4, 9, 1, 2, 3], 2) == [4, 9]
    assert earlier([1, 2, 5, 7, 1, 2, 6, 1, 2], 3) == [6, 1, 2]  # the latest time
    assert earlier([3, 1, 2, 5, 1, 2, 6, 3, 1, 2], 1) == [5]  # the longest match
    assert earlier([1, 2, 3, 4], 2) == []
    assert earlier([1], 2) == []


def test_a_memory_that_reads_the_base_is_drafted_for(make: Make) -> None:
    model = make({"mlp": 0.5})
    vocab = model.vocab_size
    for prompt in (some_tokens(1, 30) % 4 + 5, some_tokens(1, 9) % vocab):
        pace = Pace(3)
        found = greedy(model, prompt, drafting=pace)
        assert_same_but_for_ties(model, found, greedy(model, prompt))
    inputs = padded(vocab=vocab)
    assert_rows_alike(model, texts_of(model, inputs, drafting=3), texts_of(model, inputs), inputs["attention_mask"])


def test_looked_up_drafts_are_accepted_as_often_as_the_mixture_would_say_them() -> None:
    """Of few tokens greedy texts go in circles: drafts are taken, and the text is the one of plain steps."""
    model = mixture(gate="none")
    memory = model.named_memories()["m0"]
    memory.can_draft = False  # type: ignore[misc]
    pace, asked = Pace(4), {"suppress_tokens": FEW}
    expected, found = (greedy(model, some_tokens(1, 7), **asked, **how) for how in ({}, {"drafting": pace}))
    assert found.tolist() == expected.tolist()
    assert pace.accepted_tokens > 0


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"repetition_penalty": 1.6}], ids=str)
def test_sampled_tokens_are_the_mixtures_where_drafts_are_looked_up(options: dict[str, Any]) -> None:
    torch.manual_seed(4)
    model, prompt, pace = mixture(gate="none"), some_tokens(1, 24) % 3, Pace(3)
    model.named_memories()["m0"].can_draft = False  # type: ignore[misc]
    options = options | {"suppress_tokens": FEW}
    texts = sampled(model, prompt, 40, rows=8, drafting=pace, **options)
    assert 0 < pace.accepted_tokens < pace.drafted_tokens
    found = places_among(model, direct(model, processors_of(options)), texts, prompt.shape[1])
    assert chance_of(found) > 0.003


def test_a_datastore_is_quoted(make: Make) -> None:
    model = make({"facts": 0.5})
    (memory,) = model.named_memories().values()
    assert isinstance(memory, RetrievalMemory)
    store = memory.store
    split = store.corpus.split("train")
    offset = int(split.offsets[1])
    text = torch.from_numpy(split.tokens[offset : offset + 12].astype("int64"))[None]
    with torch.no_grad():
        states = model.components(text, use_cache=False).states["facts"]
    (quoted,) = memory.quote(states[:, 6], text[0, 7:8], 3)
    told = split.tokens.tolist()
    assert quoted
    assert any(told[at : at + 1 + len(quoted)] == [int(text[0, 7]), *quoted] for at in range(len(told)))
    assert len(memory.quote(states[:, 6], text[0, 7:8], 1)[0]) == 1
    unsaid = next(token for token in range(model.vocab_size) if token not in told)
    assert memory.quote(states[:, 6], torch.tensor([unsaid]), 3) == [[]]
    for prompt in (text, text.repeat(2, 1)):
        found, expected = greedy(model, prompt, drafting=4), greedy(model, prompt)
        for one, other in zip(found, expected, strict=True):
            assert_same_but_for_ties(model, one[None], other[None])


# --- what cannot be ---------------------------------------------------------------------------------------------------


class _Long(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), len(input_ids) == 3 and input_ids.shape[1] > 20)


class _Hears:
    def put(self, value: Tensor) -> None:
        pass

    def end(self) -> None:
        pass


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        ("sleepy", {}, "its memories sleep"),
        ("sliding", {}, "keeps a window"),
        ("fixed", {"streamer": _Hears()}, "a streamer hears all texts at once"),
        ("fixed", {"stopping_criteria": StoppingCriteriaList([_Long()])}, "_Long may look at all texts"),
        ("fixed", {"evidence_mask": torch.ones(3, 20, dtype=torch.long)}, "the evidence mask is longer"),
        (
            "fixed",
            {"prefix_allowed_tokens_fn": lambda row, _: [5, 6, row]},
            "PrefixConstrainedLogitsProcessor",
        ),
    ],
)
def test_what_only_single_texts_can_have_is_decoded_step_by_step(
    case: str, options: dict[str, Any], message: str
) -> None:
    if case == "sliding":
        model = MixedLM(family_model("mistral", VOCAB, sliding_window=8), decoder_memory(VOCAB, seed=7), 0.3)
        model.generation_config.eos_token_id = None
    else:
        model = mixture(**({"sleep": 3, "sleep_below": 0.5} if case == "sleepy" else FIXED))
    with pytest.warns(UserWarning, match=message):
        found = texts_of(model, padded(), drafting=4, **options)
    assert found.tolist() == texts_of(model, padded(), **options).tolist()


def test_a_model_without_numbers_is_named_in_a_batch() -> None:
    model = mixture(gate="none")
    greedy(model)
    with torch.no_grad():
        for weight in model.named_memories()["m0"].parameters():
            weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="memory 'm0' gives no finite scores"):
        texts_of(model, padded(), drafting=4)
