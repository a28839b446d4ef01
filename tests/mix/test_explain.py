"""explain: its numbers against each component run by itself, its neighbours against a search of all keys."""

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_model
from reference import brute_neighbors, predicted_tokens
from reference_lm import mixed_probs
from tiny_tokenizers import permuted, sentencepiece_like
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from memlm import Datastore, MixedLM, build_corpus, build_datastore, explain, load_memory
from memlm.corpus.config import CorpusConfig
from memlm.datastore.config import DatastoreConfig
from memlm.errors import ArtifactError, ConfigError, InputError, ModelError, TokenizerMismatchError
from memlm.memory.retrieval import RetrievalMemory
from memlm.mix.explain import explain_passage
from memlm.mix.explanation import ExplainedToken, Explanation, Neighbor, explanation_text, frequency_text, moved_text
from memlm.models.taps import TapReader
from memlm.targets.config import RetrievalConfig
from memlm.targets.votes import SparseProbs

PROMPT = "doctors say that the memory"
WEIGHTS = {"trained": 0.3, "plain": 0.2, "live": 0.25}
# float32 probabilities of tiny models, one pass over all text against one per token: errors below 1e-6
CLOSE: dict[str, Any] = {"rel": 1e-3, "abs": 1e-5}


@pytest.fixture(scope="module")
def other_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another model of the same tokenizer, its keys of another width."""
    return save_model(tmp_path_factory.mktemp("models") / "other", tokenizer, seed=5, width=16)


@pytest.fixture(scope="module")
def model(model_folder: str, memory_folder: Path, other_folder: str, datastore_folder: Path) -> MixedLM:
    """The datastore's teacher with a trained memory, a plain model and live retrieval."""
    memories = {"trained": memory_folder, "plain": other_folder, "live": datastore_folder}
    return MixedLM.from_pretrained(model_folder, memory=memories, mix_weight=WEIGHTS)


@pytest.fixture(scope="module")
def explanation(model: MixedLM, tokenizer: PreTrainedTokenizerFast, datastore_folder: Path) -> Explanation:
    return explain(model, tokenizer, PROMPT, datastore=datastore_folder, max_new_tokens=6, neighbors=4)


def prefixes(explanation: Explanation, tokenizer: PreTrainedTokenizerFast) -> Iterator[Tensor]:
    """All tokens that stood before each explained one."""
    tokens = [*tokenizer(explanation.prompt)["input_ids"], *(token.token_id for token in explanation.tokens)]
    for place in range(len(tokens) - len(explanation.tokens), len(tokens)):
        yield torch.tensor([tokens[:place]])


def activations(folder: str, tap: str, tokens: Tensor) -> Tensor:
    """Of a model by itself, at the last token `(1, D)`."""
    reader = TapReader(AutoModelForCausalLM.from_pretrained(folder).eval(), tap)
    return reader.read(tokens)[:, -1]


# --- what the components thought ----------------------------------------------------------------------------------


def test_probabilities_are_those_of_each_component_by_itself(
    explanation: Explanation, tokenizer: PreTrainedTokenizerFast, model: MixedLM, model_folder: str
) -> None:
    base = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tap = Datastore(model.named_memories()["live"].settings.datastore).manifest.facts["tap"]  # type: ignore[attr-defined]
    for token, before in zip(explanation.tokens, prefixes(explanation, tokenizer), strict=True):
        probs = {}
        with torch.no_grad():
            ours = base(before).logits[0, -1, : model.vocab_size].double().softmax(-1)
            for name, memory in model.named_memories().items():
                read = activations(model_folder, tap, before)[:, None] if memory.tap else None
                votes = memory.votes(memory.step(before if read is None else before[:, -1:], read), slice(-1, None))
                sparse = isinstance(votes, SparseProbs)
                probs[name] = votes.dense(model.vocab_size)[0] if sparse else votes[0, -1].exp()
        mixed = mixed_probs(ours, list(probs.values()), list(WEIGHTS.values()))
        assert token.base_prob == pytest.approx(float(ours[token.token_id]), **CLOSE)
        assert token.memory_probs == pytest.approx({n: float(p[token.token_id]) for n, p in probs.items()}, **CLOSE)
        assert token.mixture_prob == pytest.approx(float(mixed[token.token_id]), **CLOSE)
        assert token.token_id == int(mixed.argmax())
        assert token.base_choice == tokenizer.decode([int(ours.argmax())])
        assert token.base_choice_prob == pytest.approx(float(ours.max()), **CLOSE)


