"""A stage's plan tells which folder it would make, without making it."""

from pathlib import Path

from memlm.corpus.build import plan_corpus
from memlm.corpus.config import CorpusConfig
from memlm.datastore.build import plan_datastore
from memlm.datastore.config import DatastoreConfig
from memlm.manifest import read_manifest
from memlm.targets.build import plan_targets
from memlm.targets.config import TargetsConfig
from memlm.train.config import TrainConfig
from memlm.train.run import plan_memory


def test_a_plan_has_the_identity_of_the_folder_that_it_would_make(
    corpus_folder: Path,
    datastore_folder: Path,
    targets_folder: Path,
    memory_folder: Path,
    model_folder: str,
    documents: str,
) -> None:
    split = CorpusConfig(document_separator="\n\n", block_size=32, validation_fraction=0.15, test_fraction=0.15)
    plans = {
        corpus_folder: plan_corpus([documents], tokenizer=model_folder, config=split),
        datastore_folder: plan_datastore(
            corpus_folder, teacher=model_folder, config=DatastoreConfig(dtype="float32", shard_positions=300)
        ),
        targets_folder: plan_targets(datastore_folder, config=TargetsConfig(k=16, target_temperature=4.0)),
        memory_folder: plan_memory(
            targets_folder, init=model_folder, config=TrainConfig(epochs=1, batch_size=4, dtype="float32")
        ),
    }
    for folder, plan in plans.items():
        assert plan.spec.identity == read_manifest(folder).identity
        assert plan.spec.sources == read_manifest(folder).sources
