"""Commands that look after folders: info, list, repair."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from memlm.cli.checks import check_file_to_write
from memlm.cli.options import Json
from memlm.cli.printing import memory_line, perplexity_text, print_result
from memlm.corpus.config import SPLITS
from memlm.errors import ArtifactError, MemlmError
from memlm.files import read_json, replacing
from memlm.manifest import GATE_FILE, MANIFEST, PLAN, is_finished, read_manifest, times_of
from memlm.text import duration, flat, one_line, size, table


def info(
    folder: Annotated[Path, typer.Argument(help="What any stage wrote; with --html also a run's folder.")],
    html: Annotated[
        Path | None, typer.Option(help="File to write as a page: training curves, figures of targets and evaluations.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a folder is, from what it was made, and how good it is.

    Example: memlm info m/

    Example: memlm info runs/medquad --html medquad.html
    """
    check_file_to_write(html)
    if html is not None:
        from memlm.evaluate.folder_page import folder_page

        places = [folder] if is_finished(folder) else sorted(p for p in folder.glob("*") if is_finished(p))
        if not places:
            raise ArtifactError(f"{folder} is no finished folder of memlm, and has none in it")
        text = folder_page(places, str(folder))
        with replacing(html) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print_result({"folder": str(folder), "page": str(html)}, as_json, str(html))
        return
    manifest, times = read_manifest(folder), times_of(folder)
    found = {"folder": str(folder), "hash": manifest.hash, **manifest.model_dump(mode="json")}
    found |= times.model_dump() if times is not None else {}
    print_result(found, as_json, "\n".join(map(one_line, _info_lines(folder, manifest, times))))


def _info_lines(folder: Path, manifest: Any, times: Any) -> Iterator[str]:
    says_kind = manifest.kind == "memory" and "kind" in manifest.config
    kind = f"{manifest.config['kind']} memory" if says_kind else manifest.kind
    yield f"{folder}: {kind}, {size(manifest.bytes)} in {len(manifest.payload)} files"
    if times is not None:
        yield f"made {_date(times.finished)}; its last run took {duration(times.seconds_last_run)}"
    if manifest.kind == "memory":
        try:
            yield memory_line(manifest.facts)
        except (KeyError, TypeError, ValueError):
            raise ArtifactError(f"{folder}/manifest.json: its facts are not those of a memory; rebuild it") from None
    if (folder / GATE_FILE).is_file():
        yield _head_line(folder / GATE_FILE)
    shown = {name: fact for name, fact in manifest.facts.items() if name not in ("training", "validation")}
    for title, rows in (
        ("from", manifest.sources),
        ("facts", shown),
        ("settings", manifest.config),
        ("made with", manifest.versions),
    ):
        if rows:
            yield from ("", title)
            yield from (f"  {line}" for line in _rows(rows))
    yield from ("", f"hash {manifest.hash}")


def _head_line(path: Path) -> str:
    """How well a memory's confidence did on documents that it was not fitted on."""
    try:
        head = read_json(path, limit=1 << 26)
        facts = head["facts"]
        gate, fixed = (perplexity_text(facts[f"domain_{part}_perplexity"]) for part in ("gate", "fixed"))
        return (
            f"its confidence was fitted beside {head['base']}; on {facts['domain_tokens']:,} held-out tokens perplexity"
            f" {gate} with it, {fixed} with a fixed weight"
        )
    except (KeyError, TypeError, ValueError):
        raise ArtifactError(f"{path} holds no confidence head; delete it, or fit it anew with memlm gate") from None


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _rows(values: dict[str, Any]) -> Iterator[str]:
    """A line per value; a table for values that are dictionaries of the same keys."""
    plain = []
    for name, value in values.items():
        inner = list(value.values()) if isinstance(value, dict) else []
        if len(inner) > 1 and all(isinstance(row, dict) and row.keys() == inner[0].keys() and row for row in inner):
            plain.append((name, ""))
            cells = [["", *inner[0]], *([key, *map(_shown, row.values())] for key, row in value.items())]
            plain += [("", line) for line in table(cells)]
        else:
            plain += [(key, _shown(part)) for key, part in flat({name: value})]
    return iter(table(plain))


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    text = str(value)
    return text if len(text) <= 400 else text[:399] + "…"


def list_folders(
    folder: Annotated[Path, typer.Argument(help="Where to look, at any depth.")] = Path(), as_json: Json = False
) -> None:
    """List the folders that stages wrote below here: what each is, from what, how good, how large.

    Example: memlm list

    Example: memlm list runs/
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is no folder")
    found = [_listed(place) for place in _stage_folders(folder)]
    if not found and not as_json:
        print_result({}, False, f"no memlm folder lies in {folder.resolve()}")
        return
    rows = [["folder", "kind", "from", "how good", "size", "made"]]
    for entry in found:
        made = "" if entry["finished"] is None else _date(entry["finished"])
        rows.append([entry["folder"], entry["kind"], entry["from"], entry["good"], size(entry["bytes"]), made])
    print_result({"folders": found}, as_json, "\n".join(map(one_line, table(rows))))


def _stage_folders(folder: Path) -> Iterator[Path]:
    """Folders that stages made or began, outermost ones only; links are not followed, hidden folders not entered."""
    for place, below, files in os.walk(folder):
        if MANIFEST in files or PLAN in files:
            below.clear()
            yield Path(place)
        below[:] = sorted(name for name in below if not name.startswith("."))


def _listed(place: Path) -> dict[str, Any]:
    entry = {"folder": str(place), "kind": "unfinished", "from": "", "good": "", "bytes": 0, "finished": None}
    try:
        if is_finished(place):
            manifest = read_manifest(place)
            kind, facts, sources = manifest.kind, manifest.facts, manifest.sources
            origin = {"datastore": "teacher", "targets": "datastore", "memory": "base", "evaluation": "memory"}
            entry |= {
                "kind": kind,
                "from": sources.get(origin.get(kind, "documents"), sources.get("corpus", "")),
                "good": _good(kind, facts),
                "bytes": manifest.bytes,
                "finished": times.finished if (times := times_of(place)) else None,
            }
        else:
            entry["bytes"] = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    except (MemlmError, OSError) as error:
        entry |= {"kind": "damaged", "good": str(error)[:100]}
    return entry


def _good(kind: str, facts: dict[str, Any]) -> str:
    """What is to be known first of a folder's quality."""
    try:
        if kind == "corpus":
            return ", ".join(f"{name} {facts['splits'][name]['tokens']:,}" for name in SPLITS)
        if kind == "datastore":
            return f"{facts['entries']:,} entries, recall {facts['recall']['value']:.3f}"
        if kind == "targets":
            return f"{facts['positions']:,} positions"
        if kind == "memory" and "validation" in facts:
            best, base = facts["validation"]["best"], facts["validation"].get("base_perplexity")
            of = "" if base is None else f" of base {base:.2f}"
            return f"validation {best['mixture_perplexity']:.2f}{of} at {best['mix_weight']:g}"
        if kind == "evaluation":
            return f"test {facts['mixture']['perplexity']:.2f} of base {facts['base']['perplexity']:.2f}"
    except (KeyError, TypeError, ValueError):
        return "facts of another version"
    return ""


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