def test_the_mixture_is_the_weighted_sum_of_what_is_shown(explanation: Explanation) -> None:
    assert explanation.mix_weights == WEIGHTS
    rest = 1 - sum(WEIGHTS.values())
    for token in explanation.tokens:
        expected = rest * token.base_prob + sum(WEIGHTS[name] * prob for name, prob in token.memory_probs.items())
        assert token.mixture_prob == pytest.approx(expected, rel=1e-5)  # three roundings of float32


def test_the_answer_is_that_of_generate(
    explanation: Explanation, tokenizer: PreTrainedTokenizerFast, model: MixedLM
) -> None:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert [token.token_id for token in explanation.tokens] == output.tolist()
    assert explanation.text == tokenizer.decode(output, skip_special_tokens=True)


def test_a_chat_is_answered_in_its_template(model: MixedLM, tokenizer: PreTrainedTokenizerFast) -> None:
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for m in messages %}patients {{ m['content'] }}{% endfor %} doctors"
    found = explain(model, chatty, [{"role": "user", "content": "agree"}], max_new_tokens=3)
    assert found == explain(model, chatty, "patients agree doctors", max_new_tokens=3)
    assert found.prompt == "patients agree doctors"


def test_an_end_token_is_explained_too(
    explanation: Explanation, tokenizer: PreTrainedTokenizerFast, model: MixedLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [token.token_id for token in explanation.tokens]
    end = next(id_ for id_ in ids[1:] if id_ != ids[0])
    monkeypatch.setattr(model.generation_config, "eos_token_id", end)
    found = explain(model, tokenizer, PROMPT, max_new_tokens=6, neighbors=0)
    assert [token.token_id for token in found.tokens] == ids[: ids.index(end) + 1]


def test_at_weight_zero_the_mixture_is_the_base(
    model_folder: str, memory_folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = explain(MixedLM.from_pretrained(model_folder, memory=memory_folder, mix_weight=0), tokenizer, "the")
    assert len(found.tokens) == 20
    for token in found.tokens:
        assert token.mixture_prob == token.base_prob == token.base_choice_prob
        assert token.text == token.base_choice or "�" in token.text


# --- the neighbours -----------------------------------------------------------------------------------------------


def assert_nearest(found: Explanation, queries: list[Tensor], store: Datastore, count: int) -> None:
    """The neighbours of `found` are the nearest of all keys; equal contexts may change places."""
    assert store.keys is not None
    keys = np.concatenate([np.load(path) for path in sorted((store.folder / "keys").glob("*.npy"))])
    halves = np.concatenate([query.half().float().numpy() for query in queries])
    distances, _ = brute_neighbors(keys, halves, count)
    for token, query, expected in zip(found.tokens, halves, distances, strict=True):
        entries = [near.entry for near in token.neighbors]
        assert len(set(entries)) == count
        # squares of float32 sums of 32 products, of distances of order 1 to 100
        assert [near.distance for near in token.neighbors] == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-3)
        own = ((keys[entries].astype(np.float64) - query) ** 2).sum(1)
        assert own.tolist() == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-3)


def test_neighbours_are_the_nearest_of_all_keys(
    explanation: Explanation, tokenizer: PreTrainedTokenizerFast, model_folder: str, datastore_folder: Path
) -> None:
    store = Datastore(datastore_folder)
    queries = [
        activations(model_folder, store.manifest.facts["tap"], before) for before in prefixes(explanation, tokenizer)
    ]
    assert_nearest(explanation, queries, store, 4)


