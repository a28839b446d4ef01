import math
from pathlib import Path
from typing import get_args

import pytest
from pydantic import Field

from memlm.config import StageConfig, parse_yaml, read_recipe, settings_from
from memlm.corpus.config import CorpusConfig
from memlm.datastore.config import DatastoreConfig
from memlm.errors import ConfigError
from memlm.evaluate.config import EvaluateConfig
from memlm.memory.mlp import MLPSettings
from memlm.runs.recipe import Recipe
from memlm.targets.config import TargetsConfig
from memlm.train.config import TrainConfig


class Sample(StageConfig):
    """A stage's settings."""

    k: int = Field(default=8, ge=1)
    """Neighbours."""
    rate: float = Field(default=0.5, gt=0, le=1)
    name: str | None = None


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_unknown_setting_names_the_nearest_known_one() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown setting 'targets\.target_temprature'; did you mean 'target_temperature'\?"
    ):
        TargetsConfig.parse({"target_temprature": 4}, "targets.")
    with pytest.raises(ConfigError, match="unknown setting 'zzz'; known: k, name, rate"):
        Sample.parse({"zzz": 1})


def test_a_wrong_type_names_field_and_value() -> None:
    with pytest.raises(ConfigError, match=r"targets\.k = 'many': input should be a valid integer"):
        TargetsConfig.parse({"k": "many"}, "targets.")
    with pytest.raises(ConfigError, match=r"k = 1\.5: "):
        Sample.parse({"k": 1.5})


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (TargetsConfig, {"target_temperature": 0}, "target_temperature = 0: .*greater than 0"),
        (TargetsConfig, {"target_temperature": -1.0}, r"target_temperature = -1\.0: .*greater than 0"),
        (TargetsConfig, {"target_mass": 1.1}, r"target_mass = 1\.1: .*less than or equal to 1"),
        (TargetsConfig, {"k": 0}, "k = 0: .*greater than or equal to 1"),
        (CorpusConfig, {"block_size": 1}, "block_size = 1: "),
        (CorpusConfig, {"document_separator": ""}, "document_separator = '': "),
        (CorpusConfig, {"validation_fraction": 1}, "validation_fraction = 1: "),
        (DatastoreConfig, {"index": "hnsw"}, "index = 'hnsw': .*'exact', 'ivf-flat' or 'ivf-pq'"),
    ],
)
def test_a_value_out_of_range_is_refused(config: type[StageConfig], values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.parse(values)


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (CorpusConfig, {"block_size": 8, "stride": 8}, "^corpus: stride 8 must be below block_size 8"),
        (CorpusConfig, {"validation_fraction": 0.5, "test_fraction": 0.5}, "^corpus: .*leave room for training"),
        (DatastoreConfig, {"keep_keys": False, "index": "exact"}, "^corpus: keep_keys false .* not exact"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_in_one_short_line(
    config: type[StageConfig], values: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config.parse(values, "corpus.")
    assert len(str(caught.value)) < 150


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"k = 0: .*; rate = 2: .*; unknown setting 'nam'; did you mean 'name'\?"):
        Sample.parse({"k": 0, "rate": 2, "nam": "x"})


def test_settings_are_frozen_and_documented_by_the_docstring_below_the_field() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Sample().k = 3  # type: ignore[misc]
    assert Sample.model_fields["k"].description == "Neighbours."


@pytest.mark.parametrize("config", [CorpusConfig, DatastoreConfig, TargetsConfig])
def test_every_field_of_a_stage_is_documented_and_has_a_default(config: type[StageConfig]) -> None:
    config()
    assert [name for name, field in config.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("-2E+3", -2000.0),
        ("5e-4", 5e-4),
        (".5", 0.5),
        ("1.", 1.0),
        (".inf", math.inf),
        ("12", 12),
        ("1e", "1e"),
        ("e5", "e5"),
        ("1.2.3", "1.2.3"),
        ("'1e-6'", "1e-6"),
    ],
)
def test_yaml_reads_numbers_as_people_write_them(text: str, value: object) -> None:
    found = parse_yaml(text, "text")
    assert found == value
    assert type(found) is type(value)


def test_yaml_runs_no_code() -> None:
    with pytest.raises(ConfigError, match="text is not valid YAML"):
        parse_yaml("!!python/object/apply:os.getcwd []", "text")


def test_overrides_change_and_add_settings(tmp_path: Path) -> None:
    path = recipe(tmp_path, "corpus:\n  block_size: 64\ntargets:\n  k: 8\n")
    found = read_recipe(
        path, ["targets.k=256", "train.learning_rate=1e-6", "corpus.document_separator='a=b.c'", "corpus.stride=null"]
    )
    assert found == {
        "corpus": {"block_size": 64, "document_separator": "a=b.c", "stride": None},
        "targets": {"k": 256},
        "train": {"learning_rate": 1e-6},
    }
    assert read_recipe(path) == {"corpus": {"block_size": 64}, "targets": {"k": 8}}


@pytest.mark.parametrize("override", ["k=3", "targets.k", "targets.=3", ".k=3", "a.b.c=3", ""])
def test_an_override_of_another_form_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"is not of the form section\.key=value, such as targets\.k=256"):
        read_recipe(recipe(tmp_path, "targets: {}"), [override])


def test_an_override_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--set 'targets\.k=\[1' is not valid YAML"):
        read_recipe(recipe(tmp_path, "targets: {}"), ["targets.k=[1"])


