"""What is longer than a model has positions for, or has tokens that it has no row for: one line before work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import family_model, token_ids
from memories import decoder_memory
from transformers import PreTrainedTokenizerFast

from memlm import MixedLM
from memlm.errors import ConfigError, InputError, MemlmError
from memlm.memory.decoder import MemoryDecoder
from memlm.memory.protocol import MemorySettings
from memlm.models.loading import check_reaches, longest_context
from memlm.models.prompts import encode_prompt
from memlm.models.tokenizers import check_reads, load_tokenizer

VOCAB = 64


def mixture(family: str, **sizes: Any) -> MixedLM:
    return MixedLM(family_model(family, **sizes), decoder_memory(VOCAB, seed=3), 0.4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_generation_beyond_the_bases_positions_is_refused_before_its_first_token(
    family: str, options: dict[str, Any]
) -> None:
    own = {"n_positions" if family == "gpt2" else "max_position_embeddings": 16}
    model, read = mixture(family, **own), []
    model.base.get_input_embeddings().register_forward_hook(lambda _, args, out: read.append(args[0].shape[1] == 10))
    line = rf"^a prompt of 10 tokens and 7 new ones are more than the 16 that base {type(model.base).__name__} has"
    with pytest.raises(ConfigError, match=line):
        model.generate(token_ids(1, 10), max_new_tokens=7, do_sample=False, **options)
    assert not any(read)  # a probe may have been
    assert model.generate(token_ids(1, 10), max_new_tokens=6, do_sample=False, **options).shape[1] == 16


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_reading_beyond_the_bases_positions_is_refused(family: str) -> None:
    model = mixture(family, **{"n_positions" if family == "gpt2" else "max_position_embeddings": 16})
    with pytest.raises(ConfigError, match="17 tokens are more than the 16 that base"), torch.no_grad():
        model(token_ids(1, 17))
    cache = model.new_cache(1)
    with torch.no_grad():
        model(token_ids(1, 16), past_key_values=cache)
        with pytest.raises(ConfigError, match="17 tokens are more than the 16 that base"):
            model(token_ids(1, 1), past_key_values=cache)


def test_families_without_positions_have_no_limit() -> None:
    for family in ("bloom", "mamba"):
        assert longest_context(family_model(family).config) is None
    config = family_model("llama").config
    assert longest_context(config) == 128
    config.alibi = True  # as Falcon's: positions are no more than distances
    assert longest_context(config) is None


def test_a_memory_that_claims_more_positions_than_it_has_is_refused() -> None:
    decoder = family_model("gpt2")  # 24 positions
    with pytest.raises(ConfigError, match="context_length = 25: the decoder has positions for 24 tokens"):
        MemoryDecoder(decoder, MemorySettings(kind="decoder", vocab_size=VOCAB, context_length=25))
    assert MemoryDecoder(decoder, MemorySettings(kind="decoder", vocab_size=VOCAB)).window == 24


def test_a_model_with_too_few_positions_for_the_blocks_is_named(tmp_path: Path) -> None:
    family_model("gpt2").save_pretrained(tmp_path)
    check_reaches(str(tmp_path), 24, data="corpus c", label="model m")
    line = "^corpus c has blocks of 25 tokens, model m has positions for 24: lower block_size$"
    with pytest.raises(InputError, match=line):
        check_reaches(str(tmp_path), 25, data="corpus c", label="model m")


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedTokenizerFast]:
    """A model of 64 rows with a tokenizer of 66 ids, of which the last are `<extra>` and `<more>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(64)}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="w2", pad_token="w1")
    tokenizer.add_tokens(["<extra>", "<more>"])
    folder = tmp_path_factory.mktemp("larger")
    family_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, tokenizer


def test_ids_beyond_the_rows_are_refused_only_where_one_occurs(larger: tuple[Path, Any]) -> None:
    folder, _ = larger
    tokenizer = load_tokenizer(str(folder))
    names = {"data": "corpus c", "label": "model m"}

    def there(*ids: int) -> Callable[[], Any]:
        return lambda: [torch.tensor([3, 63]).numpy(), torch.tensor(ids).numpy()]

    check_reads(str(folder), tokenizer, 66, there(5), **names)
    with pytest.raises(InputError, match=r"has token '<more>' \(id 65\), outside the 64 of model m"):
        check_reads(str(folder), tokenizer, 66, there(4, 65), **names)


def test_a_prompt_with_a_token_that_has_no_row_names_it(larger: tuple[Path, Any]) -> None:
    _, tokenizer = larger
    assert encode_prompt(tokenizer, "w5 w6", rows=64)["input_ids"].tolist() == [[5, 6]]
    with pytest.raises(InputError, match=r"^the prompt has token '<extra>' \(id 64\), outside the 64 of the base"):
        encode_prompt(tokenizer, "w5 <extra>", rows=64)


def test_the_road_goes_on_with_a_tokenizer_that_has_more_ids(larger: tuple[Path, Any], tmp_path: Path) -> None:
    from memlm import build_corpus, build_datastore, build_targets, train_memory
    from memlm.evaluate.perplexity import evaluate_perplexity

    folder, _ = larger
    rng = torch.Generator().manual_seed(0)
    texts = [" ".join(f"w{int(i)}" for i in torch.randint(3, 64, (60,), generator=rng)) for _ in range(12)]
    documents = tmp_path / "documents"
    documents.mkdir()
    for number, text in enumerate(texts):
        (documents / f"{number}.txt").write_text(text)
    shared = {"validation_fraction": 0.2, "test_fraction": 0.2, "block_size": 32, "stride": 16}
    build_corpus([str(documents)], tokenizer=str(folder), out=tmp_path / "corpus", **shared)
    build_datastore(tmp_path / "corpus", teacher=str(folder), out=tmp_path / "store")
    build_targets(tmp_path / "store", out=tmp_path / "targets", k=8)
    train_memory(tmp_path / "targets", init=str(folder), out=tmp_path / "memory", max_steps=2, batch_size=4)
    report = evaluate_perplexity(tmp_path / "corpus", base=str(folder), memory=str(tmp_path / "memory"))
    assert report is not None
    mixed = MixedLM.from_pretrained(folder, memory=tmp_path / "memory", mix_weight=0.3)
    assert mixed.vocab_size == 64
    with pytest.raises(ConfigError, match="token id 65 is outside the 64 of base LlamaForCausalLM"):
        mixed.generate(torch.tensor([[5, 65, 6]]), max_new_tokens=2)
    (documents / "0.txt").write_text(texts[0] + " <extra>")
    build_corpus([str(documents)], tokenizer=str(folder), out=tmp_path / "other", special_tokens=True, **shared)
    with pytest.raises(MemlmError, match=r"has token '<extra>' \(id 64\), outside the 64 of model"):
        build_datastore(tmp_path / "other", teacher=str(folder), out=tmp_path / "store2")


def test_a_token_without_a_row_in_the_memory_is_named_and_padding_needs_none() -> None:
    model = MixedLM(family_model("llama", 48), decoder_memory(40), mix_weight=0.3)
    text = torch.tensor([[3, 4, 45, 6]])
    with pytest.raises(ConfigError, match="token id 45 is outside the 40 of memory"):
        model(text)
    padded, mask = torch.tensor([[45, 4, 5]]), torch.tensor([[0, 1, 1]])
    with torch.no_grad():
        found = model(padded, attention_mask=mask).logits[:, 1:]
        torch.testing.assert_close(found, model(padded[:, 1:]).logits)
