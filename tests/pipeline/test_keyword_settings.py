"""Every stage takes its settings as `config` or as keywords, and refuses both at once and what it does not know."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import save_model, sentences
from tiny_tokenizers import sentencepiece_like

import memlm
from memlm.config import StageConfig
from memlm.manifest import read_manifest


class Folders(NamedTuple):
    """What stages read."""

    documents: str
    model: str
    corpus: Path
    datastore: Path
    targets: Path
    memory: Path
    other_model: str


@pytest.fixture(scope="module")
def folders(
    documents: str,
    model_folder: str,
    corpus_folder: Path,
    datastore_folder: Path,
    targets_folder: Path,
    memory_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Folders:
    other = save_model(tmp_path_factory.mktemp("other") / "model", sentencepiece_like(sentences(100, seed=3)))
    return Folders(documents, model_folder, corpus_folder, datastore_folder, targets_folder, memory_folder, other)


Call = Callable[..., Any]
STAGES: dict[str, tuple[type[StageConfig], Call, dict[str, Any]]] = {
    "corpus": (
        memlm.CorpusConfig,
        lambda f, out, **s: memlm.build_corpus([f.documents], tokenizer=f.model, out=out, **s),
        {"document_separator": "\n\n", "block_size": 24},
    ),
    "datastore": (
        memlm.DatastoreConfig,
        lambda f, out, **s: memlm.build_datastore(f.corpus, teacher=f.model, out=out, **s),
        {"dtype": "float32", "shard_positions": 500},
    ),
    "targets": (memlm.TargetsConfig, lambda f, out, **s: memlm.build_targets(f.datastore, out=out, **s), {"k": 5}),
    "train": (
        memlm.TrainConfig,
        lambda f, out, **s: memlm.train_memory(f.targets, init=f.model, out=out, **s),
        {"max_steps": 1, "layers": 1, "dtype": "float32"},
    ),
    "adapt": (
        memlm.AdaptConfig,
        lambda f, out, **s: memlm.adapt_memory(f.memory, tokenizer=f.other_model, out=out, **s),
        {"rows": "random"},
    ),
    "evaluate": (
        memlm.EvaluateConfig,
        lambda f, out, **s: memlm.evaluate_perplexity(f.corpus, base=f.model, memory=str(f.memory), out=out, **s),
        {"bootstrap": 0, "dtype": "float32"},
    ),
}


UNRECORDED = {"max_document_characters", "shared_documents"}
"""What decides nothing of what a folder holds, the latter where it is not asked for."""
BESIDE = {"gate"}
"""Settings of another class."""


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_keywords_are_settings(stage: str, folders: Folders, tmp_path: Path) -> None:
    """The folder records them, and the same settings as `config` find it finished."""
    cls, call, settings = STAGES[stage]
    made = call(folders, tmp_path / "out", **settings)
    asked, default = (config.model_dump(exclude=UNRECORDED) for config in (cls.parse(settings), cls()))
    recorded = {name: v for name, v in read_manifest(tmp_path / "out").config.items() if name not in BESIDE}
    assert recorded == asked != default
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert call(folders, tmp_path / "out", config=cls.parse(settings)) == made
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == written


@pytest.mark.parametrize("stage", STAGES)
def test_config_and_keywords_together_are_refused(stage: str, folders: Folders, tmp_path: Path) -> None:
    cls, call, settings = STAGES[stage]
    with pytest.raises(
        memlm.ConfigError, match=f"^{next(iter(settings))}: give settings as keywords or as config"
    ) as e:
        call(folders, tmp_path / "out", config=cls(), **settings)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_an_unknown_keyword_is_refused_and_the_nearest_is_named(stage: str, folders: Folders, tmp_path: Path) -> None:
    cls, call, _ = STAGES[stage]
    name = max(cls.options(), key=len)
    with pytest.raises(memlm.ConfigError, match=f"^unknown setting '{name}s'; did you mean '{name}'\\?$"):
        call(folders, tmp_path / "out", **{f"{name}s": 1})
    assert not (tmp_path / "out").exists()
