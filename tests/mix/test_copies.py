"""A mixture copied, pickled and moved to another precision."""

import copy
import io
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from families import token_ids
from memories import WEIGHTS, Make
from torch import Tensor

from memlm import MixedLM, load_memory
from memlm.errors import ArtifactError, ConfigError
from memlm.mix.cache import MixedCache
from memlm.mix.gate_config import GateName
from memlm.targets.config import RetrievalConfig

some_tokens = partial(token_ids, vocab_size=300)
_T = TypeVar("_T")


def by_pickle(model: _T) -> _T:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: _T) -> _T:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@torch.no_grad()
def logits(model: MixedLM) -> Tensor:
    return model(some_tokens(2, 9)).logits


@pytest.mark.slow
@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch_save])
def test_a_copy_computes_with_its_own_weights(trio: MixedLM, copied: Callable[[MixedLM], MixedLM]) -> None:
    expected = logits(trio)
    twin = copied(trio)
    assert torch.equal(logits(twin), expected)
    assert twin.mix_weights == trio.mix_weights
    with torch.no_grad():
        for parameter in trio.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin), expected)
    assert not torch.equal(logits(trio), expected)


@pytest.mark.parametrize("gate", ["none", "posterior"])
@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch_save])
def test_a_cache_goes_on_where_it_was_copied(
    trio: MixedLM, gate: GateName, copied: Callable[[MixedCache], MixedCache]
) -> None:
    """Also from a file, as what was read of a long prompt is kept."""
    trio.set_gate(gate)
    tokens = some_tokens(2, 9)
    with torch.no_grad():
        cache = trio(tokens[:, :5], use_cache=True).past_key_values
        assert isinstance(cache, MixedCache)
        twin = copied(cache)
        first, second = (trio(tokens[:, 5:], past_key_values=part).logits for part in (cache, twin))
    assert torch.equal(first, second)
    trio.add_memory("late", trio.named_memories()["law"], 0.01)
    with pytest.raises(ConfigError, match="the cache is older than memory 'late'"):
        trio(tokens[:, 5:], past_key_values=copied(cache))


def test_a_copy_can_be_moved_to_another_precision(trio: MixedLM) -> None:
    twin = copy.deepcopy(trio).to(torch.float64)
    torch.testing.assert_close(logits(twin).float(), logits(trio), rtol=0, atol=1e-3)
    assert trio.base.dtype == torch.float32


def test_a_mixture_can_be_moved_to_another_precision(trio: MixedLM) -> None:
    expected = logits(trio)
    torch.testing.assert_close(logits(trio.to(torch.float64)).float(), expected, rtol=0, atol=1e-3)


def test_a_changed_weight_of_a_copy_is_the_copys_own(make: Make) -> None:
    model = make()
    twin = copy.deepcopy(model)
    twin.set_mix_weight(dict.fromkeys(WEIGHTS, 0.0))
    assert model.mix_weights == WEIGHTS


def test_a_pickled_retriever_is_refused_where_its_datastore_is_another(datastore_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(datastore_folder, tmp_path / "d")
    pickled = pickle.dumps(load_memory(tmp_path / "d"))
    manifest = tmp_path / "d" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"exact"', '"ivf"'))
    with pytest.raises(ArtifactError):
        pickle.loads(pickled)


def test_nprobe_is_asked_of_an_index_that_has_one(datastore_folder: Path) -> None:
    with pytest.raises(ConfigError, match="nprobe"):
        load_memory(datastore_folder, retrieval=RetrievalConfig(nprobe=3))
