"""Recipes: one YAML with a section per stage, checked before anything heavy is imported."""

import os
from functools import cached_property
from pathlib import Path
from typing import Any

from memlm.config import StageConfig, nearest
from memlm.corpus.config import CorpusConfig
from memlm.corpus.readers import text_format
from memlm.datastore.config import DatastoreConfig
from memlm.errors import ConfigError, InputError
from memlm.evaluate.config import CompareConfig, EvaluateConfig
from memlm.files import near_here
from memlm.targets.config import RetrievalConfig, TargetsConfig, WriteConfig
from memlm.train.config import TrainConfig

SECTIONS: dict[str, tuple[type[StageConfig], dict[str, str]]] = {
    "corpus": (
        CorpusConfig,
        {
            "documents": "files below $MEMLM_DATA, or dataset names",
            "validation_documents": "of that split, where it is given",
            "test_documents": "of that split, where it is given",
            "tokenizer": "of which model",
        },
    ),
    "teacher": (TrainConfig, {"init": "start model; the section fine-tunes a teacher, kl_weight is 0"}),
    "write": (WriteConfig, {}),
    "datastore": (DatastoreConfig, {"teacher": "model; default the teacher section's"}),
    "targets": (TargetsConfig, {"teacher": "model whose words they are at teacher_share 1; default the datastore's"}),
    "train": (
        TrainConfig,
        {
            "init": "start model; an mlp memory needs none",
            "base": "validated with, and read by an mlp; default init",
            "activations": "for an mlp: a datastore of the base, `datastore` for the recipe's own; default online",
        },
    ),
    "twin": (TrainConfig, {}),
    "mlp": (
        TrainConfig,
        {
            "init": "an mlp memory to go on with",
            "activations": "a datastore of the base, `datastore` for the recipe's own; default online",
        },
    ),
    "dapt": (TrainConfig, {}),
    "lora": (TrainConfig, {}),
    "retrieval": (RetrievalConfig, {}),
    "evaluate": (EvaluateConfig, {"base": "model"}),
    "compare": (
        CompareConfig,
        {
            "general": "text that no method was made for, judged alone: files below $MEMLM_DATA, or dataset names",
            "general_fit": "other such text, that heads are fitted with",
            "bases": "further models of the tokenizer that the memory is put beside",
            "task_data": "folder of the papers' tasks; default they come from the hub",
        },
    ),
}
"""Section name to its settings and what it takes besides; mlp, dapt, lora and compare are for `memlm compare`."""


NO_TEACHER = "datastore.teacher is missing: a model, or a teacher section that fine-tunes one"
_SHARED = ("epochs", "max_steps", "batch_size", "accumulation", "validations", "dtype", "seed", "trainer")
"""What fine-tuning of the base takes from the train section."""
_SEVERAL = ("documents", "validation_documents", "test_documents", "general", "general_fit", "bases")