@pytest.mark.parametrize("text", ["- a\n- b\n", "targets: 3\n", "", "just words"])
def test_a_recipe_must_map_stages_to_settings(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="must hold one mapping per stage"):
        read_recipe(recipe(tmp_path, text))


def test_a_recipe_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read recipe .*nowhere\.yaml: No such file"):
        read_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match=r"recipe\.yaml is not valid YAML: "):
        read_recipe(recipe(tmp_path, "a: [1\nb: 2"))
    (tmp_path / "latin.yaml").write_bytes(b"corpus: {text_column: \xe9}")
    with pytest.raises(ConfigError, match=r"cannot read recipe .*latin\.yaml"):
        read_recipe(tmp_path / "latin.yaml")


def test_settings_come_as_config_or_as_keywords() -> None:
    assert settings_from(Sample, None, {"k": 3}) == settings_from(Sample, Sample(k=3), {}) == Sample(k=3)
    with pytest.raises(ConfigError, match="k: give settings as keywords or as config, not both"):
        settings_from(Sample, Sample(), {"k": 3})
    with pytest.raises(ConfigError, match="unknown setting 'nam'; did you mean 'name'"):
        settings_from(Sample, None, {"nam": "x"})


def settings_classes(cls: type[StageConfig] = StageConfig) -> list[type[StageConfig]]:
    found = [deeper for sub in cls.__subclasses__() for deeper in (sub, *settings_classes(sub))]
    return [sub for sub in found if sub.__module__.startswith("memlm.")]


def has_numbers(annotation: object) -> bool:
    return annotation in (int, float) or any(map(has_numbers, get_args(annotation)))


FIELDS = [
    (cls, name)
    for cls in dict.fromkeys(settings_classes())
    for name, field in {**cls.model_fields, **cls.options()}.items()
    if has_numbers(field.annotation)
]


def test_the_settings_with_numbers_are_all_found() -> None:
    assert len(FIELDS) > 60
    assert (TrainConfig, "layers") in FIELDS
    assert (MLPSettings, "base_blocks") in FIELDS


@pytest.mark.parametrize("value", [10**20, -(10**20), 1e20, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=lambda part: getattr(part, "__name__", part))
def test_every_number_has_bounds(cls: type[StageConfig], name: str, value: float) -> None:
    for given in (value, [value], {"a": value}) if name in ("mix_weight", "layers") else (value,):
        with pytest.raises(ConfigError, match=rf"\b{name}\b") as caught:
            cls.parse({"kind": "mlp"} | {name: given} if cls is TrainConfig and name == "width" else {name: given})
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("value", [10**20, math.inf, math.nan, [math.nan], {"deep": [1e300]}])
def test_a_number_for_the_trainer_is_finite_and_fits_its_types(value: object) -> None:
    with pytest.raises(ConfigError, match="logging_steps must be a number below"):
        TrainConfig.parse({"trainer": {"logging_steps": value}})
    assert TrainConfig.parse({"trainer": {"logging_steps": 5, "optim": "sgd"}}).trainer["logging_steps"] == 5


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (TrainConfig, {"seed": 2**32}),
        (TargetsConfig, {"target_temperature": 1e-50}),
        (DatastoreConfig, {"nlist": 64, "train_vectors": 63}),
        (EvaluateConfig, {"bootstrap": 10**12}),
        (EvaluateConfig, {"batch_tokens": 10**12}),
    ],
)
def test_numbers_that_a_library_would_stumble_over_are_refused(config: type[StageConfig], values: dict) -> None:
    with pytest.raises(ConfigError, match="|".join(values)):
        config.parse(values)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        "a: 2024-13-45",
        "1" * 5000,
        "{? [1] : 2}",
        "a: !!python/object:os.system {}",
        "a: \x00",
        "a: 2024-01-01T99:00:00Z",
    ],
    ids=range(7),
)
def test_no_yaml_ends_in_a_traceback(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.yaml is not valid YAML: ") as caught:
        read_recipe(recipe(tmp_path, text))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "text", ["1: {}", "corpus: {1: 2}", "null: {}", "corpus: {[a]: 2}", "{a: 1}: {}", "2024-01-01: {}"]
)
def test_a_recipe_with_keys_that_are_no_names_is_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown s|is not valid YAML") as caught:
        Recipe(read_recipe(recipe(tmp_path, text)))
    assert len(str(caught.value).splitlines()) == 1


def test_what_an_anchor_makes_large_is_shown_in_short(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]
    text = "corpus:\n  seed: *a11\n"
    bomb = "\n".join(f"  {line}" for line in lines)
    with pytest.raises(ConfigError, match=r"corpus\.seed = .*valid integer") as caught:
        CorpusConfig.parse({"seed": read_recipe(recipe(tmp_path, f"x:\n{bomb}\n{text}"))["corpus"]["seed"]}, "corpus.")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (CorpusConfig, {"text_column": "a\udcff"}),
        (CorpusConfig, {"document_separator": "\udcff"}),
        (CorpusConfig, {"start_token": "\ud800"}),
        (DatastoreConfig, {"tap": "\udcff"}),
        (TrainConfig, {"trainer": {"run_name": ["\udcff"]}}),
        (TrainConfig, {"kind": "mlp", "tap": "\udcff"}),
    ],
)
def test_a_text_that_is_no_utf_8_is_refused(config: type[StageConfig], values: dict) -> None:
    with pytest.raises(ConfigError, match=rf"{list(values)[-1]} = .*(is not UTF-8|unicode string)") as caught:
        config.parse(values)
    assert str(caught.value).encode()
