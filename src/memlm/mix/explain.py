"""Provenance: what base, memory and mixture thought of each generated token, and where the corpus has its like."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from memlm.datastore.store import Datastore
from memlm.errors import ConfigError, InputError
from memlm.memory.protocol import Memory
from memlm.memory.retrieval import RetrievalMemory
from memlm.memory.voter import Votes
from memlm.mix.explanation import ExplainedToken, Explanation, Neighbor
from memlm.mix.loading import load_beside
from memlm.mix.mixed_lm import MixedLM
from memlm.mix.mixture import mix_log_probs
from memlm.models.loading import embedding_rows
from memlm.models.prompts import encode_prompt
from memlm.models.tokenizers import check_same
from memlm.targets.config import RetrievalConfig
from memlm.targets.votes import SparseProbs

EVIDENCE = "Near neighbours are evidence of what the corpus says in such places, not proof that they caused the token."
NO_SNIPPETS = "No snippets: give the datastore (--datastore) that holds the corpus."


@torch.inference_mode()
def explain(
    model: MixedLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[dict[str, str]],
    *,
    datastore: str | Path | RetrievalMemory | None = None,
    retrieval: RetrievalConfig | None = None,
    max_new_tokens: int = 20,
    neighbors: int = 3,
    snippet_tokens: int = 12,
    special_tokens: bool = False,
) -> Explanation:
    """Answer greedily; say per token what each component thought of it, and where the corpus has contexts like it.

    The neighbours are evidence of what the corpus says in such places, not the cause of the token.

    Args:
        model: A base and its memories, with the weights in force.
        tokenizer: The one they share.
        prompt: Text to go on from, or the turns of a chat as the tokenizer's chat template takes them.
        datastore: Folder, or an opened one, whose corpus the snippets come from; the model's own where it retrieves,
            if None. It reads the base's activations where the base is its teacher, and else runs its teacher.
        retrieval: How a datastore given as a folder is searched; only its nprobe matters here.
        max_new_tokens: At least 1.
        neighbors: Per token; 0 for none.
        snippet_tokens: Shown on each side of a neighbour's token at most.
        special_tokens: Whether special tokens that the prompt spells are those tokens; else they are text like any.

    Raises:
        ConfigError: A number is out of range.
        InputError: The prompt has no tokens, or is a chat and the tokenizer has no chat template.
        ArtifactError: The folder is no datastore, or its teacher is no longer the model that made it.
        TokenizerMismatchError: The datastore was made with another tokenizer.
        ModelError: Its teacher cannot be reached, or the base's activations do not fit its keys.
    """
    _check_counts(max_new_tokens=(max_new_tokens, 1), neighbors=(neighbors, 0), snippet_tokens=(snippet_tokens, 0))
    memory = searched_memory(model, tokenizer, datastore, retrieval)
    inputs = encode_prompt(tokenizer, prompt, rows=embedding_rows(model), special_tokens=special_tokens)
    inputs = inputs.to(model.device)
    sequence = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,  # whatever the base's own config says
        return_dict_in_generate=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    read = inputs["input_ids"].shape[1]
    shown = prompt if isinstance(prompt, str) else _decode(tokenizer, sequence[0, :read].tolist())
    evidence = inputs.get("evidence_mask")
    return _explained(model, tokenizer, sequence, read, shown, memory, neighbors, snippet_tokens, evidence)


@torch.inference_mode()
def explain_passage(
    model: MixedLM,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    datastore: str | Path | RetrievalMemory | None = None,
    retrieval: RetrievalConfig | None = None,
    neighbors: int = 0,
    snippet_tokens: int = 12,
    special_tokens: bool = False,
) -> Explanation:
    """Say of a text that is there, token by token but the first, what `explain` says of a generated answer.

    Args:
        text: Of two tokens at least.
        model, tokenizer, datastore, retrieval, neighbors, snippet_tokens, special_tokens: As `explain` takes them.

    Raises:
        InputError: The text has fewer tokens.
        ConfigError: A number is out of range, or the text is longer than the base reads.
        ArtifactError, TokenizerMismatchError, ModelError: As `explain` raises them.
    """
    _check_counts(neighbors=(neighbors, 0), snippet_tokens=(snippet_tokens, 0))
    memory = searched_memory(model, tokenizer, datastore, retrieval)
    inputs = encode_prompt(tokenizer, text, rows=embedding_rows(model), special_tokens=special_tokens)
    sequence: Tensor = inputs["input_ids"].to(model.device)  # type: ignore[assignment, union-attr]
    if sequence.shape[1] < 2:
        raise InputError(f"passage {text!r} has one token only: what comes after it is explained")
    shown = _decode(tokenizer, sequence[0, :1].tolist())
    return _explained(model, tokenizer, sequence, 1, shown, memory, neighbors, snippet_tokens, None)


def _check_counts(**counts: tuple[int, int]) -> None:
    for name, (value, least) in counts.items():
        if value < least:
            raise ConfigError(f"{name} = {value}: must be at least {least}")


def _explained(
    model: MixedLM,
    tokenizer: PreTrainedTokenizerBase,
    sequence: Int[Tensor, "1 L"],
    read: int,
    prompt: str,
    memory: RetrievalMemory | None,
    neighbors: int,
    snippet_tokens: int,
    evidence: Tensor | None,
) -> Explanation:
    """What all thought of the tokens of a text from number `read` on; `prompt` is what stands before them."""
    answer = sequence[0, read:]
    taps = [memory.tap] if memory is not None and memory.tap is not None else []
    model._voter.check_reads(sequence)
    parts = model.components(sequence[:, :-1], logits_to_keep=len(answer), taps=taps, evidence_mask=evidence)
    parts.check_finite()
    base = parts.logits.log_softmax(-1)
    mixture = mix_log_probs(base, list(parts.votes.values()), parts.weights)
    base_probs, mixture_probs = _probs_of(answer, base), _probs_of(answer, mixture)
    memory_probs = {name: _probs_of(answer, votes) for name, votes in parts.votes.items()}
    favourites = {name: _favourites(tokenizer, votes) for name, votes in parts.votes.items()}
    choices = base[0].max(-1)
    weights = {
        name: torch.as_tensor(weight).expand(1, len(answer))[0].tolist()
        for name, weight in zip(parts.votes, parts.weights, strict=True)
    }
    near: list[list[Neighbor]] = [[] for _ in answer]
    if memory is not None and neighbors:
        states = memory.step(sequence[:, :-1], parts.base.activations.get(memory.tap or ""))
        near = _neighbors(memory, tokenizer, states[0, read - 1 :], neighbors, snippet_tokens)

    counts: list[int | None] = [None] * len(answer)
    if memory is not None:
        said = memory.store.corpus.label_counts
        counts = [int(said[token]) if token < len(said) else 0 for token in answer.tolist()]
    texts = _texts(tokenizer, sequence[0, :read].tolist(), *answer[:, None].tolist())[1:]
    tokens = [
        ExplainedToken(
            text=texts[i],
            token_id=token_id,
            base_prob=base_probs[i],
            memory_probs={name: probs[i] for name, probs in memory_probs.items()},
            mixture_prob=mixture_probs[i],
            base_choice=_decode(tokenizer, [int(choices.indices[i])]),
            base_choice_prob=float(choices.values[i].exp()),
            neighbors=near[i],
            memory_choices={name: choices[i] for name, choices in favourites.items() if choices[i]},
            weights={name: found[i] for name, found in weights.items()},
            corpus_count=counts[i],
        )
        for i, token_id in enumerate(answer.tolist())
    ]
    return Explanation(
        prompt=prompt,
        text=str(tokenizer.decode(answer, skip_special_tokens=True)),
        mix_weights=model.mix_weights,
        tokens=tokens,
        note=EVIDENCE if memory is not None else NO_SNIPPETS,
        gate=model.gate.gate or "none",
        corpus_positions=None if memory is None else memory.store.n_entries,
    )


def check_datastore(datastore: str | Path | RetrievalMemory, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a datastore of another tokenizer than `tokenizer`; loads no weights.

    Raises:
        ArtifactError: The folder is no complete datastore.
        TokenizerMismatchError: It was made with another tokenizer.
    """
    store = datastore.store if isinstance(datastore, RetrievalMemory) else Datastore(datastore)
    advice = "build a corpus and a datastore with this model's tokenizer"
    check_same(tokenizer, store.corpus.tokenizer, "the model", f"datastore {store.folder}", advice=advice)


