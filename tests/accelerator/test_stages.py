"""The stages and memories on the default device: the accelerator where there is one, the CPU in CI."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import memlm
from memlm.models.loading import default_device
from memlm.targets.config import RetrievalConfig
from memlm.train.config import TrainConfig

MLP = {"kind": "mlp", "layers": 1}
QUICK = {"max_steps": 2, "batch_size": 4, "dtype": "float32"}


@pytest.fixture(scope="module")
def memories(
    targets_folder: Path, datastore_folder: Path, model_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """A trained memory of each kind; the MLP from stored activations and online."""
    out = tmp_path_factory.mktemp("memories")

    def train(name: str, **given: Any) -> str:
        settings = {**QUICK, **given.pop("settings", {})}
        memlm.train_memory(targets_folder, out=out / name, config=TrainConfig(**settings), **given)
        return str(out / name)

    return {
        "decoder": train("decoder", init=model_folder),
        "stored": train("stored", base=model_folder, activations=datastore_folder, settings=MLP),
        "online": train("online", base=model_folder, settings=MLP),
        "retrieval": str(datastore_folder),
    }


@pytest.mark.parametrize("kind", ["decoder", "stored", "online", "retrieval"])
def test_a_memory_is_evaluated_and_generates(
    kind: str, memories: dict[str, str], corpus_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    retrieval = RetrievalConfig(k=8) if kind == "retrieval" else None
    report = memlm.evaluate_perplexity(
        corpus_folder, base=model_folder, memory=memories[kind], out=tmp_path / "e", retrieval=retrieval
    )
    assert math.isfinite(report["mixture"]["perplexity"])
    device = default_device()
    model = memlm.MixedLM.from_pretrained(model_folder, memory=memories[kind], mix_weight=0.3, dtype=torch.float32)
    model = model.to(device)
    tokens = AutoTokenizer.from_pretrained(model_folder)("the memory reads", return_tensors="pt").to(device)
    found = model.generate(**tokens, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    whole = torch.cat(
        [model(found[:, :n], use_cache=False).logits[:, -1] for n in range(found.shape[1] - 6, found.shape[1])]
    )
    chosen = whole.gather(1, found[0, -6:, None])
    assert found.device.type == device.type
    allowed = whole.clone()
    allowed[:, tokens.get("eos", 2)] = -math.inf  # min_new_tokens keeps it away
    assert (allowed.max(1).values - chosen[:, 0]).max() < 1e-3  # float32, with a cache and without
