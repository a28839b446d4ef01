"""What steps will read, take and leave on disk: rough figures, from configs and the sizes of documents."""

import math
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from memlm.corpus.blocks import Corpus
from memlm.corpus.config import SPLITS, CorpusConfig
from memlm.corpus.readers import find_sources
from memlm.datastore.config import DatastoreConfig
from memlm.datastore.index import nlist_in_force
from memlm.memory.loading import memory_class, read_settings
from memlm.models.layers import model_size
from memlm.models.loading import (
    WEIGHTS_FILE,
    default_device,
    find_file,
    load_config,
    parse_dtype,
    resolve,
    tensor_shapes,
)
from memlm.runs.recipe import Recipe
from memlm.train.config import TrainConfig

_CHARACTERS = 4  # of a token, in English
_TOKENISED = 200_000  # tokens a second
_MODEL_SHARE = 0.3  # of a matrix product's rate that a model's passes reach; 0.25 to 0.4 with SmolLM2 on two cores
_ENTRY_BYTES = 60  # of a tokenizer's files, an entry of the vocabulary
_WRITING = 10  # times what a pass takes for a token; plans 44 a second of SmolLM2 where 55 to 59 were written
_REPORT_BYTES = 60_000
_LIBRARIES = 600_000_000  # bytes of a process that has loaded torch and transformers


class Cost(NamedTuple):
    """Of one step; None where the size of its documents is unknown."""

    tokens: int | None = None
    """Tokens read: in all epochs of training, in both splits of an evaluation."""
    seconds: float | None = None
    bytes: int | None = None
    """Left on disk at the end; checkpoints of training come and go beside it."""
    memory: int | None = None
    """Bytes held at most, on the CPU in float32; on an accelerator less by half, the libraries' beside it."""
    operations: float | None = None
    """Floating-point operations of models."""


def step_costs(
    recipe: Recipe,
    base: str,
    corpus: Path | None,
    trained: Mapping[str, tuple[str, TrainConfig]] | None = None,
) -> dict[str, Cost]:
    """Step name to its cost, evaluations included.

    Args:
        recipe: What is to run.
        base: Model that the memory stands beside.
        corpus: The corpus folder, where it is there.
        trained: Step name to the section that it follows and its settings; the memory and its twin if None.
    """
    places, configs = recipe.places, recipe.configs
    documents, splits = corpus_tokens(configs["corpus"], recipe.documents, corpus, recipe.given)
    if splits is None:
        return {}
    train, validation, held = splits["train"], splits["validation"], splits["validation"] + splits["test"]
    teacher = recipe.speaker or places.get("teacher", {}).get("init") or base
    width = load_config(teacher).get_text_config().hidden_size
    vocabulary = load_config(base).get_text_config().vocab_size
    rate, search = _MODEL_SHARE * product_rate(), datastore_bytes(configs["datastore"], train, width)

    def passing(parameters: int, tokens: float) -> float:
        return 2 * parameters * tokens

    def cost(
        tokens: int, operations: float, disk: int, held: int, batch: int, parameters: int, trains: bool = False
    ) -> Cost:
        kept = batch * _activations(parameters, width) * (1 if trains else 0.2)
        return Cost(tokens, operations / rate, disk, int(_LIBRARIES + held + kept), operations)

    times = configs["write"].times if "write" in configs else 0

    def training(config: TrainConfig, size: int, read_beside: int = 0, written: int = 0) -> Cost:
        batch = config.batch_size * configs["corpus"].block_size
        step = batch * config.accumulation
        read = (1 + written) * (train if config.fold is None else train * (1 - 1 / config.fold[1]))
        tokens = config.max_steps * step if config.max_steps else int(config.epochs * read)
        operations = (
            3 * passing(size, tokens) + passing(size, config.epochs * validation) + passing(read_beside, tokens)
        )
        disk, held = 4 * size + _ENTRY_BYTES * vocabulary, 16 * size + 4 * beside  # weights, gradients, two moments
        return cost(tokens, operations, disk, held, batch, size, trains=True)

    corpus_bytes, teacher_size = 4 * sum(splits.values()) + _ENTRY_BYTES * vocabulary, model_size(teacher)
    reading, batch, beside = passing(teacher_size, train), configs["datastore"].batch_tokens, model_size(base)
    target_bytes = train * _target_bytes(configs["targets"].k) + _ENTRY_BYTES * vocabulary
    costs = {
        "corpus": Cost(documents, documents / _TOKENISED, corpus_bytes, _LIBRARIES, 0.0),
        "datastore": cost(train, reading, corpus_bytes + search, 4 * teacher_size + search, batch, teacher_size),
        "targets": cost(train, reading, target_bytes, search, 0, 0),  # a search is about a pass
    }
    if times:
        costs["written"] = cost(times * train, times * reading, corpus_bytes, 4 * teacher_size, batch, teacher_size)
        costs["written"] = costs["written"]._replace(seconds=_WRITING * times * reading / rate)
    if recipe.speaks_alone:
        said = (1 + times) * train
        target_bytes = said * (8 + 6 * configs["targets"].max_support) + _ENTRY_BYTES * vocabulary
        weights = 4 * teacher_size * max(1, len(recipe.fold_teachers))
        costs["targets"] = cost(said, (1 + times) * reading, target_bytes, weights, batch, teacher_size)
    if "teacher" in configs:
        start = places["teacher"]["init"]
        costs["teacher"] = training(configs["teacher"], memory_size(configs["teacher"], start, start))
        for name, config in recipe.fold_teachers.items():
            costs[name] = training(config, memory_size(config, start, start))
    if trained is None:
        pairs = (("memory", "train"), ("twin", "twin"))
        trained = {name: (section, configs[section]) for name, section in pairs if section in configs}

    def judging(size: int, tokens: int) -> Cost:
        whole = beside + size
        return cost(tokens, passing(whole, tokens), _REPORT_BYTES, 4 * whole, 4096, whole)

    for name, (section, config) in trained.items():
        given = {"init": base} if section in ("dapt", "lora") else places["mlp" if section == "mlp" else "train"]
        size = memory_size(config, given.get("init"), base)
        online = memory_class(config.start.kind).reads_base and "activations" not in given
        costs[name] = training(config, size, beside if online else 0, times if section in ("train", "mlp") else 0)
        costs[f"evaluation-{name}"] = judging(size, held)
    searched = passing(beside, 2 * held)
    costs["evaluation-retrieval"] = judging(0, held)._replace(operations=searched, seconds=searched / rate)
    return costs