def searched_memory(
    model: MixedLM,
    tokenizer: PreTrainedTokenizerBase,
    datastore: str | Path | RetrievalMemory | None,
    retrieval: RetrievalConfig | None,
) -> RetrievalMemory | None:
    """The memory whose datastore is searched, to be given for several texts; None where there is none.

    Raises:
        ArtifactError, TokenizerMismatchError, ModelError: As `explain` raises them.
    """
    if datastore is None:
        return next((memory for memory in model.named_memories().values() if isinstance(memory, RetrievalMemory)), None)
    check_datastore(datastore, tokenizer)
    if isinstance(datastore, RetrievalMemory):
        memory: Memory = datastore
    else:
        how, where = {"retrieval": retrieval}, model.config.base_where
        [memory] = load_beside(model.base, datastore, how, name=model.config.base, where=where).values()
    assert isinstance(memory, RetrievalMemory)
    memory.check_base(model.base)
    return memory.to(model.device)


def _probs_of(tokens: Int[Tensor, "T"], votes: Votes) -> list[float]:
    """The probability of each token, from votes at the places before them."""
    if isinstance(votes, SparseProbs):
        return votes.of(tokens).tolist()
    return votes[0].gather(-1, tokens[:, None])[:, 0].exp().tolist()


def _favourites(tokenizer: PreTrainedTokenizerBase, votes: Votes) -> list[str]:
    """The likeliest token at each place; nothing where a retriever found none."""
    if not isinstance(votes, SparseProbs):
        return [_decode(tokenizer, [token]) for token in votes[0].argmax(-1).tolist()]
    firsts = (votes.counts.cumsum(0) - votes.counts).tolist()
    found = zip(firsts, votes.counts.tolist(), strict=True)
    return [_decode(tokenizer, [int(votes.ids[at])]) if count else "" for at, count in found]


