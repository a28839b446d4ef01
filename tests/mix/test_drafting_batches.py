"""Drafted batches, each text accepted for itself, and drafts that are looked up."""

import warnings
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
from memlm.mix.drafts import earlier
from memlm.mix.mixed_lm import MixedLM
from memlm.mix.pace import Pace

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
    for place in range(0, 20, 3):
        for row in range(3):
            end = int(whole[row, start + place])
            found = texts_of(model, inputs, drafting=4, eos_token_id=end)
            assert found.tolist() == texts_of(model, inputs, eos_token_id=end).tolist()


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


class _Raises(StoppingCriteria):
    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("case", [FIXED, {}], ids=str)
def test_a_batch_that_was_stopped_leaves_an_empty_cache(case: dict[str, Any]) -> None:
    inputs = padded()
    for after in range(0, 24, 5):
        model = mixture(**case)
        cache, expected = model.new_cache(3), texts_of(model, inputs)
        stop = StoppingCriteriaList([_Raises(after)])
        with pytest.raises(KeyboardInterrupt):
            texts_of(model, inputs, drafting=4, past_key_values=cache, stopping_criteria=stop)
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
