"""A corpus with what teachers wrote: they go on from what its documents begin with, those of folds from unread ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from memlm.config import settings_from
from memlm.corpus.blocks import Corpus, Split
from memlm.corpus.build import save_tokens, special_id
from memlm.corpus.near_duplicates import overlaps
from memlm.errors import ConfigError, ModelError
from memlm.files import digest
from memlm.manifest import Manifest, copy_payload
from memlm.models.abilities import abilities
from memlm.models.loading import default_device, device_of, dtype_name, load_config, longest_context, parse_dtype
from memlm.parts import KEEP_SECONDS, Due, Part
from memlm.progress import progress_bar
from memlm.stage import Plan, Stage, StageSpec, run_stage
from memlm.targets.config import WriteConfig
from memlm.targets.speakers import load_speaker, named_speakers

_FIRST_PIECE = 32  # tokens that are written before ended texts are put aside
_TRAIN = ("train.tokens.npy", "train.offsets.npy", "train.names.txt")


def write_corpus(
    corpus: str | Path,
    *,
    out: str | Path,
    teacher: str | None = None,
    fold_teachers: Sequence[str | Path] = (),
    config: WriteConfig | None = None,
    **settings: Any,
) -> Manifest:
    """Write a corpus to `out`: the training documents of `corpus`, and what teachers made of their beginnings,
    of those longer than `document_tokens` of the beginning of every so many tokens.

    The other splits are as they were. What shares an n-gram with them is left out, where the corpus was made without
    near-duplicates. A teacher that has read a document would recite it, so those of folds are the better authors.

    Args:
        corpus: Folder of the corpus stage.
        out: Folder to write; resumed where an earlier run stopped.
        teacher: Any causal LM of the corpus's tokenizer, which goes on from all documents.
        fold_teachers: Instead of it, folders of models that were trained with `left_out`, one for each fold: each goes
            on from the documents that it has not read.
        config: Default settings if None; or give them as keywords.

    Raises:
        ConfigError: Neither or both are given, teachers of folds do not fit together or are not as many as `folds`, or
            one has no positions for documents so long.
        ArtifactError: A teacher of a fold was trained on another corpus.
        ModelError: A teacher cannot be reached, or gives scores that are no numbers.
        TokenizerMismatchError: The teacher has another tokenizer than the corpus.
    """
    config = settings_from(WriteConfig, config, settings)
    return run_stage(out, *plan_written(corpus, teacher=teacher, fold_teachers=fold_teachers, config=config))


def plan_written(
    corpus: str | Path,
    *,
    teacher: str | None = None,
    fold_teachers: Sequence[str | Path] = (),
    config: WriteConfig | None = None,
    keep_seconds: float = KEEP_SECONDS,
) -> Plan:
    """What `write_corpus` with these arguments is to make, and the work; raises what it raises before any work."""
    source, config = Corpus(corpus), config or WriteConfig()
    if (teacher is None) == (not fold_teachers):
        raise ConfigError("who is to write? give --teacher, or a --fold-teacher for each fold")
    authors = named_speakers(source, teacher, fold_teachers)
    config = config.with_folds(authors.folds)
    parse_dtype(config.dtype)
    for author in authors.places:
        reach, longest = longest_context(load_config(author)), _longest(source, config)
        if reach is not None and longest > reach:
            raise ConfigError(f"document_tokens = {longest}: teacher {author} has positions for {reach}; lower it")
    spec = StageSpec(
        "corpus",
        config=source.manifest.config,
        inputs={"corpus": source.manifest.hash, "written": digest(config.model_dump()), **authors.inputs},
        tokenizer=source.manifest.tokenizer,
        sources={**source.manifest.sources, "corpus": str(corpus), **authors.sources},
    )
    return Plan(spec, lambda stage: _write(stage, source, authors.places, config, Due(keep_seconds)))


def _longest(corpus: Corpus, config: WriteConfig) -> int:
    return config.document_tokens or corpus.config.block_size


@dataclass(frozen=True)
class _Batch:
    """Documents that one teacher writes side by side."""

    author: int
    documents: NDArray[np.int64]
    """From which documents something is given."""
    prompts: list[NDArray[np.int32]]


def _batches(split: Split, authors: int, longest: int, config: WriteConfig) -> list[_Batch]:
    """All that is to be written, prompts of a length side by side."""
    random = np.random.default_rng(config.seed)
    fold = split.folds(authors) if authors > 1 else np.zeros(split.n_documents, np.int64)
    begun = [
        (document, at)
        for document, (start, stop) in enumerate(pairwise(split.offsets.tolist()))
        for at in range(start, stop, longest)  # a long document at every so many tokens, not at its beginning alone
        if at == start or stop - at > config.prompt_tokens
    ]
    documents, starts = np.repeat(np.array(begun, dtype=np.int64), config.times, axis=0).T
    given = random.integers(max(1, config.prompt_tokens // 4), config.prompt_tokens + 1, len(documents))
    given = np.minimum(given, split.offsets[documents + 1] - starts - 1).clip(1, longest - 1)
    found = []
    for author in range(authors):
        own = np.flatnonzero(fold[documents] == author)
        own = own[np.argsort(given[own], kind="stable")]
        for start in range(0, len(own), config.batch_size):
            part = own[start : start + config.batch_size]
            prompts = [np.asarray(split.tokens[at : at + n]) for at, n in zip(starts[part], given[part], strict=True)]
            found.append(_Batch(author, documents[part], prompts))
    return found


def _write(stage: Stage, corpus: Corpus, authors: list[str], config: WriteConfig, due: Due) -> dict[str, Any]:
    """Write the corpus, and return its facts."""
    dtype = stage.settled("dtype", dtype_name(parse_dtype(config.dtype, default_device())))
    part = Part(stage.path, "written", due)
    batches = _batches(corpus.split("train"), len(authors), _longest(corpus, config), config)
    texts = _written(stage, part, corpus, [partial(load_speaker, author, dtype) for author in authors], batches, config)
    fits = np.flatnonzero(_fitting(corpus, texts, batches))
    names = corpus.document_names("train")
    labels = [f"{names[d]} as a teacher went on" for batch in batches for d in batch.documents]
    documents = [*corpus.split("train").documents(), *(texts[n] for n in fits)]
    offsets = np.cumsum([0, *map(len, documents)]).astype(np.int64)
    save_tokens(stage, _TRAIN[0], int(offsets[-1]), documents)
    stage.save_array(_TRAIN[1], offsets)
    stage.save_text(_TRAIN[2], "".join(name + "\n" for name in [*names, *(labels[n] for n in fits)]))
    for start in ("validation.", "test.", "tokenizer/"):
        copy_payload(corpus.folder, corpus.manifest, stage.path, start)
    part.remove()
    facts = dict(corpus.manifest.facts)
    size = {"documents": len(documents), "tokens": int(offsets[-1]), "positions": int(offsets[-1]) - len(documents)}
    written = {"documents": len(fits), "tokens": int(sum(len(texts[n]) for n in fits))}
    written |= {"documents_left_out": len(texts) - len(fits), "teacher_dtype": dtype, **config.model_dump()}
    return facts | {"splits": facts["splits"] | {"train": size}, "written": written}


def _written(
    stage: Stage,
    part: Part,
    corpus: Corpus,
    authors: Sequence[Callable[[], PreTrainedModel]],
    batches: Sequence[_Batch],
    config: WriteConfig,
) -> list[NDArray[np.int32]]:
    """All that is written, batch by batch; what an earlier run wrote is kept in `part`."""
    end = special_id(corpus.tokenizer, corpus.config.end_token, "end_token")
    drawing = {"longest": _longest(corpus, config), "temperature": config.temperature, "top_p": config.top_p}
    done, kept = part.load()
    texts = [*np.split(kept["tokens"], kept["lengths"].cumsum()[:-1])] if done else []
    models: dict[int, PreTrainedModel] = {}

    def arrays() -> dict[str, NDArray[Any]]:
        return {"tokens": np.concatenate(texts), "lengths": np.array([len(text) for text in texts])}

    with progress_bar(sum(len(batch.prompts) for batch in batches), "writing", unit="doc", initial=len(texts)) as bar:
        for number, batch in enumerate(batches[done:], done):
            if batch.author not in models:
                models = {batch.author: authors[batch.author]()}  # one at a time
            model, seed = models[batch.author], config.seed + number
            texts += _go_on(model, batch.prompts, corpus.vocab_size, seed, end=end, **drawing)
            bar.update(len(batch.prompts))
            if part.offer(number + 1, arrays):
                stage.kept = f"{len(texts):,} written documents"
    return texts


def _fitting(corpus: Corpus, texts: list[NDArray[np.int32]], batches: Sequence[_Batch]) -> NDArray[np.bool_]:
    """`(written,)` whether anything was written, that shares no more with held-out documents than is allowed."""
    prompts = [len(prompt) for batch in batches for prompt in batch.prompts]
    fits = np.array([len(text) > given for text, given in zip(texts, prompts, strict=True)])
    if n := corpus.config.near_duplicate_ngram:
        held_out = (text for name in ("validation", "test") for text in corpus.split(name).documents())
        fits &= overlaps(texts, held_out, n) <= corpus.config.near_duplicate_overlap
    return fits


@torch.inference_mode()
def _go_on(
    model: PreTrainedModel,
    prompts: list[NDArray[np.int32]],
    vocab_size: int,
    seed: int,
    *,
    longest: int,
    end: int | None,
    **drawing: Any,
) -> list[NDArray[np.int32]]:
    """What the model makes of these beginnings, those included, to its end or to so many tokens.

    Texts that have ended would be run along with the others to the end of the longest. So they go on piece by piece,
    and what has not ended is read anew: with pieces that grow as texts do, that is about three texts' reading.

    Args:
        drawing: As `GenerationConfig` has it.

    Raises:
        ModelError: The model gives scores that are no numbers.
    """
    texts, device, able = [prompt.astype(np.int64) for prompt in prompts], device_of(model), abilities(model)
    padding = range(vocab_size, model.config.get_text_config(decoder=True).vocab_size)
    drawing |= {"eos_token_id": end, "pad_token_id": end or 0, "suppress_tokens": [*padding] or None}
    drawing |= {"do_sample": True, "top_k": 0, "use_cache": able.steps}
    left = [row for row, text in enumerate(texts) if len(text) < longest]

    def checked(said: Tensor, scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        if bool(scores.isnan().any()):  # of which nothing can be drawn
            raise ModelError(f"teacher {model.config.name_or_path} gives no finite scores")
        return scores

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        while left:
            alike = left if able.padding else [row for row in left if len(texts[row]) == len(texts[left[0]])]
            asked = _padded([texts[row] for row in alike], device)
            width = asked["input_ids"].shape[1]
            piece = min(max(_FIRST_PIECE, width // 2), longest - width)  # the model may have positions for no more
            how = GenerationConfig(max_new_tokens=piece, **drawing)
            said: Int[Tensor, "B N"] = model.generate(  # type: ignore[operator]
                **asked, generation_config=how, logits_processor=LogitsProcessorList([checked])
            )
            done = set()
            for row, new in zip(alike, said[:, width:].cpu().numpy(), strict=True):
                ends = np.flatnonzero(new == end) if end is not None else []
                texts[row] = np.concatenate([texts[row], new[: ends[0] + 1] if len(ends) else new])
                if len(ends) or len(texts[row]) == longest:
                    done.add(row)
            left = [row for row in left if row not in done]
    return [text.astype(np.int32) for text in texts]


def _padded(texts: list[NDArray[np.int64]], device: torch.device) -> dict[str, Int[Tensor, "B N"]]:
    """Texts side by side, padded in front, as models take them."""
    width = max(map(len, texts))
    tokens, mask = (torch.zeros((len(texts), width), dtype=torch.long) for _ in range(2))
    for row, text in enumerate(texts):
        tokens[row, width - len(text) :] = torch.from_numpy(text)
        mask[row, width - len(text) :] = 1
    return {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}
