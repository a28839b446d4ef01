"""A corpus with what teachers wrote: they go on from the beginnings of its documents, those of folds of unread ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from memlm.config import settings_from
from memlm.corpus.blocks import Corpus, Split
from memlm.corpus.build import save_tokens, special_id
from memlm.corpus.near_duplicates import overlaps
from memlm.errors import ConfigError, ModelError
from memlm.files import digest
from memlm.manifest import Manifest, copy_payload
from memlm.models.loading import default_device, device_of, dtype_name, load_config, longest_context, parse_dtype
from memlm.parts import KEEP_SECONDS, Due, Part
from memlm.progress import progress_bar
from memlm.stage import Plan, Stage, StageSpec, run_stage
from memlm.targets.config import WriteConfig
from memlm.targets.speakers import load_speaker, named_speakers

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
    """Write a corpus to `out`: the training documents of `corpus`, and what teachers made of their beginnings.

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
        ConfigError: Neither or both are given, teachers of folds do not fit together, or one has no positions for
            documents so long.
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
    nobody = "who is to write? give --teacher, or a --fold-teacher for each fold"
    authors = named_speakers(source, teacher, fold_teachers, nobody)
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
    """Which documents' beginnings are given."""
    prompts: list[NDArray[np.int32]]


def _batches(split: Split, authors: int, longest: int, config: WriteConfig) -> list[_Batch]:
    """All that is to be written, prompts of a length side by side."""
    random = np.random.default_rng(config.seed)
    fold = split.folds(authors) if authors > 1 else np.zeros(split.n_documents, np.int64)
    documents = np.repeat(np.arange(split.n_documents), config.times)
    given = random.integers(max(1, config.prompt_tokens // 4), config.prompt_tokens + 1, len(documents))
    given = np.minimum(given, np.diff(split.offsets)[documents] - 1).clip(max=longest - 1)
    found = []
    for author in range(authors):
        own = np.flatnonzero(fold[documents] == author)
        own = own[np.argsort(given[own], kind="stable")]
        for start in range(0, len(own), config.batch_size):
            part = own[start : start + config.batch_size]
            starts = split.offsets[documents[part]]
            prompts = [np.asarray(split.tokens[at : at + n]) for at, n in zip(starts, given[part], strict=True)]
            found.append(_Batch(author, documents[part], prompts))
    return found


def _write(stage: Stage, corpus: Corpus, authors: list[str], config: WriteConfig, due: Due) -> dict[str, Any]:
    """Write the corpus, and return its facts."""
    split, longest = corpus.split("train"), _longest(corpus, config)
    end = special_id(corpus.tokenizer, corpus.config.end_token, "end_token")
    dtype = stage.settled("dtype", dtype_name(parse_dtype(config.dtype, default_device())))
    batches, part = _batches(split, len(authors), longest, config), Part(stage.path, "written", due)
    done, kept = part.load()
    texts = [*np.split(kept["tokens"], kept["lengths"].cumsum()[:-1])] if done else []
    models: dict[int, PreTrainedModel] = {}

    def arrays() -> dict[str, NDArray[Any]]:
        return {"tokens": np.concatenate(texts), "lengths": np.array([len(text) for text in texts])}

    with progress_bar(sum(len(batch.prompts) for batch in batches), "writing", unit="doc", initial=len(texts)) as bar:
        for number, batch in enumerate(batches[done:], done):
            if batch.author not in models:
                models = {batch.author: load_speaker(authors[batch.author], dtype)}  # one at a time
            drawing = {"temperature": config.temperature, "top_p": config.top_p, "max_length": longest}
            ids = {"eos_token_id": end, "pad_token_id": end or 0}
            texts += _go_on(
                models[batch.author], batch.prompts, corpus.vocab_size, config.seed + number, **drawing, **ids
            )
            bar.update(len(batch.prompts))
            if part.offer(number + 1, arrays):
                stage.kept = f"{len(texts):,} written documents"
    names = corpus.document_names("train")
    labels = [f"{names[d]} as a teacher went on" for batch in batches for d in batch.documents]
    kept_texts = [n for n, fits in enumerate(_fitting(corpus, texts, batches)) if fits]
    everything = [*split.documents(), *(texts[n] for n in kept_texts)]
    offsets = np.cumsum([0, *map(len, everything)]).astype(np.int64)
    save_tokens(stage, _TRAIN[0], int(offsets[-1]), everything)
    stage.save_array(_TRAIN[1], offsets)
    stage.save_text(_TRAIN[2], "".join(name + "\n" for name in [*names, *(labels[n] for n in kept_texts)]))
    for start in ("validation.", "test.", "tokenizer/"):
        copy_payload(corpus.folder, corpus.manifest, stage.path, start)
    part.remove()
    facts = dict(corpus.manifest.facts)
    size = {"documents": len(everything), "tokens": int(offsets[-1]), "positions": int(offsets[-1]) - len(everything)}
    written = {"documents": len(kept_texts), "tokens": int(sum(len(texts[n]) for n in kept_texts))}
    written |= {"documents_left_out": len(texts) - len(kept_texts), "teacher_dtype": dtype, **config.model_dump()}
    return facts | {"splits": facts["splits"] | {"train": size}, "written": written}


def _fitting(corpus: Corpus, texts: list[NDArray[np.int32]], batches: list[_Batch]) -> NDArray[np.bool_]:
    """`(written,)` whether anything was written, that shares no more with held-out documents than is allowed."""
    prompts = [len(prompt) for batch in batches for prompt in batch.prompts]
    fits = np.array([len(text) > given for text, given in zip(texts, prompts, strict=True)])
    if n := corpus.config.near_duplicate_ngram:
        held_out = (text for name in ("validation", "test") for text in corpus.split(name).documents())
        fits &= overlaps(texts, held_out, n) <= corpus.config.near_duplicate_overlap
    return fits


@torch.inference_mode()
def _go_on(
    model: PreTrainedModel, prompts: list[NDArray[np.int32]], vocab_size: int, seed: int, **drawing: Any
) -> list[NDArray[np.int32]]:
    """What the model makes of these beginnings, those included; `drawing` as `GenerationConfig` has it.

    Raises:
        ModelError: It gives scores that are no numbers.
    """
    width, device = max(map(len, prompts)), device_of(model)
    tokens, mask = (torch.zeros((len(prompts), width), dtype=torch.long) for _ in range(2))
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, width - len(prompt) :] = 1
    padding = range(vocab_size, model.config.get_text_config(decoder=True).vocab_size)
    how = GenerationConfig(do_sample=True, top_k=0, suppress_tokens=[*padding] or None, **drawing)
    asked = {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}
    if bool(model(**asked, use_cache=False).logits[:, -1].isnan().any()):  # of which nothing can be drawn
        raise ModelError(f"teacher {model.config.name_or_path} gives no finite scores")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        said: Int[Tensor, "B N"] = model.generate(**asked, generation_config=how)  # type: ignore[operator]
    found, end = [], how.eos_token_id
    for row, prompt in zip(said.cpu().numpy().astype(np.int32), prompts, strict=True):
        text, after = row[width - len(prompt) :], len(prompt)
        ends = np.flatnonzero(text[after:] == end) if end is not None else []
        found.append(text[: after + ends[0] + 1] if len(ends) else text)
    return found
