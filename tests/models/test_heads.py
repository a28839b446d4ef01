import pytest
import torch
from architectures import tiny_model
from families import TAPS, VOCABULARY, WIDTH, family_config, family_model, token_ids
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig

from memlm.errors import ModelError
from memlm.models.heads import Head, check_plain_head, find_head, label_log_probs, likeliest


@pytest.mark.parametrize("family", [*TAPS, "mamba"])
def test_body_and_head_give_the_models_own_logits(family: str) -> None:
    model, tokens = family_model(family, tied=None), token_ids()
    head = find_head(model)
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
        found = head(model.base_model(input_ids=tokens, use_cache=False)[0])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # the same float32 operations
    assert head.weight.shape == (VOCABULARY, WIDTH)


def test_the_soft_cap_of_gemma2_is_found_and_matters() -> None:
    model = family_model("gemma2")
    head = find_head(model)
    hidden = 50 * torch.randn(4, WIDTH)
    assert head.softcap == 3.0
    assert head(hidden).abs().max() <= 3.0
    assert Head(head.linear)(hidden).abs().max() > 3.0
    assert find_head(family_model("llama")).softcap is None


@pytest.mark.parametrize(
    ("kind", "settings", "scale"),
    [(GraniteConfig, {"logits_scaling": 4.0}, 0.25), (CohereConfig, {"logit_scale": 0.125}, 0.125)],
)
def test_families_that_scale_their_logits_are_followed(kind: type, settings: dict, scale: float) -> None:
    like = family_config("llama")
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = kind(**{n: getattr(like, n) for n in names}, **settings, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    head = find_head(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
    assert head.scale == scale


def test_a_model_that_changes_its_logits_in_an_unknown_way_is_refused() -> None:
    model = family_model("llama")
    forward = model.forward

    def doubled(*args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output

    model.forward = doubled  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="changes its logits after the output layer in a way memlm does not know"):
        find_head(model)


def test_a_model_without_an_output_layer_is_refused() -> None:
    with pytest.raises(ModelError, match="LlamaModel has no separate body and output layer"):
        find_head(family_model("llama").base_model)


@pytest.mark.parametrize("chunk", [1, 3, 1024])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_label_log_probs_equal_a_dense_softmax_in_float64(chunk: int, temperature: float) -> None:
    head = find_head(family_model("gpt2"))
    hidden, labels = torch.randn(7, WIDTH), torch.randint(0, 60, (7,))
    found = label_log_probs(hidden, labels, head, vocab_size=60, temperature=temperature, chunk=chunk)
    dense = (hidden.double() @ head.weight.detach().double().T)[:, :60] / temperature
    log_probs = dense.log_softmax(-1)
    tolerance = {"rtol": 1e-5, "atol": 1e-5}  # float32 against float64, logits of size 10
    torch.testing.assert_close(found["label"].double(), log_probs[torch.arange(7), labels], **tolerance)
    torch.testing.assert_close(found["top1"].double(), log_probs.exp().amax(-1), **tolerance)
    assert torch.equal(found["top1_id"].long(), log_probs.argmax(-1))
    torch.testing.assert_close(found["entropy"].double(), -(log_probs.exp() * log_probs).sum(-1), **tolerance)


def test_label_log_probs_of_nothing_are_empty() -> None:
    head = find_head(family_model("gpt2"))
    found = label_log_probs(torch.empty(0, WIDTH), torch.empty(0, dtype=torch.long), head, vocab_size=60)
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(
        ("label", "entropy", "top1", "top1_id"), 0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [5.0, 30.0, 300.0])
def test_an_unknown_soft_cap_is_refused_whatever_the_precision(dtype: torch.dtype, cap: float) -> None:
    model = family_model("gemma2", final_logit_softcapping=cap, deviation=0.02).to(dtype)  # type: ignore[call-overload]
    assert find_head(model).softcap == cap
    forward = type(model).forward
    model.config.final_logit_softcapping = None  # as a model that calls it otherwise

    class Other(type(model)):
        def forward(self, *args: object, **kwargs: object) -> object:
            output = forward(self, *args, **kwargs)
            output.logits = cap * torch.tanh(output.logits / cap)
            return output

    model.__class__ = Other
    for exact in (False, True):
        with pytest.raises(ModelError, match="changes its logits after the output layer in a way memlm does not know"):
            find_head(model, exact=exact)


@pytest.mark.parametrize(("architecture", "cap"), [("recurrent_gemma", 30.0), ("xlstm", 30.0), ("mamba", None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_of_states_are_followed(architecture: str, cap: float | None, dtype: torch.dtype) -> None:
    model = tiny_model(architecture).to(dtype)  # type: ignore[call-overload]
    head = find_head(model)
    assert head.softcap == cap
    with torch.no_grad():
        expected = model(input_ids=token_ids(), use_cache=False).logits
        found = head(model.base_model(input_ids=token_ids(), use_cache=False)[0])
    torch.testing.assert_close(found.float(), expected.float(), rtol=1e-2, atol=1e-2)


def test_the_check_leaves_the_model_as_it_is() -> None:
    model = family_model("llama")
    parts, linear = dict(model.named_modules()), model.lm_head
    find_head(model)
    assert dict(model.named_modules()) == parts
    assert model.lm_head is linear


@pytest.mark.parametrize("family", TAPS)
def test_an_output_layer_that_is_a_matrix_alone_is_told_from_one_that_does_more(family: str) -> None:
    class Louder(torch.nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden) * torch.linspace(0.5, 2, self.out_features)

    model = family_model(family)
    assert find_head(model).is_plain()
    model.get_output_embeddings().__class__ = Louder
    head = find_head(model)  # which it is, as far as votes go
    assert not head.is_plain()
    with pytest.raises(ModelError, match=r"the output layer of x \(Louder\) does more than multiply by its weight"):
        check_plain_head(head, "x")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "kept"), [(1, 1), (1, 3), (4, 1), (4, 3)])
def test_a_slice_is_multiplied_as_the_model_does(dtype: torch.dtype, rows: int, kept: int) -> None:
    model = family_model("llama").to(dtype)  # type: ignore[call-overload]
    tokens = token_ids(rows, 6)
    with torch.no_grad():
        expected = model(tokens, logits_to_keep=kept).logits
        found = find_head(model)(model.base_model(tokens)[0][:, -kept:])
    assert found.shape == expected.shape
    assert torch.equal(found, expected)


def test_the_likeliest_token_is_torchs_argmax() -> None:
    torch.manual_seed(0)
    scores = torch.randint(0, 40, (4, 3, 5000)).float()  # many ties, of which the first counts
    scores[0, 0] = -torch.inf
    assert (likeliest(scores) == scores.argmax(-1)).all()
    assert (likeliest(scores[:, -1]) == scores[:, -1].argmax(-1)).all()
    assert likeliest(scores[0, 0]) == 0
    assert likeliest(scores).dtype == torch.long


def test_a_head_has_a_hash_before_it_has_fields() -> None:
    """torch.compile asks for it."""
    assert isinstance(hash(object.__new__(Head)), int)
