"""Tiny models, a tiny tokenizer and a tiny corpus, made here; no test needs the network unless marked `assets`."""

import os
import random
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

WORDS = [
    *"the memory reads a corpus and votes on every next token while the frozen base keeps its weights".split(),
    *"so nothing is lost doctors say that asthma makes breathing hard and inhalers help patients agree".split(),
    *"to terms of this contract hereby".split(),
]


def sentences(count: int, seed: int) -> list[str]:
    """Random documents with enough repetition for neighbours to mean something."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 60))) + "." for _ in range(count)]


@pytest.fixture(autouse=True)
def _own_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Scores and fetched models of tests stay out of the user's cache (tests marked `assets` may use it)."""
    if "assets" not in request.keywords:
        monkeypatch.setenv("MEMLM_HOME", str(tmp_path_factory.getbasetemp() / "memlm-home"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 320 tokens, with BOS, EOS and padding."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(sentences(200, seed=1), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def tiny_config(vocab_size: int, layers: int = 2, width: int = 32) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab_size,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def tiny_model(vocab_size: int, *, seed: int = 0, layers: int = 2, width: int = 32) -> PreTrainedModel:
    """A random Llama in float32, in evaluation mode."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(vocab_size, layers, width), dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def model_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved tiny model with the tiny tokenizer; its output layer is padded by 8 rows."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model(len(tokenizer) + 8).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text file of 80 documents separated by blank lines."""
    path = tmp_path_factory.mktemp("documents") / "documents.txt"
    path.write_text("\n\n".join(sentences(80, seed=2)) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def corpus_folder(documents: str, model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of blocks of 32 tokens."""
    from memlm.corpus.build import build_corpus
    from memlm.corpus.config import CorpusConfig

    out = tmp_path_factory.mktemp("stages") / "corpus"
    config = CorpusConfig(document_separator="\n\n", block_size=32, validation_fraction=0.15, test_fraction=0.15)
    build_corpus([documents], tokenizer=model_folder, out=out, config=config)
    return out


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
