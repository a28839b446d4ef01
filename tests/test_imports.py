"""What imports what, and how light the package is until it is used."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import memlm
from memlm import errors
from memlm.config import StageConfig

ROOT = Path(__file__).parents[1]


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import memlm; print(sorted(set(sys.modules) - before))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.strip(" '[]\n") for name in found.stdout.split(",")}
    assert "memlm" in loaded
    heavy = {"torch", "faiss", "transformers", "datasets", "numpy", "pydantic", "typer", "pyarrow", "matplotlib"}
    assert not heavy & {name.split(".")[0] for name in loaded}


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "transformers",
        *(pytest.param(name, marks=pytest.mark.table) for name in ("memlm", "transformers.models.auto.modeling_auto")),
    ],
)
def test_importing_the_package_makes_auto_classes_know_mixtures(first: str, tmp_path: Path) -> None:
    """Whichever is imported first."""
    (tmp_path / "config.json").write_text('{"model_type": "memlm-mixed", "base": "nowhere", "memories": {}}')
    code = f"""
import {first}, memlm, transformers
from transformers import AutoConfig, AutoModelForCausalLM
print(type(AutoConfig.from_pretrained({str(tmp_path)!r})).__name__)
try:
    AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
except memlm.MemlmError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("MixedLMConfig\nmodel 'nowhere' cannot be loaded"), found.stdout


def test_dir_lists_what_there_is() -> None:
    assert set(memlm.__all__) <= set(dir(memlm))


@pytest.mark.parametrize("name", memlm.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(memlm, name) is not None


def test_type_checkers_see_the_names_that_are_there() -> None:
    """They cannot follow `__getattr__`, so the file imports each name once more where only they look."""
    tree = ast.parse(Path(memlm.__file__).read_text(encoding="utf-8"))
    only_for_types = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        (alias.asname, node.module)
        for node in only_for_types.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    names = set(memlm.__all__) - {"__version__"}
    homes = {(name, getattr(memlm, name).__module__) for name in names}
    assert seen == homes
    assert len(names) == len(memlm.__all__) - 1, "no name is listed twice"


def test_every_error_and_every_stages_settings_are_public() -> None:
    wanted = {name for name, value in vars(errors).items() if isinstance(value, type)}
    source = ROOT / "src" / "memlm"
    for path in source.rglob("config.py"):
        module = importlib.import_module(".".join(["memlm", *path.relative_to(source).with_suffix("").parts]))
        wanted |= {
            name
            for name, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, StageConfig) and not value.__subclasses__()
        }
    assert {"ConfigError", "TrainConfig", "MLPStart"} <= wanted
    assert wanted <= set(memlm.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'MixedLN'"):
        memlm.MixedLN  # noqa: B018


def test_no_module_has_a_name_that_says_nothing() -> None:
    names = {path.stem for path in (ROOT / "src" / "memlm").rglob("*.py")}
    assert names
    assert not names & {"utils", "util", "common", "helpers", "misc"}


def test_no_module_is_of_unix_alone() -> None:
    unix = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "readline"}
    for path in (ROOT / "src" / "memlm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & unix, path


@pytest.mark.parametrize(("package", "home"), [("faiss", "datastore"), ("typer", "cli"), ("lm_eval", "evaluate")])
def test_some_packages_are_imported_in_one_place_alone(package: str, home: str) -> None:
    source = ROOT / "src" / "memlm"
    users = {
        path.relative_to(source).parts[0].removesuffix(".py")
        for path in source.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.split()[:2] in (["import", package], ["from", package])
    }
    assert users <= {home}


def test_the_command_line_says_that_it_needs_typer() -> None:
    code = "import runpy, sys; sys.modules['typer'] = None; runpy.run_module('memlm', run_name='__main__')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr == "memlm: error: the command line needs typer: pip install typer\n"


CHEAP_MISTAKES = {
    "corpus none.txt --tokenizer smollm2 --out c": "none.txt does not exist",
    "corpus ./none --tokenizer smollm2 --out c": "./none does not exist",
    "corpus doc.txt --tokenizer ./nonne --out c": "./nonne does not exist",
    "corpus doc.txt --tokenizer x --block-size 0 --out c": "block_size = 0",
    "datastore none --teacher smollm2 --out d": "none does not exist; expected a corpus folder",
    "write none --out c": "none does not exist; expected a corpus folder",
    "targets none --out t": "none does not exist; expected a datastore or corpus folder",
    "train none --init smollm2 --out m": "none does not exist; expected a targets or corpus folder",
    "evaluate perplexity none --base smollm2 --memory m": "none does not exist",
    "generate hi --base smollm2 --memory dok/": "dok/ does not exist; did you mean doc?",
    "explain hi --base ./dok --memory m": "./dok does not exist; did you mean doc?",
    "chat --base a/b/c --memory m": "a/b/c does not exist",
    "run none.yaml": "cannot read recipe none.yaml",
    "info none": "none does not exist",
    "list none": "none is no folder",
}


def test_cheap_mistakes_are_answered_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "doc.txt").write_text("x")
    (tmp_path / "doc").mkdir()
    program = """
import contextlib, io, sys
from memlm.cli import main
for command in sys.argv[1:]:
    sys.argv[:] = ["memlm", *command.split()]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as stop:
            assert stop.code == 2, (command, stop.code)
    print(said.getvalue().strip())
    heavy = {"torch", "transformers", "datasets", "faiss"} & set(sys.modules)
    assert not heavy, (command, heavy)
"""
    ran = subprocess.run(
        [sys.executable, "-c", program, *CHEAP_MISTAKES], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    for (command, expected), line in zip(CHEAP_MISTAKES.items(), ran.stdout.splitlines(), strict=True):
        assert line.startswith("memlm: error: "), command
        assert expected in line, command