def _activations(parameters: int, width: int) -> float:
    """Bytes a token that a backward pass finds kept, in float32: about 34 values a layer of 12 width^2 weights."""
    return 2 * 34 / 12 * parameters / width


def corpus_tokens(
    config: CorpusConfig,
    documents: list[str],
    corpus: Path | None,
    given: Mapping[str, list[str]] | None = None,
) -> tuple[int, dict[str, int] | None]:
    """Tokens of all documents, and of each split: counted where the folder is there, else guessed from sizes."""
    if corpus is not None:
        splits = {name: split["tokens"] for name, split in Corpus(corpus).manifest.facts["splits"].items()}
        return sum(splits.values()), splits
    given = {split: places for split, places in (given or {}).items() if places}
    sizes = {split: _tokens_in(places) for split, places in (("", documents), *given.items())}
    total = None if None in sizes.values() else sum(size for size in sizes.values() if size is not None)
    if total is None and config.max_tokens is None:
        return 0, None
    shares = {"validation": config.validation_fraction, "test": config.test_fraction} | dict.fromkeys(given, 0.0)
    shares["train"] = 1 - sum(shares.values())
    splits = {}
    for name in SPLITS:
        whole = sizes[name] if name in given else None if (rest := sizes[""]) is None else int(shares[name] * rest)
        splits[name] = min((size for size in (config.budget(name), whole) if size is not None), default=0)
    return total if total is not None else sum(splits.values()), splits


def _tokens_in(documents: list[str]) -> int | None:
    """About how many tokens files hold; None where the size of one is unknown."""
    files = [Path(source) for source in find_sources(documents)]
    return sum(file.stat().st_size for file in files) // _CHARACTERS if all(f.is_file() for f in files) else None


def datastore_bytes(config: DatastoreConfig, entries: int, width: int) -> int:
    """Keys, values and index of a datastore (docs/performance.md)."""
    kind = config.index_kind(entries)
    keys = 2 * width if config.keep_keys else 0
    index = {"exact": 0, "ivf-flat": 8, "ivf-pq": config.code_bytes + 8}[kind]
    centroids = 0 if kind == "exact" else 4 * width * (config.nlist or nlist_in_force(entries, config))
    return entries * (keys + 4 + index) + centroids


def _target_bytes(k: int) -> int:
    """Of a position: six bytes each for the different tokens among k neighbours, of which 1,024 have about 189."""
    return 8 + int(6 * min(k, 5.9 * k**0.5))


def memory_size(config: TrainConfig, init: str | None, base: str) -> int:
    """Parameters of the memory that training starts with: by its kind, or by the weights of a memory to go on with."""
    if init is not None and read_settings(init) is not None and not config.start.given():
        weights = find_file(resolve(init), WEIGHTS_FILE)
        if weights is not None:
            return sum(math.prod(shape) for shape in tensor_shapes(weights).values())
    return memory_class(config.start.kind).size(config.start, init=init, base=load_config(base))


@cache
def product_rate(seconds: float = 0.2) -> float:
    """Floating-point operations a second in the fastest of some matrix products, in the precision used here."""
    device = default_device()
    a, b = (torch.ones(n, 1024, dtype=parse_dtype("auto", device), device=device) for n in (512, 1024))
    end, fastest = time.perf_counter() + seconds, math.inf
    while (began := time.perf_counter()) < end:
        (a @ b)[0, 0].item()  # waits for the device
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * 512 * 1024 * 1024 / fastest
