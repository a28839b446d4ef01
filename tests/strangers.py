"""Folders as a stranger may make them: changed, with a manifest that fits the change."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def reseal(folder: Path, *names: str) -> None:
    """Give the manifest of `folder` the sizes and checksums that these files, or all, have now."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in names or manifest["payload"]:
        content = (folder / name).read_bytes()
        manifest["payload"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(manifest))


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Let `change` change the manifest of `folder`."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
