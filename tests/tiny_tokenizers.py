"""Tiny tokenizers: byte-level, in sentencepiece's spelling, of letters, and the same tokens under other ids."""

import json
import string
from collections.abc import Iterable

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level(texts: Iterable[str], *, vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """A BPE tokenizer as GPT-2 has it, with BOS, EOS and padding; 259 tokens without any merge."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def sentencepiece_like(texts: Iterable[str], *, vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """A BPE tokenizer as Llama 2 has it: ▁ for spaces, one put in front of a text, and byte tokens as a fallback."""
    core = Tokenizer(models.BPE())
    core.normalizer = _normalizer()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 259, show_progress=False)
    core.train_from_iterator((text[:40] for text in texts), trainer)
    learnt = json.loads(core.to_str())["model"]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    vocabulary = {token: id_ for id_, token in enumerate(tokens)}
    merges = [tuple(merge) for merge in learnt["merges"]]
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = _normalizer()
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def letters(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of single letters and digits, 66 at most with the four special tokens; also as Qwen's own class."""
    tokens = ["<pad>", *SPECIAL, *string.ascii_letters, *string.digits][:vocab_size]
    core = Tokenizer(models.BPE({token: id_ for id_, token in enumerate(tokens)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    roles = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **roles)


def permuted(tokenizer: PreTrainedTokenizerFast, seed: int) -> tuple[PreTrainedTokenizerFast, np.ndarray]:
    """The tokenizer with its ids shuffled, and the new id of each old one."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = np.random.default_rng(seed).permutation(len(tokenizer))
    settings["model"]["vocab"] = {token: int(ids[id_]) for token, id_ in settings["model"]["vocab"].items()}
    for token in settings["added_tokens"]:
        token["id"] = int(ids[token["id"]])
    roles = {role: getattr(tokenizer, role) for role in ("bos_token", "eos_token", "pad_token", "unk_token")}
    core = Tokenizer.from_str(json.dumps(settings))
    return PreTrainedTokenizerFast(tokenizer_object=core, **{k: v for k, v in roles.items() if v is not None}), ids