def test_another_base_gets_the_neighbours_of_the_datastores_teacher(
    other_folder: str,
    memory_folder: Path,
    model_folder: str,
    datastore_folder: Path,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = MixedLM.from_pretrained(other_folder, memory=memory_folder, mix_weight=0.5)
    found = explain(model, tokenizer, PROMPT, datastore=datastore_folder, max_new_tokens=3, neighbors=2)
    store = Datastore(datastore_folder)
    tap = store.manifest.facts["tap"]
    assert_nearest(found, [activations(model_folder, tap, before) for before in prefixes(found, tokenizer)], store, 2)


@pytest.mark.parametrize("base", ["model_folder", "other_folder"])
def test_live_retrieval_brings_its_own_datastore(
    base: str,
    datastore_folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    request: pytest.FixtureRequest,
) -> None:
    model = MixedLM.from_pretrained(request.getfixturevalue(base), memory=datastore_folder, mix_weight=0.5)
    found = explain(model, tokenizer, PROMPT, max_new_tokens=3, neighbors=2)
    assert found == explain(model, tokenizer, PROMPT, datastore=datastore_folder, max_new_tokens=3, neighbors=2)
    assert all(len(token.neighbors) == 2 for token in found.tokens)
    memory = load_memory(datastore_folder, base=model.config.base)
    assert isinstance(memory, RetrievalMemory)
    assert found == explain(model, tokenizer, PROMPT, datastore=memory, max_new_tokens=3, neighbors=2)


def place_of(near: Neighbor, store: Datastore) -> tuple[list[int], int, str]:
    """Tokens of the neighbour's document, where in it the neighbour's token stands, and the document's name."""
    split = store.corpus.split("train")
    lengths = np.diff(split.offsets).tolist()
    document, place = predicted_tokens(lengths)[near.entry]
    start = int(split.offsets[document])
    names = store.corpus.document_names("train")
    return split.tokens[start : start + lengths[document]].tolist(), place, names[document]


def test_a_snippet_is_the_text_around_its_entry(
    explanation: Explanation, tokenizer: PreTrainedTokenizerFast, datastore_folder: Path
) -> None:
    store = Datastore(datastore_folder)
    ends = 0
    for near in (near for token in explanation.tokens for near in token.neighbors):
        tokens, place, name = place_of(near, store)
        assert tokens[place] == store.values[near.entry]
        assert near.document == name
        assert near.before == tokenizer.decode(tokens[max(0, place - 12) : place])
        assert near.token == tokenizer.decode([tokens[place]])
        assert near.after == tokenizer.decode(tokens[place + 1 : place + 13])
        ends += place < 12 or place + 13 > len(tokens)
    assert ends, "the case must reach the end of a document"


def test_a_snippet_stays_in_its_document(
    model: MixedLM, tokenizer: PreTrainedTokenizerFast, datastore_folder: Path
) -> None:
    found = explain(model, tokenizer, PROMPT, max_new_tokens=4, neighbors=3, snippet_tokens=100_000)
    for near in (near for token in found.tokens for near in token.neighbors):
        tokens, _, _ = place_of(near, Datastore(datastore_folder))
        assert near.before + near.token + near.after == tokenizer.decode(tokens)
    found = explain(model, tokenizer, PROMPT, max_new_tokens=2, snippet_tokens=0)
    assert {near.before + near.after for token in found.tokens for near in token.neighbors} == {""}


def test_spaces_survive_where_a_tokenizer_puts_one_in_front_of_a_text(documents: str, tmp_path: Path) -> None:
    text = Path(documents).read_text(encoding="utf-8")
    tokenizer = sentencepiece_like(text.split("\n\n"))
    save_model(tmp_path / "model", tokenizer)
    settings = CorpusConfig(document_separator="\n\n", block_size=64)
    build_corpus([documents], tokenizer=str(tmp_path / "model"), out=tmp_path / "c", config=settings)
    config = DatastoreConfig(dtype="float32")
    build_datastore(tmp_path / "c", teacher=str(tmp_path / "model"), out=tmp_path / "d", config=config)
    model = MixedLM.from_pretrained(tmp_path / "model", memory=tmp_path / "d", mix_weight=1)
    found = explain(model, tokenizer, PROMPT, max_new_tokens=8, snippet_tokens=100_000)
    documents_read = set(text.strip().split("\n\n"))
    for near in (near for token in found.tokens for near in token.neighbors):
        assert (near.before + near.token + near.after).removesuffix("</s>") in documents_read
    tokens = [*tokenizer(PROMPT)["input_ids"], *(token.token_id for token in found.tokens)]
    assert PROMPT + "".join(token.text for token in found.tokens) == tokenizer.decode(tokens)
    assert any(token.text.startswith(" ") for token in found.tokens)


def test_without_a_datastore_there_are_no_snippets_and_a_note_says_how_to_get_them(
    model_folder: str, memory_folder: Path, tokenizer: PreTrainedTokenizerFast, explanation: Explanation
) -> None:
    model = MixedLM.from_pretrained(model_folder, memory=memory_folder, mix_weight=0.5)
    found = explain(model, tokenizer, PROMPT, max_new_tokens=2)
    assert [token.neighbors for token in found.tokens] == [[], []]
    assert "--datastore" in found.note
    assert "evidence" in explanation.note
    assert "not proof that they caused" in explanation.note


# --- as JSON and text ---------------------------------------------------------------------------------------------


def test_it_goes_through_json_unchanged(explanation: Explanation) -> None:
    values = asdict(explanation)
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert set(values["tokens"][0]["neighbors"][0]) == {"document", "distance", "before", "token", "after", "entry"}


def test_the_text_fits_a_terminal_and_says_everything(explanation: Explanation) -> None:
    lines = explanation_text(explanation).splitlines()
    assert max(map(len, lines)) <= 100
    assert "mix_weight: trained 0.3, plain 0.2, live 0.25" in lines
    below = iter(lines[5:])
    for token in explanation.tokens:
        line = next(below)
        assert line.startswith(repr(token.text))
        shown = [token.base_prob, *token.memory_probs.values(), token.mixture_prob]
        assert [f"{prob:.4f}" for prob in shown] == line[20:].split()[:5]
        assert line.endswith(f"   {token.base_choice!r} {token.base_choice_prob:.4f}")
        others = [f"{name} {choice!r}" for name, choice in token.memory_choices.items() if choice != token.text]
        if others:
            assert next(below).strip() == f"likeliest for {', '.join(others)}"
        for near in token.neighbors:
            line = next(below)
            assert f"{near.distance:.1f}  {near.document} " in line
            assert f"«{near.token.strip() or near.token}»" in line
    assert " ".join(below).strip() == explanation.note


def test_long_names_and_several_lines_stay_on_one_line() -> None:
    near = Neighbor("folder/" * 9 + "end.txt", 12.345, "one\n\n  two\tthree" * 9, " four", "\nfive " * 30, 7)
    token = ExplainedToken("\n" * 30, 3, 0.5, {"m": 0.25}, 0.375, "x", 0.5, [near])
    lines = explanation_text(Explanation("prompt", "text", {"m": 0.5}, [token], "A note.")).splitlines()
    assert max(map(len, lines)) == 100
    line = lines[-3]
    assert "12.3  …" in line
    assert "end.txt " in line
    assert "one⏎two three «four»⏎five⏎five" in line


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0: must be at least 1"),
        ({"neighbors": -1}, "neighbors = -1: must be at least 0"),
        ({"snippet_tokens": -1}, "snippet_tokens = -1: must be at least 0"),
    ],
)
def test_numbers_out_of_range_are_refused(
    model: MixedLM, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        explain(model, tokenizer, PROMPT, **options)


def test_an_empty_prompt_is_refused(model: MixedLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="prompt '' has no tokens"):
        explain(model, tokenizer, "")


def test_another_stage_as_datastore_is_refused(
    model: MixedLM, tokenizer: PreTrainedTokenizerFast, targets_folder: Path
) -> None:
    with pytest.raises(ArtifactError, match="is a targets folder, expected datastore"):
        explain(model, tokenizer, PROMPT, datastore=targets_folder)


def test_how_the_datastore_is_searched_can_be_said(
    model: MixedLM, tokenizer: PreTrainedTokenizerFast, datastore_folder: Path
) -> None:
    with pytest.raises(ConfigError, match="nprobe"):  # an exact index has none: so the setting arrived
        explain(model, tokenizer, PROMPT, datastore=datastore_folder, retrieval=RetrievalConfig(nprobe=2))


@pytest.mark.parametrize("opened", [False, True])
def test_a_datastore_of_another_tokenizer_is_refused(
    model: MixedLM, tokenizer: PreTrainedTokenizerFast, datastore_folder: Path, opened: bool
) -> None:
    datastore = load_memory(datastore_folder) if opened else datastore_folder
    with pytest.raises(TokenizerMismatchError, match=r"ids differ.*build a corpus and a datastore with this model's"):
        explain(model, permuted(tokenizer, seed=1)[0], PROMPT, datastore=datastore)  # type: ignore[arg-type]


def test_colours_show_what_the_memories_lifted_and_lowered_and_nothing_else() -> None:
    probs = {"up": (0.1, 0.4), "down": (0.4, 0.1), "even": (0.4, 0.41)}
    tokens = [ExplainedToken(name, 5, base, {"m": 0.2}, mixed, "b", 0.3, []) for name, (base, mixed) in probs.items()]
    explanation = Explanation("prompt", "a", {"m": 0.5}, tokens, "note")
    plain, coloured = explanation_text(explanation), explanation_text(explanation, colour=True)
    assert "\x1b" not in plain
    assert "\x1b[32m'up'\x1b[0m   " in coloured
    assert "\x1b[31m'down'\x1b[0m   " in coloured
    assert re.sub(r"\x1b\[\d+m", "", coloured) == plain, "columns stay where they are"
    assert coloured.count("\x1b") == 4


def test_what_documents_hold_moves_no_cursor() -> None:
    neighbor = Neighbor("\x1b[2Jname", 1.0, "before\x1b[31m", "\x07", "after\r", 3)
    token = ExplainedToken("a", 5, 0.1, {"memory": 0.2}, 0.15, "b", 0.3, [neighbor])
    text = explanation_text(Explanation("\x1b[1mprompt", "a", {"memory": 0.5}, [token], "note"))
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "\\x1b[2Jname" in text


def test_html_shows_each_token_with_its_probabilities_and_no_markup_of_its_own() -> None:
    neighbor = Neighbor("<b>name", 1.0, "before", "t", "after\x1b", 3)
    token = ExplainedToken("<i>", 5, 0.1, {"law": 0.9}, 0.5, "b", 0.3, [neighbor], {"law": '"mine"'})
    found = Explanation("a & b", "<i>", {"law": 0.5}, [token], "note")._repr_html_()
    assert "a &amp; b" in found
    assert ">&lt;i&gt;</span>" in found
    assert "the favourite of law: &#x27;&quot;mine&quot;&#x27;" in found
    assert "&lt;b&gt;name: before«t»after\\x1b" in found
    assert "0, 150, 80" in found, "lifted"


def test_the_favourite_of_each_memory_is_its_likeliest_token(trio: MixedLM, tokenizer: PreTrainedTokenizerFast) -> None:
    found = explain(trio, tokenizer, "the memory reads", max_new_tokens=3, neighbors=0)
    tokens = tokenizer("the memory reads", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        votes = trio.components(tokens, logits_to_keep=1).votes
    for name, likeliest in (("law", votes["law"][0, -1].argmax()), ("facts", votes["facts"].ids[0])):
        assert found.tokens[0].memory_choices[name] == tokenizer.decode([int(likeliest)])


# --- passages that are there --------------------------------------------------------------------------------------


def test_a_passage_is_explained_token_by_token(
    model: MixedLM, tokenizer: PreTrainedTokenizerFast, datastore_folder: Path
) -> None:
    ids = tokenizer(PROMPT)["input_ids"]
    found = explain_passage(model, tokenizer, PROMPT, datastore=datastore_folder, neighbors=2)
    assert found.prompt + "".join(token.text for token in found.tokens) == PROMPT
    assert [token.token_id for token in found.tokens] == ids[1:]
    for place, token in enumerate(found.tokens, 1):
        before = torch.tensor([ids[:place]])
        with torch.no_grad():
            mixed = model(before).logits[0, -1].softmax(-1)
            base = model.base(before).logits[0, -1, : model.vocab_size].softmax(-1)
        assert token.mixture_prob == pytest.approx(float(mixed[ids[place]]), **CLOSE)
        assert token.base_prob == pytest.approx(float(base[ids[place]]), **CLOSE)
        assert len(token.neighbors) == 2
    said = Datastore(datastore_folder).values.tolist()
    assert found.corpus_positions == len(said)
    assert [token.corpus_count for token in found.tokens] == [said.count(token) for token in ids[1:]]


def test_the_long_tail_is_told_apart_from_function_words() -> None:
    def token(count: int | None, base: float, mixture: float) -> ExplainedToken:
        return ExplainedToken("x", 0, base, {"m": 0.5}, mixture, "x", 0.5, [], corpus_count=count)

    def told(*tokens: ExplainedToken, positions: int | None = 20_000) -> str | None:
        return frequency_text([Explanation("the", "", {}, [part], "", corpus_positions=positions) for part in tokens])

    common = token(20, 0.5, 0.5)
    lines = told(common, token(19, 0.2, 0.4), token(9, 0.01, 0.04), token(1, 0.04, 0.01), common)
    assert lines is not None
    cells = [" ".join(line.split()) for line in lines.splitlines()]
    assert cells[1:] == [
        "every 1,000th token or more: function words, marks 2 tokens, perplexity 2.00 -> 2.00",
        "less often 1 tokens, perplexity 5.00 -> 2.50",
        "fewer than 10 times: the long tail 2 tokens, perplexity 50.00 -> 50.00",
        "never 0 tokens, none here",
    ]
    assert told(token(None, 0.5, 0.5)) is None
    assert told(token(3, 0.5, 0.5), positions=None) is None


def test_where_memories_helped_and_hurt_most() -> None:
    def token(text: str, base: float, mixture: float) -> ExplainedToken:
        return ExplainedToken(text, 0, base, {"m": 0.5}, mixture, "x", 0.5, [])

    tokens = [token(" a", 0.1, 0.6), token(" b", 0.5, 0.5), token(" c", 0.4, 0.2), token(" d", 0.2, 0.3)]
    found = Explanation("the", "", {"m": 0.3}, tokens, "")
    lifted, sunk = found.moved(5)
    assert ([t.text for t in lifted], [t.text for t in sunk]) == ([" a", " d"], [" c"])
    lines = moved_text(found, count=1).splitlines()
    assert lines[0] == "the a b c d"
    assert lines[1] == "4 tokens, perplexity 3.98 for the base alone, 2.73 with the memories"
    assert lines[2:] == ["helped most: ' a' 10.0% -> 60.0%", "hurt most: ' c' 40.0% -> 20.0%"]
    assert "\x1b[32m a\x1b[0m" in moved_text(found, colour=True)


def test_a_passage_that_cannot_be_explained_is_one_line(model: MixedLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="has one token only"):
        explain_passage(model, tokenizer, "t")
    with pytest.raises(ConfigError, match="tokens are more than the 256 that base"):
        explain_passage(model, tokenizer, "the memory " * 200)


def test_a_base_that_gives_no_numbers_is_named(
    nan_base: str, memory_folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = MixedLM.from_pretrained(nan_base, memory=memory_folder, mix_weight=0.3)
    for call in (explain, explain_passage):
        with pytest.raises(ModelError, match="the base gives no finite scores"):
            call(model, tokenizer, PROMPT)


def test_an_adapted_base_is_not_read_as_the_datastores_teacher(
    model_folder: str, memory_folder: Path, datastore_folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Though its name is that one's."""
    model = MixedLM.from_pretrained(model_folder, memory=memory_folder, mix_weight=0.5)
    with torch.no_grad():
        for parameter in model.base.model.layers[0].parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    found = explain(model, tokenizer, PROMPT, datastore=datastore_folder, max_new_tokens=3, neighbors=2)
    store = Datastore(datastore_folder)
    tap = store.manifest.facts["tap"]
    assert_nearest(found, [activations(model_folder, tap, before) for before in prefixes(found, tokenizer)], store, 2)
