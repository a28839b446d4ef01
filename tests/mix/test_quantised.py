"""Base and memory in whole numbers, by transformers' own quantisation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import family_model
from torch import Tensor, nn

from memlm import MixedLM
from memlm.errors import ModelError
from memlm.memory.protocol import check_finite


class _Whole(Tensor):
    """Weights that know no sums, as quantised ones do not."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.sum, Tensor.isfinite):
            raise NotImplementedError("Int8Tensor dispatch: attempting to run unimplemented operator")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_weights_that_know_no_sums_are_left_alone_and_others_are_not() -> None:
    model = family_model("llama")
    layer: Any = model.model.layers[0].mlp
    layer.up_proj.weight = nn.Parameter(layer.up_proj.weight.detach().as_subclass(_Whole))
    check_finite(model, "it")
    layer.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"^it has 1 of .* weights that are not finite, the first in .*down_proj"):
        check_finite(model, "it")


@pytest.mark.filterwarnings("ignore")  # torchao's own
@pytest.mark.parametrize("which", ["base", "memory"])
def test_eight_bits_change_little_and_drafts_nothing(which: str, model_folder: str, memory_folder: Path) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    asked = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    given: dict[str, Any] = asked if which == "base" else {"memory_kwargs": asked}
    plain = MixedLM.from_pretrained(model_folder, memory=memory_folder, mix_weight=0.5, dtype=torch.float32)
    small = MixedLM.from_pretrained(model_folder, memory=memory_folder, mix_weight=0.5, dtype=torch.float32, **given)
    tokens = torch.arange(3, 23)[None]
    with torch.no_grad():
        before, after = (model(tokens).logits.log_softmax(-1) for model in (plain, small))
    assert 0 < float((before - after).abs().max()) < 0.2
    greedy = {"max_new_tokens": 12, "do_sample": False}
    assert small.generate(tokens, **greedy, drafting=3).tolist() == small.generate(tokens, **greedy).tolist()
