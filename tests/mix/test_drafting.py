"""Drafted and drawn decoding: the mixture's own tokens, its own distribution, and what is read for them."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from families import family_model
from memories import LONG_TEXT, Make, decoder_memory
from test_gate import VOCAB, mixture, some_tokens
from test_mixed_generation import Listener
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from benchmarks.drafting_exactness import chance_of, direct, places_among, processors_of, sampled
from memlm.errors import ConfigError, ModelError
from memlm.mix.mixed_lm import MixedLM
from memlm.mix.pace import MOST_DRAFTED, Pace
from memlm.models.abilities import CACHE

PROMPT = some_tokens(1, 7)
NEW = 24

FIXED: dict[str, Any] = {"gate": "none"}
GATED: list[dict[str, Any]] = [
    FIXED,
    {"gate": "none", "memories": 2},
    {},
    {"memories": 2, "prior": 0.8, "switch": 0.2},
    {"gate": "both"},
    {"gate": "confidence", "memories": 2},
    {"gate": "both", "sleep": 3, "sleep_below": 0.5},
    {"sleep": 2, "sleep_below": 0.4},
]
PROCESSED: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.5},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 8, "eos_token_id": 3},
]
TIE = 1e-4


def greedy(model: Any, prompt: Tensor = PROMPT, **options: Any) -> Tensor:
    return model.generate(prompt, do_sample=False, max_new_tokens=NEW, pad_token_id=0, **options)


def assert_same_but_for_ties(model: MixedLM, found: Tensor, expected: Tensor, **options: Any) -> None:
    """Two greedy texts are alike up to a place where the two likeliest tokens are as likely but for rounding."""
    length = min(found.shape[1], expected.shape[1])
    differs = (found[:, :length] != expected[:, :length])[0].nonzero()
    if not len(differs):
        assert found.shape == expected.shape
        return
    place = int(differs[0])
    logits = model(expected[:, :place], use_cache=False).logits[0, -1]
    assert abs(float(logits[found[0, place]] - logits[expected[0, place]])) < TIE


# --- greedy -----------------------------------------------------------------------------------------------------------


@pytest.mark.grid(3)
@pytest.mark.slow
@pytest.mark.parametrize("case", GATED, ids=str)
@pytest.mark.parametrize("drafting", [1, 4, "auto"])
def test_drafts_change_no_token(case: dict[str, Any], drafting: Any) -> None:
    model = mixture(**case)
    for seed in range(3):
        prompt = some_tokens(1, 7, seed=seed)
        assert_same_but_for_ties(model, greedy(model, prompt, drafting=drafting), greedy(model, prompt))


@pytest.mark.parametrize("options", PROCESSED, ids=str)
def test_drafts_change_no_token_under_processors(options: dict[str, Any]) -> None:
    model = mixture(gate="none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, found = greedy(model, **options), greedy(model, drafting=4, **options)
    assert found.tolist() == expected.tolist()


@pytest.mark.filterwarnings(LONG_TEXT)
@pytest.mark.parametrize("window", [6, 16])
def test_drafts_change_no_token_where_the_memorys_window_moves(window: int) -> None:
    model = mixture(gate="none")
    model = MixedLM(model.base, model.named_memories()["m0"], 0.5, memory_window=window)
    assert_same_but_for_ties(model, greedy(model, drafting=4), greedy(model))


def test_padding_on_the_left_changes_nothing() -> None:
    model = mixture(gate="none")
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), PROMPT], 1)
    mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
    found = greedy(model, padded, attention_mask=mask, drafting=4)
    assert found[:, 3:].tolist() == greedy(model).tolist()


def test_a_weight_for_one_call_and_an_evidence_mask_are_kept() -> None:
    model = mixture()
    silent = torch.ones_like(PROMPT)
    silent[:, 2:5] = 0
    for options in ({"mix_weight": 0.9}, {"evidence_mask": silent}):
        assert_same_but_for_ties(model, greedy(model, drafting=3, **options), greedy(model, **options), **options)


class _AfterToken(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_a_text_ends_where_it_should_and_is_told_token_by_token() -> None:
    model = mixture(gate="none")
    whole = greedy(model)
    for length in range(PROMPT.shape[1] + 1, PROMPT.shape[1] + 9):
        listener = Listener()
        stop = StoppingCriteriaList([_AfterToken(length)])
        found = greedy(model, drafting=4, stopping_criteria=stop, streamer=listener)
        assert found.tolist() == whole[:, :length].tolist()
        assert listener.heard == found[0].tolist()
        assert listener.ended
    last = int(whole[0, PROMPT.shape[1] + 5])
    assert greedy(model, drafting=4, eos_token_id=last).tolist() == greedy(model, eos_token_id=last).tolist()


@pytest.mark.parametrize("case", [FIXED, {}, {"gate": "both", "sleep": 3, "sleep_below": 0.5}], ids=str)
def test_what_comes_back_is_what_a_plain_run_gives_and_can_be_gone_on_from(case: dict[str, Any]) -> None:
    model = mixture(**case)
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    plain, found = greedy(model, **asked), greedy(model, drafting=4, **asked)
    assert found.sequences.tolist() == plain.sequences.tolist()
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.cat(found[name]), torch.cat(plain[name]), rtol=1e-3, atol=1e-3)
    cache = found.past_key_values
    assert cache.get_seq_length() == found.sequences.shape[1] - 1
    more = [
        model.generate(
            text, past_key_values=known, do_sample=False, max_new_tokens=6, pad_token_id=0, drafting=drafting
        )
        for text, known, drafting in ((found.sequences, cache, 3), (plain.sequences, plain.past_key_values, None))
    ]
    assert_same_but_for_ties(model, *more)


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_a_base_with_sliding_windows_takes_tokens_back(family: str) -> None:
    base = family_model(family, VOCAB, **({"sliding_window": 8} if family == "mistral" else {}))
    model = MixedLM(base, decoder_memory(VOCAB, seed=7), 0.3)
    model.generation_config.eos_token_id = None
    for prompt in (PROMPT, some_tokens(1, 14), some_tokens(1, 1)):
        expected = greedy(model, prompt)
        for options in ({}, {"prefill_chunk_size": 3}):
            assert_same_but_for_ties(model, greedy(model, prompt, drafting=4, **options), expected)
    started = model.generate(PROMPT, do_sample=False, max_new_tokens=4, pad_token_id=0, return_dict_in_generate=True)
    found = greedy(model, started.sequences, past_key_values=started.past_key_values, drafting=4)
    assert_same_but_for_ties(model, found, greedy(model, started.sequences))


def test_a_prompt_is_read_in_chunks_where_asked() -> None:
    model, prompt = mixture(gate="none"), some_tokens(1, 20)
    expected = greedy(model, prompt)
    read = counted(model)
    assert greedy(model, prompt, drafting=4, prefill_chunk_size=6).tolist() == expected.tolist()
    assert read["base"][:4] == [6, 6, 6, 2]


class _Raises(BaseStreamer):
    def __init__(self, after: int) -> None:
        self.left = after

    def put(self, value: Tensor) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def end(self) -> None:
        pass


_DRAWN = {"drawing": True, "do_sample": True, "top_k": 0}


@pytest.mark.parametrize(
    ("case", "options"), [(FIXED, {"drafting": 4}), ({}, {"drafting": 4}), (FIXED, _DRAWN)], ids=str
)
def test_a_text_that_was_stopped_leaves_a_cache_to_go_on_from(case: dict[str, Any], options: dict[str, Any]) -> None:
    for after in range(1, 9):
        model = mixture(**case)
        cache = model.new_cache(1)
        with pytest.raises(KeyboardInterrupt):
            model.generate(
                PROMPT, past_key_values=cache, streamer=_Raises(after), max_new_tokens=NEW, pad_token_id=0, **options
            )
        known = cache.get_seq_length()
        assert known <= PROMPT.shape[1] + after
        text = torch.cat([PROMPT, some_tokens(1, 12, seed=9)], 1)  # goes on from what the cache knows of it
        if known <= PROMPT.shape[1]:
            found = model(text[:, known:], past_key_values=cache).logits
            torch.testing.assert_close(found, model(text).logits[:, known:], rtol=1e-3, atol=1e-3)


def test_a_draft_that_is_interrupted_takes_back_what_it_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture(gate="none")
    cache = model.new_cache(1)
    with torch.no_grad():
        model(PROMPT[:, :-1], past_key_values=cache)
    memory, steps = model.named_memories()["m0"], []
    step = memory.step

    def stops(*args: Any, **options: Any) -> Any:
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(*args, **options)

    monkeypatch.setattr(memory, "step", stops)
    with pytest.raises(KeyboardInterrupt):
        greedy(model, past_key_values=cache, drafting=4)
    monkeypatch.undo()
    assert cache.get_seq_length() == PROMPT.shape[1]
    text = greedy(model)[:, : PROMPT.shape[1] + 1]
    found = model(text[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(found, model(text).logits[:, -1:], rtol=1e-3, atol=1e-3)


def test_a_drawn_text_goes_on_from_a_cache_whose_memory_slept() -> None:
    model, text = mixture(sleep=8, sleep_below=1.0), some_tokens(1, 12)
    cache = model.new_cache(1)
    with torch.no_grad():
        for at in range(text.shape[1] - 1):
            model(text[:, at : at + 1], past_key_values=cache)
    assert len(cache.unread)
    model.set_mix_weight(1.0)
    found = model.generate(
        text, past_key_values=cache, do_sample=True, temperature=1e-3, top_k=0, drawing=True, warp="components",
        max_new_tokens=6, pad_token_id=0,
    )  # fmt: skip
    assert_same_but_for_ties(model, found, model.generate(text, do_sample=False, max_new_tokens=6, pad_token_id=0))


def test_stop_strings_end_a_drafted_text(make: Make, tokenizer: Any) -> None:
    model = make({"law": 0.4})
    prompt = tokenizer("the memory reads", return_tensors="pt")
    plain = model.generate(**prompt, do_sample=False, max_new_tokens=16, pad_token_id=0)
    word = tokenizer.decode(plain[0, prompt["input_ids"].shape[1] + 5 :][:2])
    both = [
        model.generate(
            **prompt,
            do_sample=False,
            max_new_tokens=16,
            pad_token_id=0,
            stop_strings=[word],
            tokenizer=tokenizer,
            **how,
        ).tolist()
        for how in ({}, {"drafting": 4})
    ]
    assert both[0] == both[1]
    assert len(both[0][0]) < plain.shape[1]


class _HearsScores(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), len(scores) > 5)


def test_criteria_hear_the_scores_that_are_kept() -> None:
    asked = {"return_dict_in_generate": True, "output_scores": True}
    stop = StoppingCriteriaList([_HearsScores()])
    found = greedy(mixture(gate="none"), drafting=4, stopping_criteria=stop, **asked)
    assert len(found.scores) == 6


# --- what is read -----------------------------------------------------------------------------------------------------


def counted(model: MixedLM) -> dict[str, list[int]]:
    """Tokens that base and memories read in each step from here on."""
    read: dict[str, list[int]] = {"base": []}
    voters: dict[str, Any] = {"base": model._voter, **model.named_memories()}
    for name, voter in voters.items():
        read[name] = []

        def count(tokens: Tensor, *args: Any, _step: Any = voter.step, _name: str = name, **options: Any) -> Any:
            read[_name].append(tokens.shape[1])
            return _step(tokens, *args, **options)

        voter.step = count
    return read


def test_a_memory_that_is_the_base_drafts_all_and_each_token_is_read_once_by_it() -> None:
    base = family_model("llama", VOCAB)
    memory = decoder_memory(VOCAB, mix_weight=0.5, seed=0)
    memory.decoder.load_state_dict(base.state_dict())
    model = MixedLM(base, memory, 0.5)
    model.generation_config.eos_token_id = None
    expected = greedy(model)
    read = counted(model)
    assert greedy(model, drafting=4).tolist() == expected.tolist()
    assert read["base"] == [PROMPT.shape[1], 5, 5, 5, 5, 3]  # 1 and 4 x 5 and 3 are the 24 new tokens
    assert read["memory"][1:] == [1] * 23


def test_a_sleeping_memory_drafts_nothing() -> None:
    model = mixture(gate="posterior", sleep=8, sleep_below=1.0)
    read = counted(model)
    greedy(model, drafting=4)
    assert max(read["base"][1:]) == 1
    assert len(read["m0"]) < 8


def test_the_other_component_is_not_read_where_one_is_drawn() -> None:
    model = mixture(gate="none")
    for weight, unread in ((0.0, "m0"), (1.0, "base")):
        model.set_mix_weight(weight)
        read = counted(model)
        model.generate(PROMPT, do_sample=True, top_k=0, max_new_tokens=NEW, pad_token_id=0, drawing=True)
        assert sum(read[unread]) == PROMPT.shape[1] + NEW - 1  # once, at the end, so that the cache is whole
        assert len(read[unread]) == 1


def test_a_drawn_texts_cache_can_be_gone_on_from() -> None:
    model = mixture(gate="none")
    found = model.generate(
        PROMPT, do_sample=True, top_k=0, max_new_tokens=9, pad_token_id=0, drawing=True, return_dict_in_generate=True
    )
    more = greedy(model, found.sequences, past_key_values=found.past_key_values)
    assert_same_but_for_ties(model, more, greedy(model, found.sequences))


# --- sampled ----------------------------------------------------------------------------------------------------------

TEXTS = 16
"""Of 16 tokens, a setting; `python -m benchmarks drafting_exactness` takes 20,000 tokens."""


SETTINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (FIXED, {"drafting": 4}),
    (FIXED, {"drafting": "auto", "temperature": 0.6}),
    (FIXED, {"drafting": 3, "top_k": 5}),
    ({}, {"drafting": 4}),
    ({"gate": "both"}, {"drafting": 2, "top_p": 0.7}),
    ({"gate": "both", "sleep": 3, "sleep_below": 0.5}, {"drafting": 4}),
    ({"gate": "none", "memories": 2}, {"drafting": 4}),
    (FIXED, {"drafting": 4, "repetition_penalty": 1.6}),
    (FIXED, {"drawing": True}),
    ({"gate": "none", "memories": 2}, {"drawing": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "options"), SETTINGS, ids=str)
def test_sampled_tokens_have_the_mixtures_own_distribution(case: dict[str, Any], options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    model = mixture(**case)
    texts = sampled(model, PROMPT, TEXTS, **options)
    found = places_among(model, direct(model, processors_of(options)), texts, PROMPT.shape[1])
    assert len(found) == 16 * TEXTS
    assert chance_of(found) > 0.01 / len(SETTINGS)


def test_a_distribution_that_is_a_little_off_is_seen() -> None:
    """The same statistic where tokens come from a mixture of another weight."""
    torch.manual_seed(1)
    model = mixture(gate="none")
    texts = sampled(model, PROMPT, 48, rows=8, drafting=4, mix_weight=0.6)  # instead of 0.3
    found = places_among(model, direct(model), texts, PROMPT.shape[1])
    assert chance_of(found) < 1e-4


def test_warped_components_are_drawn_where_asked() -> None:
    torch.manual_seed(1)
    model = mixture(gate="none")
    texts = sampled(model, PROMPT, TEXTS, drawing=True, warp="components", temperature=0.5)
    memory, weight = model.named_memories()["m0"], model.mix_weights["m0"]

    def scores_of(texts: Tensor) -> Tensor:
        base = (model.base(texts).logits.float() / 0.5).softmax(-1)
        votes = (memory.votes(memory.step(texts), slice(None)) / 0.5).softmax(-1)
        return ((1 - weight) * base + weight * votes).log()

    found = places_among(model, scores_of, texts, PROMPT.shape[1])
    assert chance_of(found) > 0.001


def test_a_fixed_length_gives_the_same_text_for_the_same_seed() -> None:
    model = mixture()
    texts = []
    for _ in range(2):
        torch.manual_seed(3)
        texts.append(sampled(model, PROMPT, 1, drafting=4).tolist())
    assert texts[0] == texts[1]


# --- pace -------------------------------------------------------------------------------------------------------------


def paced(accepts: float, memory: float, base: float, more: float, rounds: int = 400) -> list[int]:
    """Lengths drafted where each token is accepted with that chance, and steps take so many seconds."""
    rng, pace, lengths = np.random.default_rng(0), Pace(), []
    for _ in range(rounds):
        count = pace.next()
        wins = rng.random(count) < accepts
        accepted = count if wins.all() else int(wins.argmin())
        pace.saw(count, [(count, accepted)], memory * (count + 1) + base + more * count)
        lengths.append(count)
    return lengths


def test_drafts_are_long_where_they_are_accepted_and_cheap_and_stop_where_they_are_not() -> None:
    assert np.mean(paced(0.95, 0.05, 1.0, 0.02)[100:]) > 8
    assert 1 <= np.mean(paced(0.5, 0.1, 1.0, 0.05)[100:]) <= 4
    lengths = paced(0.2, 0.6, 1.0, 0.6)[100:]
    assert np.mean(np.array(lengths) == 0) > 0.9
    assert max(lengths) <= MOST_DRAFTED


def test_drafts_that_cannot_pay_are_not_tried() -> None:
    for likely, share, tried in ((0.3, 0.3, False), (0.3, 0.1, True), (0.9, 0.3, True), (0.0, 0.0, False)):
        pace, lengths = Pace(share=share), []
        for _ in range(40):
            count = pace.next()
            accepted = count if likely > 0.5 else 0
            lengths.append(count)
            seconds = 1 + count * share
            pace.saw(count, [(count, accepted)] if count else [], seconds, None if count else likely)
        assert (max(lengths) > 0) == tried, (likely, share)


@pytest.mark.parametrize(
    "sampling", [{"do_sample": False}, {"do_sample": True, "top_k": 0, "temperature": 0.7}], ids=str
)
def test_plain_steps_tell_how_often_drafts_would_be_accepted(sampling: dict[str, Any]) -> None:
    model, pace = mixture(gate="none"), Pace()
    rounds: list[tuple[int, float | None]] = []
    saw = pace.saw

    def noted(drafted: int, judged: Any, seconds: float, likely: float | None = None) -> None:
        rounds.append((drafted, likely))
        saw(drafted, judged, seconds, likely)

    pace.saw = noted  # type: ignore[method-assign]
    text = model.generate(PROMPT, max_new_tokens=NEW, pad_token_id=0, drafting=pace, **sampling)
    assert pace.share == pytest.approx(0.5, abs=0.1)
    memory = model.named_memories()["m0"]
    with torch.no_grad():
        votes = memory.votes(memory.step(text), slice(None))[0]
        logits = model(text).logits[0]
    at = PROMPT.shape[1]  # the first new token comes with the prompt
    for step, (drafted, likely) in enumerate(rounds):
        if drafted == 0:
            place = at
            if step >= 4 and step % 8:  # the first are asked, then one of eight
                assert likely is None
            elif sampling["do_sample"]:
                p, q = ((scores[place] / 0.7).softmax(-1) for scores in (logits, votes))
                assert likely == pytest.approx(float(torch.minimum(p, q).sum()), abs=1e-3)
            else:
                assert likely == float(logits[place].argmax() == votes[place].argmax())
            at += 1
            continue
        break


def test_plain_steps_that_tell_nothing_make_nothing_forgotten() -> None:
    pace = Pace(share=0.1)
    for step in range(100):
        likely = 0.75 if step < 8 else None
        pace.saw(0, [], 1.0, likely)
    assert pace.acceptance == pytest.approx(0.75)
    assert pace.accepted + pace.refused > 5


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drafting": 0}, "drafting = 0: must be from 1 to 32"),
        ({"drafting": 33}, "must be from 1 to 32"),
        ({"drafting": "always"}, "drafting = 'always': give a number of tokens, auto, or None"),
        ({"drafting": True}, "drafting = True"),
        ({"drafting": 4, "drawing": True}, "two ways to decode"),
        ({"warp": "components"}, "warp is for drawing"),
        ({"drawing": True, "warp": "all"}, "warp = 'all'"),
        ({"drafting": 4, "num_beams": 2}, "not for beams"),
        (
            {"drafting": 4, "assistant_model": family_model("llama", VOCAB)},
            "drafting and drawing are for greedy decoding",
        ),
        ({"drawing": True, "do_sample": True, "top_k": 0, "mix_weight": 7.0}, "must be in"),
        ({"drawing": True}, "nothing can be drawn: drawing samples"),
        ({"drawing": True, "do_sample": True, "top_k": 4}, "TopKLogitsWarper would act on each component"),
        (
            {"drawing": True, "do_sample": True, "top_k": 0, "return_dict_in_generate": True, "output_scores": True},
            "the mixture's scores are not known",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    model = mixture(gate="none")
    with pytest.raises(ConfigError, match=message):
        model.generate(PROMPT, max_new_tokens=4, pad_token_id=0, **options)


def test_a_gate_or_a_reader_of_the_base_cannot_be_drawn(make: Make) -> None:
    sampling = {"do_sample": True, "top_k": 0, "max_new_tokens": 4, "pad_token_id": 0, "drawing": True}
    with pytest.raises(ConfigError, match="a gate has to hear all components"):
        mixture().generate(PROMPT, **sampling)
    mixture().generate(PROMPT, mix_weight=0.5, **sampling)  # but for a call with a weight of its own
    with pytest.raises(ConfigError, match="a memory reads the base's states"):
        make({"mlp": 0.5}).generate(PROMPT, **sampling)


def test_a_weight_for_one_call_is_drawn_by() -> None:
    model = mixture(gate="none")
    asked = {"do_sample": True, "top_k": 0, "max_new_tokens": 12, "pad_token_id": 0, "drawing": True}
    for weight, unread in ((0.0, "m0"), (1.0, "base")):
        read = counted(model)
        model.generate(PROMPT, mix_weight=weight, **asked)
        assert len(read[unread]) == 1


def test_what_the_base_cannot_read_is_refused_as_ever() -> None:
    model = mixture(gate="none")
    with pytest.raises(ConfigError, match="token id 99 is outside the 40"):
        greedy(model, torch.tensor([[5, 99]]), drafting=4)
    cache = model.new_cache(1)
    model(PROMPT, past_key_values=cache)
    with pytest.raises(ConfigError, match="the cache holds the whole prompt"):
        greedy(model, past_key_values=cache, drafting=4)


class _Odd(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        pytest.param(
            *("fixed", {"cache_implementation": "static"}, "cannot take tokens back"),
            marks=pytest.mark.skipif(CACHE == "cache", reason="static caches take tokens back since transformers 5.24"),
        ),
        ("fixed", {"logits_processor": LogitsProcessorList([_Odd()])}, "_Odd may be more than a function"),
        ("fixed", {"use_cache": False}, "there is no cache"),
        ("fixed", {"return_dict_in_generate": True, "output_attentions": True}, "attentions or hidden states"),
        ("mamba", {}, "there is no cache|cannot take tokens back"),
    ],
)
@pytest.mark.filterwarnings("ignore:MambaForCausalLM keeps no past")
def test_where_drafts_cannot_be_made_plain_steps_are_taken_and_said_once(
    case: str, options: dict[str, Any], message: str, make: Make
) -> None:
    prompt = PROMPT.repeat(2, 1) if case == "batch" else PROMPT
    if case == "mlp":
        model = make({"mlp": 0.5})
    elif case == "mamba":
        model = MixedLM(family_model("mamba", VOCAB), decoder_memory(VOCAB, seed=7), 0.3)
    else:
        model = mixture(gate="none")
    with pytest.warns(UserWarning, match=message) as told:
        found = greedy(model, prompt, drafting=4, **options)
    assert sum("step by step" in str(warning.message) for warning in told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = greedy(model, prompt, **options)
    sequences = [getattr(text, "sequences", text) for text in (found, expected)]
    assert sequences[0].tolist() == sequences[1].tolist()


@pytest.mark.parametrize("part", ["base", "m0"])
@pytest.mark.parametrize("options", [{"drafting": 4}, {"drafting": 4, "do_sample": True}, {"drawing": True}], ids=str)
def test_a_model_that_gives_no_numbers_is_named(part: str, options: dict[str, Any]) -> None:
    model = mixture(gate="none")
    greedy(model)  # what the base can do was tried while it was whole
    broken = model.base if part == "base" else model.named_memories()[part]
    with torch.no_grad():
        for weight in broken.parameters():
            weight.fill_(float("nan"))
    named = "the base" if part == "base" else "memory 'm0'"
    sampling = {"do_sample": True, "top_k": 0} if "drawing" in options else {}
    with pytest.raises(ModelError, match=f"{named} gives no finite scores"):
        model.generate(PROMPT, max_new_tokens=30, pad_token_id=0, **sampling, **options)
