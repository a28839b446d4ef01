"""Retriever-pretrained memories that plug into any frozen language model.

Names are imported when they are first used, so `import memlm` is light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from memlm.registration import register_with_transformers

if TYPE_CHECKING:
    from memlm.corpus.blocks import Corpus as Corpus
    from memlm.corpus.build import build_corpus as build_corpus
    from memlm.corpus.config import CorpusConfig as CorpusConfig
    from memlm.datastore.build import build_datastore as build_datastore
    from memlm.datastore.config import DatastoreConfig as DatastoreConfig
    from memlm.datastore.store import Datastore as Datastore
    from memlm.errors import ArtifactError as ArtifactError
    from memlm.errors import ConfigError as ConfigError
    from memlm.errors import InputError as InputError
    from memlm.errors import MemlmError as MemlmError
    from memlm.errors import ModelError as ModelError
    from memlm.errors import OutputBusyError as OutputBusyError
    from memlm.errors import OutputExistsError as OutputExistsError
    from memlm.errors import TokenizerMismatchError as TokenizerMismatchError
    from memlm.errors import TrainingError as TrainingError
    from memlm.evaluate.config import BenchConfig as BenchConfig
    from memlm.evaluate.config import CompareConfig as CompareConfig
    from memlm.evaluate.config import EvaluateConfig as EvaluateConfig
    from memlm.evaluate.config import GenerationConfig as GenerationConfig
    from memlm.evaluate.config import InContextConfig as InContextConfig
    from memlm.evaluate.config import PassageConfig as PassageConfig
    from memlm.evaluate.perplexity import evaluate_perplexity as evaluate_perplexity
    from memlm.memory.adapt import adapt_memory as adapt_memory
    from memlm.memory.card import push_to_hub as push_to_hub
    from memlm.memory.config import AdaptConfig as AdaptConfig
    from memlm.memory.config import DecoderStart as DecoderStart
    from memlm.memory.config import MLPStart as MLPStart
    from memlm.memory.decoder import MemoryDecoder as MemoryDecoder
    from memlm.memory.loading import load_memory as load_memory
    from memlm.memory.protocol import Memory as Memory
    from memlm.memory.released import convert_released as convert_released
    from memlm.mix.explain import explain as explain
    from memlm.mix.gate_config import GateConfig as GateConfig
    from memlm.mix.mixed_lm import MixedLM as MixedLM
    from memlm.repair import repair_folder as repair_folder
    from memlm.targets.authors import write_corpus as write_corpus
    from memlm.targets.build import build_targets as build_targets
    from memlm.targets.config import RetrievalConfig as RetrievalConfig
    from memlm.targets.config import TargetsConfig as TargetsConfig
    from memlm.targets.config import WriteConfig as WriteConfig
    from memlm.train.config import FitGateConfig as FitGateConfig
    from memlm.train.config import TrainConfig as TrainConfig
    from memlm.train.gate import fit_gate as fit_gate
    from memlm.train.run import train_memory as train_memory

__version__ = "0.1.0"

_NAMES = {
    "corpus.blocks": "Corpus",
    "corpus.build": "build_corpus",
    "corpus.config": "CorpusConfig",
    "datastore.build": "build_datastore",
    "datastore.config": "DatastoreConfig",
    "datastore.store": "Datastore",
    "errors": "ArtifactError ConfigError InputError MemlmError ModelError OutputBusyError OutputExistsError"
    " TokenizerMismatchError TrainingError",
    "evaluate.config": "BenchConfig CompareConfig EvaluateConfig GenerationConfig InContextConfig PassageConfig",
    "evaluate.perplexity": "evaluate_perplexity",
    "memory.adapt": "adapt_memory",
    "memory.card": "push_to_hub",
    "memory.config": "AdaptConfig DecoderStart MLPStart",
    "memory.decoder": "MemoryDecoder",
    "memory.loading": "load_memory",
    "memory.protocol": "Memory",
    "memory.released": "convert_released",
    "mix.explain": "explain",
    "mix.gate_config": "GateConfig",
    "mix.mixed_lm": "MixedLM",
    "repair": "repair_folder",
    "targets.authors": "write_corpus",
    "targets.build": "build_targets",
    "targets.config": "RetrievalConfig TargetsConfig WriteConfig",
    "train.config": "FitGateConfig TrainConfig",
    "train.gate": "fit_gate",
    "train.run": "train_memory",
}
_HOMES = {name: f"memlm.{module}" for module, names in _NAMES.items() for name in names.split()}
__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'memlm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


register_with_transformers()
