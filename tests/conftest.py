"""Tiny models, a tiny tokenizer and a tiny corpus, made here; no test needs the network unless marked `assets`."""

import copy
import gc
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from families import family_config, family_model
from preloaded import preloaded_program
from tiny_tokenizers import byte_level
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

if TYPE_CHECKING:  # pytest imports this file before the hook that checks shapes is in place
    from memories import Make

    from memlm import MixedLM

WORDS = [
    *"the memory reads a corpus and votes on every next token while the frozen base keeps its weights".split(),
    *"so nothing is lost doctors say that asthma makes breathing hard and inhalers help patients agree".split(),
    *"to terms of this contract hereby".split(),
]


def sentences(count: int, seed: int) -> list[str]:
    """Random documents with enough repetition for neighbours to mean something."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 60))) + "." for _ in range(count)]


def pytest_configure() -> None:
    """Folders of tests are in memory where there is room: stages wait for the disk at each of their steps."""
    memory = Path("/dev/shm")
    if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2**30:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))


@pytest.fixture(autouse=True)
def _own_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Scores and fetched models of tests stay out of the user's cache (tests marked `assets` may use it)."""
    if "assets" not in request.keywords:
        monkeypatch.setenv("MEMLM_HOME", str(tmp_path_factory.getbasetemp() / "memlm-home"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no process is left with one alone at the end; a file stays together,
    for what its tests share is made once. Of a grid of cases those that are left out belong to the table."""
    seen: dict[tuple[str, str], list[Any]] = {}  # test and parameter to its values, in order
    for item in items:
        if (grid := item.get_closest_marker("grid")) is not None:
            numbers = []
            for name, value in item.callspec.params.items():  # type: ignore[attr-defined]
                values = seen.setdefault((item.nodeid.partition("[")[0], name), [])
                if not any(value is other for other in values):
                    values.append(value)
                numbers.append(next(number for number, other in enumerate(values) if other is value))
            if sum(numbers) % grid.args[0]:
                item.add_marker("table")
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def _short_collections() -> None:
    """Garbage is looked for among what a file's tests make: each training collects it, a third of a second in all that
    was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The command line as a program that starts at once."""
    folder = tmp_path_factory.mktemp("bin")
    with preloaded_program(folder):
        yield folder / "memlm"


@pytest.fixture
def python(program: Path) -> str:
    """A Python that has imported the library and starts at once."""
    return str(program.with_name("python"))


@pytest.fixture(autouse=True)
def _quick_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is: no line of progress comes between what tests look at."""
    monkeypatch.setattr("memlm.progress.LINE_SECONDS", 3600.0)


@pytest.fixture(autouse=True)
def _nothing_validated(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What an evaluation of another test left in the datastore that tests share."""
    from memlm.manifest import VALIDATED

    for path in tmp_path_factory.getbasetemp().glob(f"stages*/*/{VALIDATED}"):
        path.unlink()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 320 tokens, with BOS, EOS and padding."""
    return byte_level(sentences(200, seed=1))


TINY = {"layers": 2, "positions": 256, "tied": True, "deviation": 0.2}


def tiny_config(vocab_size: int, **sizes: Any) -> PreTrainedConfig:
    """The small Llama with which stages are run."""
    return family_config("llama", vocab_size, **{**TINY, **sizes})


def tiny_model(vocab_size: int, *, seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """Of `tiny_config`, random, in float32, in evaluation mode."""
    return family_model("llama", vocab_size, seed=seed, **{**TINY, **sizes})


def save_model(folder: Path, tokenizer: PreTrainedTokenizerBase, *, padding: int = 0, **sizes: Any) -> str:
    """Save a tiny model of that tokenizer in `folder`, its output layer padded by some rows; returns the folder."""
    tiny_model(len(tokenizer) + padding, **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def model_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved tiny model with the tiny tokenizer; its output layer is padded by 8 rows."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny", tokenizer, padding=8)


def save_stranger(folder: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """Save the config of a model, no weights, and a tokenizer with one more token; returns the folder."""
    tiny_config(len(tokenizer) + 8).save_pretrained(folder)
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens(["asthmatic"])
    changed.save_pretrained(folder)
    return str(folder)


def make_corpus(documents: str, model: str, out: Path, **settings: Any) -> Path:
    """Write a corpus of blocks of 32 tokens; returns its folder."""
    from memlm.corpus.build import build_corpus
    from memlm.corpus.config import CorpusConfig

    split = {"document_separator": "\n\n", "block_size": 32, "validation_fraction": 0.15, "test_fraction": 0.15}
    build_corpus([documents], tokenizer=model, out=out, config=CorpusConfig.parse({**split, **settings}))
    return out


def forbid_models(patch: pytest.MonkeyPatch) -> None:
    """From now on weights fail the test, loaded or drawn; a model on the meta device has none."""
    from_config = AutoModelForCausalLM.from_config

    def only_meta(*args: Any, **kwargs: Any) -> Any:
        assert torch.get_default_device().type == "meta", "a model was loaded or made"
        return from_config(*args, **kwargs)

    patch.setattr(AutoModelForCausalLM, "from_pretrained", only_meta)
    patch.setattr(AutoModelForCausalLM, "from_config", only_meta)


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test in which no model may be loaded or made."""
    forbid_models(monkeypatch)


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text file of 80 documents separated by blank lines."""
    path = tmp_path_factory.mktemp("documents") / "documents.txt"
    path.write_text("\n\n".join(sentences(80, seed=2)) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def corpus_folder(documents: str, model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of those documents."""
    return make_corpus(documents, model_folder, tmp_path_factory.mktemp("stages") / "corpus")


@pytest.fixture(scope="session")
def datastore_folder(corpus_folder: Path, model_folder: str) -> Path:
    """An exact datastore of that corpus."""
    from memlm.datastore.build import build_datastore
    from memlm.datastore.config import DatastoreConfig

    out = corpus_folder.parent / "datastore"
    build_datastore(
        corpus_folder, teacher=model_folder, out=out, config=DatastoreConfig(dtype="float32", shard_positions=300)
    )
    return out


@pytest.fixture(scope="session")
def targets_folder(datastore_folder: Path) -> Path:
    """Targets of that datastore."""
    from memlm.targets.build import build_targets
    from memlm.targets.config import TargetsConfig

    out = datastore_folder.parent / "targets"
    build_targets(datastore_folder, out=out, config=TargetsConfig(k=16, target_temperature=4.0))
    return out


@pytest.fixture(scope="session")
def memory_folder(targets_folder: Path, model_folder: str) -> Path:
    """A memory trained for some steps on those targets."""
    from memlm.train.config import TrainConfig
    from memlm.train.run import train_memory

    out = targets_folder.parent / "memory"
    train_memory(
        targets_folder, init=model_folder, out=out, config=TrainConfig(epochs=1, batch_size=4, dtype="float32")
    )
    return out


@pytest.fixture(scope="session")
def mlp_folder(targets_folder: Path, model_folder: str) -> Path:
    """An MLP memory trained for an epoch beside the tiny model."""
    from memlm.train.config import TrainConfig
    from memlm.train.run import train_memory

    out = targets_folder.parent / "mlp"
    config = TrainConfig(kind="mlp", layers=1, epochs=1, batch_size=4, dtype="float32", learning_rate=1e-3)
    train_memory(targets_folder, base=model_folder, out=out, config=config)
    return out


@pytest.fixture(scope="session")
def other_base(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base of the same tokenizer and size that did not make the datastore."""
    return save_model(tmp_path_factory.mktemp("models") / "other-base", tokenizer, padding=8, seed=5)


@pytest.fixture(scope="session")
def nan_base(model_folder: str, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model, but for one weight that is NaN."""
    from transformers import AutoModelForCausalLM

    out = tmp_path_factory.mktemp("models") / "nan-base"
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return str(out)


@pytest.fixture
def places(memory_folder: Path, mlp_folder: Path, datastore_folder: Path) -> dict[str, Path]:
    return {"law": memory_folder, "mlp": mlp_folder, "facts": datastore_folder}


@pytest.fixture
def make(places: dict[str, Path], model_folder: str) -> "Make":
    """A mixture of some of the three memories that never ends its text by itself."""
    from memories import ALL, WEIGHTS

    from memlm import MixedLM

    def mixture(weights: dict[str, float] = WEIGHTS, base: str = model_folder, **options: Any) -> "MixedLM":
        memories = {name: places[name] for name in weights}
        model = MixedLM.from_pretrained(
            base, memory=memories, mix_weight=weights, memory_kwargs={"retrieval": ALL}, **options
        )
        model.generation_config.eos_token_id = None
        return model

    return mixture


@pytest.fixture(params=["reads the base", pytest.param("runs its teacher", marks=pytest.mark.slow)])
def trio(request: pytest.FixtureRequest, make: "Make", other_base: str) -> "MixedLM":
    """All three memories, the retriever reading the base's activations or running the datastore's teacher."""
    from memlm.memory.retrieval import RetrievalMemory

    own = request.param == "runs its teacher"
    model = make(base=other_base) if own else make()
    facts = model.named_memories()["facts"]
    assert isinstance(facts, RetrievalMemory)
    assert (facts.tap is None, facts.teacher is not None) == (own, own)
    return model
