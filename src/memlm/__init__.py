"""Retriever-pretrained memories that plug into any frozen language model.

Names are imported when they are first used, so `import memlm` is light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memlm.corpus.blocks import Corpus as Corpus
    from memlm.corpus.build import build_corpus as build_corpus
    from memlm.datastore.build import build_datastore as build_datastore
    from memlm.datastore.store import Datastore as Datastore
    from memlm.evaluate.perplexity import evaluate_perplexity as evaluate_perplexity
    from memlm.memory.adapt import adapt_memory as adapt_memory
    from memlm.memory.card import push_to_hub as push_to_hub
    from memlm.memory.decoder import MemoryDecoder as MemoryDecoder
    from memlm.memory.loading import load_memory as load_memory
    from memlm.memory.released import convert_released as convert_released
    from memlm.mix.explain import explain as explain
    from memlm.mix.mixed_lm import MixedLM as MixedLM
    from memlm.targets.build import build_targets as build_targets
    from memlm.train.run import train_memory as train_memory

__version__ = "0.1.0"

_HOMES = {
    "Corpus": "corpus.blocks",
    "build_corpus": "corpus.build",
    "Datastore": "datastore.store",
    "build_datastore": "datastore.build",
    "evaluate_perplexity": "evaluate.perplexity",
    "adapt_memory": "memory.adapt",
    "push_to_hub": "memory.card",
    "MemoryDecoder": "memory.decoder",
    "load_memory": "memory.loading",
    "convert_released": "memory.released",
    "explain": "mix.explain",
    "MixedLM": "mix.mixed_lm",
    "build_targets": "targets.build",
    "train_memory": "train.run",
}
__all__ = [
    "Corpus",
    "Datastore",
    "MemoryDecoder",
    "MixedLM",
    "__version__",
    "adapt_memory",
    "build_corpus",
    "build_datastore",
    "build_targets",
    "convert_released",
    "evaluate_perplexity",
    "explain",
    "load_memory",
    "push_to_hub",
    "train_memory",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'memlm' has no attribute {name!r}")
    return getattr(import_module(f"memlm.{_HOMES[name]}"), name)