def _neighbors(
    memory: RetrievalMemory,
    tokenizer: PreTrainedTokenizerBase,
    queries: Float[Tensor, "T D"],
    count: int,
    snippet_tokens: int,
) -> list[list[Neighbor]]:
    """The nearest entries of each query as places in the corpus."""
    corpus = memory.store.corpus
    split, names = corpus.split("train"), corpus.document_names("train")
    distances, entries = memory.neighbors(queries, count)
    documents = split.documents_of(entries)

    def neighbor(distance: float, entry: int, document: int) -> Neighbor:
        place = int(split.token_indices(entry, entry + 1)[0])
        start, end = split.offsets[document : document + 2].tolist()
        first, last = max(start, place - snippet_tokens), min(end, place + 1 + snippet_tokens)
        runs = (split.tokens[first:place], split.tokens[place : place + 1], split.tokens[place + 1 : last])
        before, token, after = _texts(tokenizer, *(run.tolist() for run in runs))
        return Neighbor(names[document], distance, before, token, after, entry)

    return [
        [neighbor(*found) for found in zip(*row, strict=True) if np.isfinite(found[0])]
        for row in zip(distances.tolist(), entries.tolist(), documents.tolist(), strict=True)
    ]


def _texts(tokenizer: PreTrainedTokenizerBase, *runs: list[int]) -> list[str]:
    """The text of each run of tokens after those before it, for a run decoded alone may lose its first space."""
    texts, read, text = [], [], ""
    for run in runs:
        read += run
        longer = _decode(tokenizer, read)
        texts.append(longer[len(text) :] if longer.startswith(text) else _decode(tokenizer, run))
        text = longer
    return texts


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
