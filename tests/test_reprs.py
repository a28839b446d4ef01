"""What is printed where somebody looks at an object is one short line."""

from pathlib import Path

from memories import WEIGHTS, Make

from memlm import Corpus, Datastore


def test_a_mixture_shows_its_base_and_weights(make: Make, model_folder: str) -> None:
    law, mlp, facts = WEIGHTS.values()
    memories = f"{law} law (MemoryDecoder) + {mlp} mlp (MLPMemory) + {facts} facts (RetrievalMemory)"
    assert repr(make()) == f"MixedLM(LlamaForCausalLM {model_folder} + {memories}, 320 tokens)"


def test_folders_show_what_they_hold(corpus_folder: Path, datastore_folder: Path, model_folder: str) -> None:
    corpus, store = Corpus(corpus_folder), Datastore(datastore_folder)
    tokens = ", ".join(f"{split.tokens:,} {name}" for name, split in corpus.facts.splits.items())
    assert repr(corpus) == f"Corpus({corpus_folder}: {tokens} tokens)"
    assert repr(store) == f"Datastore({datastore_folder}: {store.n_entries:,} entries, exact, teacher {model_folder})"
    assert repr(store.manifest).startswith(f"Manifest(datastore {store.manifest.hash[:12]}, ")
    assert len(repr(store.manifest)) < 80