class Recipe:
    """A checked recipe."""

    def __init__(self, sections: dict[str, dict[str, Any]]) -> None:
        """
        Args:
            sections: Section name to settings, as in the YAML file.

        Raises:
            ConfigError: A section or key is unknown (the nearest is named), a value is wrong, or one is missing.
        """
        for name in sections:
            if name not in SECTIONS:
                raise ConfigError(f"unknown section '{name}'{nearest(name, SECTIONS)}")
        sections = dict(sections)
        for name in ("corpus", "datastore", "targets", "train"):
            sections.setdefault(name, {})
        left_out = {*SECTIONS["train"][1], "objective", "mixture_share"}
        alike = {key: value for key, value in sections["train"].items() if key not in left_out}
        shared = {key: value for key, value in sections["train"].items() if key in _SHARED}
        usual = {
            "twin": {**alike, "kl_weight": 0},  # what the train section says, but plain fine-tuning
            "teacher": {"kl_weight": 0},
            "mlp": {"kind": "mlp"},
            "dapt": {**shared, "kl_weight": 0, "keep": "memory"},
            "lora": {**shared, "kl_weight": 0, "keep": "memory", "lora_rank": 16},
        }
        for name in usual.keys() & sections.keys():
            sections[name] = usual[name] | sections[name]
        self.places: dict[str, dict[str, Any]] = {}
        self.configs: dict[str, Any] = {}
        for name, values in sections.items():
            config, extra = SECTIONS[name]
            known = {*config.options(), *extra}
            for key in values:
                if key not in known:
                    raise ConfigError(f"unknown setting '{name}.{key}'{nearest(key, known)}")
            self.places[name] = {key: _place(name, key, values[key]) for key in extra if key in values}
            settings = {key: value for key, value in values.items() if key not in extra}
            self.configs[name] = config.parse(settings, f"{name}.")
        for name, key in (("corpus", "documents"), ("corpus", "tokenizer")):
            if key not in self.places[name]:
                raise ConfigError(f"{name}.{key} is missing: {SECTIONS[name][1][key]}")
        if not {"init", "base"} & self.places["train"].keys():
            raise ConfigError("train.init is missing: the start model; an mlp memory needs train.base instead")
        if not self.has_teacher and self._wants_datastore:
            raise ConfigError(NO_TEACHER)
        alone = not self.configs["targets"].folds or "write" in self.configs
        if "teacher" in self.places["targets"] and not (self.speaks_alone and alone):
            raise ConfigError("targets.teacher is for targets that are its words alone: set targets.teacher_share to 1")
        if "teacher" in sections and "init" not in self.places["teacher"]:
            raise ConfigError("teacher.init is missing: the model to fine-tune")
        for name in ("targets", "write"):
            if name in sections and self.configs[name].folds and "teacher" not in sections:
                raise ConfigError(f"{name}.folds: teachers of folds are trained as the teacher section says; add one")
        self._check_write()
        for name, config in self.configs.items():
            check_targets(name, config)

    def _check_write(self) -> None:
        if "write" not in self.configs:
            return
        writing, speaking = self.configs["write"].folds, self.configs["targets"].folds
        if writing and speaking and writing != speaking:
            raise ConfigError(f"write.folds = {writing}, targets.folds = {speaking}: the same teachers write and speak")
        if self.speaker is None and "teacher" not in self.configs:
            raise ConfigError("write: who writes? add a teacher section, or name a model as targets.teacher")
        if self._imitates and not self.speaks_alone:
            raise ConfigError("write: what teachers wrote has no neighbours: set targets.teacher_share to 1")
        if stored := [name for name in ("train", "mlp") if "activations" in self.places.get(name, {})]:
            raise ConfigError(f"{stored[0]}.activations: no datastore has what teachers wrote; leave it out")

    @property
    def _folds(self) -> int:
        """For how many folds teachers are trained, to speak or to write."""
        return max((self.configs[name].folds for name in ("targets", "write") if name in self.configs), default=0)

    @property
    def has_teacher(self) -> bool:
        """Whether there is one to make a datastore."""
        return "teacher" in self.places["datastore"] or "teacher" in self.configs

    @property
    def speaks_alone(self) -> bool:
        """Whether targets are what a teacher says, or teachers of folds, and neighbours have no share."""
        return self.configs["targets"].teacher_share == 1

    @property
    def speaker(self) -> str | None:
        """The model whose words targets are; None: the teacher that is fine-tuned, or those of folds."""
        return self.places["targets"].get("teacher") or self.places["datastore"].get("teacher")

    @property
    def _imitates(self) -> bool:
        """Whether a memory is trained on targets."""
        return any(self.configs[name].kl_weight > 0 for name in ("train", "mlp") if name in self.configs)

    @property
    def _wants_datastore(self) -> bool:
        """Whether it cannot be run without one."""
        words = self.speaks_alone and (self.speaker is not None or "teacher" in self.configs)
        stored = any(places.get("activations") == "datastore" for places in self.places.values())
        return (self._imitates and not words) or stored or "retrieval" in self.configs

    @cached_property
    def base(self) -> str:
        """The model that the memory stands beside.

        Raises:
            ConfigError, ModelError: As `memlm.train.run.check_start`.
        """
        from memlm.train.run import check_start

        given, size = self.places["train"], self.configs["corpus"].block_size
        return check_start(self.configs["train"], init=given.get("init"), base=given.get("base"), block_size=size)[0]

    @property
    def fold_teachers(self) -> dict[str, TrainConfig]:
        """Name of a step to how it trains the teacher of a fold, where such are to speak or to write."""
        if not (folds := self._folds):
            return {}
        teacher: TrainConfig = self.configs["teacher"]
        return {f"fold-{n}": teacher.model_copy(update={"left_out": f"{n}/{folds}"}) for n in range(1, folds + 1)}

    @property
    def documents(self) -> list[str]:
        """Where the documents are."""
        return self.paths("corpus", "documents")

    @property
    def given(self) -> dict[str, list[str]]:
        """Where the documents of held-out splits are that are not taken from the others."""
        return {split: self.paths("corpus", f"{split}_documents") for split in ("validation", "test")}

    def paths(self, section: str, key: str) -> list[str]:
        """Where the documents of a key are; none where it is not given.

        Raises:
            InputError: One can only be a file, and is not there.
        """
        given = self.places.get(section, {}).get(key, [])
        places = [data_path(place) for place in ([given] if isinstance(given, str) else given)]
        if lost := next((p for p in places if text_format(Path(p)) is not None and not Path(p).exists()), None):
            raise InputError(
                f"{lost} is neither here nor in {_data()}: name the folder that it is in, MEMLM_DATA=FOLDER memlm ...;"
                f" recipes/README.md says where the text of recipes comes from{near_here(lost)}"
            )
        return places


def check_targets(section: str, config: StageConfig) -> None:
    """Raise unless a section that is plain fine-tuning asks for no targets.

    Raises:
        ConfigError: It does.
    """
    if section in ("teacher", "twin", "dapt", "lora") and (kl_weight := getattr(config, "kl_weight", 0)) != 0:
        raise ConfigError(f"{section}.kl_weight = {kl_weight:g}: a {section} is trained without targets, at 0")


def _place(section: str, key: str, value: Any) -> Any:
    """`value`, where it is a text, or for documents also a list of texts."""
    several = key in _SEVERAL and isinstance(value, list) and value and all(isinstance(v, str) for v in value)
    if not isinstance(value, str) and not several:
        wanted = "a path, or a list of paths" if key in _SEVERAL else "a path, hub id or packaged name"
        raise ConfigError(f"{section}.{key} = {value!r}: give {wanted}")
    return value


def data_path(place: str) -> str:
    """A document path of a recipe below `$MEMLM_DATA` (default `data/`); absolute paths and dataset names stay."""
    below = Path(_data()) / place
    return str(below) if below.exists() else place


def _data() -> str:
    return os.environ.get("MEMLM_DATA", "data")
