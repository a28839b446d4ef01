"""Commands that look after folders: info, repair."""

from pathlib import Path
from typing import Annotated, Any

import typer

from memlm.cli.options import Json
from memlm.cli.printing import memory_line, print_result
from memlm.errors import ArtifactError


def info(folder: Annotated[Path, typer.Argument(help="What any stage wrote.")], as_json: Json = False) -> None:
    """Say what a folder is, from what it was made, and how good it is.

    Example: memlm info m/
    """
    from memlm.manifest import read_manifest

    manifest = read_manifest(folder)
    size = sum(file.bytes for file in manifest.payload.values())
    lines = [
        f"{folder} is a {manifest.kind} folder: {len(manifest.payload)} files, {size / 1e6:,.1f} MB,"
        f" hash {manifest.hash[:16]}"
    ]
    lines += [f"  from {name}: {place}" for name, place in manifest.sources.items()]
    if manifest.kind == "memory":
        try:
            lines.append(f"  {memory_line(manifest.facts)}")
        except (KeyError, TypeError, ValueError):
            raise ArtifactError(f"{folder}/manifest.json: its facts are not those of a memory; rebuild it") from None
    facts = {name: fact for name, fact in manifest.facts.items() if name not in ("training", "validation")}
    lines += [f"  {name}: {_shorten(fact)}" for name, fact in facts.items()]
    lines.append(f"  settings: {_shorten(manifest.config)}")
    lines.append(f"  made with: {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}")
    # what a stranger wrote moves no cursor
    shown = ("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line) for line in lines)
    found = {"folder": str(folder), "hash": manifest.hash, **manifest.model_dump(mode="json")}
    print_result(found, as_json, "\n".join(shown))


def _shorten(value: Any) -> str:
    text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
    return text if len(text) <= 400 else text[:399] + "…"


def repair(
    folder: Annotated[Path, typer.Argument(help="A finished folder of any stage.")], as_json: Json = False
) -> None:
    """Hold a finished folder against its checksums and take out what is damaged; the command that made it then makes
    those files again, and leaves the others alone.

    Example: memlm repair t/
    """
    from memlm.repair import repair_folder

    lines = repair_folder(folder)
    print_result({"folder": str(folder), "found": lines}, as_json, "\n".join(lines))
