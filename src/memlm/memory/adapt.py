"""The adapt stage: a Memory Decoder for one tokenizer to the start of one for another."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import embedding_bag
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from memlm.config import settings_from
from memlm.errors import ConfigError
from memlm.manifest import Facts, Manifest, is_artifact, read_manifest
from memlm.memory.card import CARD_FILE, CARD_HEAD
from memlm.memory.config import AdaptConfig
from memlm.memory.decoder import MemoryDecoder
from memlm.memory.loading import load_memory, read_settings
from memlm.models.heads import Head, check_plain_head
from memlm.models.identity import model_identity
from memlm.models.loading import resolve
from memlm.models.tokenizers import fingerprint, load_tokenizer, vocabulary_size
from memlm.models.vocabularies import Alignment, align_vocabularies
from memlm.stage import Stage, StageSpec, run_stage

_CARD = """
This is not a language model, and not yet a memory to be used: its rows of embeddings and head are new, and it was not
trained since. Go on with `memlm train TARGETS --init THIS_FOLDER`, on targets of a teacher with the new tokenizer.

| | |
|---|---|
| memory | {memory} |
| tokenizer | {tokenizer} |
| parameters | {parameters:,} |
| tokens | {tokens} |
"""


class _TrainingFacts(Facts):
    epochs: float | None = None
    original_epochs: float | None = None
    """Those of the memory it was before it was adapted."""


def adapt_memory(
    memory: str | Path, *, tokenizer: str, out: str | Path, config: AdaptConfig | None = None, **settings: Any
) -> Manifest:
    """Give a Memory Decoder the vocabulary of another tokenizer, and write it to `out`, to be trained on.

    Its body stays. A token that both vocabularies have keeps its rows, any other gets the mean of its pieces' rows
    under the old tokenizer. It votes well only after `train_memory(targets, init=out)`, with targets of a teacher of
    the new tokenizer.

    Args:
        memory: What `memlm train` wrote, a hub id of one, or any causal LM.
        tokenizer: The other tokenizer: a model's path, hub id or packaged name.
        out: Folder to write.
        config: Default settings if None; or give them as keywords.

    Raises:
        ConfigError: It has that tokenizer already, or is no Memory Decoder.
        ModelError: The memory or the tokenizer cannot be reached.
        OutputExistsError: `out` holds something else.

    Source: Memory Decoder, cross-vocabulary adaptation (arXiv:2508.09874), which draws all rows at random.
    """
    config = settings_from(AdaptConfig, config, settings)
    name = str(memory)
    there = read_settings(name)
    if there is not None and there.kind != MemoryDecoder.kind:
        raise ConfigError(
            f"memory {name} is of kind {there.kind!r}: only a Memory Decoder can be carried to another tokenizer;"
            " make this one anew with a model of that tokenizer"
        )
    old, new = load_tokenizer(resolve(name)), load_tokenizer(resolve(tokenizer))
    if fingerprint(old) == fingerprint(new):
        raise ConfigError(f"memory {name} has the tokenizer of {tokenizer} already; use it as it is")
    spec = StageSpec(
        "memory",
        config=config.model_dump(),
        inputs={"memory": model_identity(name)},
        tokenizer=fingerprint(new),
        sources={"memory": name, "tokenizer": tokenizer},
    )

    def work(stage: Stage) -> dict[str, Any]:
        source = load_memory(name, with_head=False)
        assert isinstance(source, MemoryDecoder)
        tokens = replace_vocabulary(source.decoder, old, new, config)
        changed = {"vocab_size": vocabulary_size(new), "tokenizer": fingerprint(new)}
        unknown = {"mix_weight": None, "validated_with": None}  # they were chosen with the old tokenizer's base
        adapted = MemoryDecoder(source.decoder, source.settings.model_copy(update=changed | unknown))
        parameters = sum(p.numel() for p in adapted.parameters())
        adapted.save_pretrained(stage.path)
        new.save_pretrained(stage.path)
        head = CARD_HEAD.format(tag="memory-decoder", title="A memory on its way to another tokenizer")
        rest = _CARD.format(**stage.sources, parameters=parameters, tokens=tokens_line(tokens))
        stage.save_text(CARD_FILE, head + rest)
        return {"parameters": parameters, "tokens": tokens, **_epochs(name, config)}

    return run_stage(out, spec, work)


def tokens_line(tokens: dict[str, int]) -> str:
    """Where the rows of the new tokens come from, in words."""
    words = {
        "shared": "of the same token",
        "role": "of the token of the same role",
        "pieces": "the mean of their pieces",
        "bytes": "the mean of their bytes",
        "unknown": "the mean of all",
        "random": "random",
    }
    parts = [f"{tokens[name]:,} {text}" for name, text in words.items() if tokens.get(name)]
    return f"{tokens['total']:,}, their rows: {', '.join(parts)}"


def _epochs(memory: str, config: AdaptConfig) -> dict[str, float]:
    """How long the memory was trained, and how long training should go on; nothing where that is not known."""
    folder = resolve(memory)
    if not is_artifact(folder):
        return {}
    facts = _TrainingFacts.of(folder, read_manifest(folder))
    original = facts.epochs if facts.original_epochs is None else facts.original_epochs
    return {} if original is None else {"original_epochs": original, "epochs_ahead": round(original * config.budget, 4)}


@torch.no_grad()
def replace_vocabulary(
    model: PreTrainedModel, old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, config: AdaptConfig
) -> dict[str, int]:
    """Give `model` rows for the tokens of `new` in place of those of `old`.

    Embeddings and head change, each from its own rows where they are not tied, and the ids of BOS, EOS and padding.
    Output rows beyond the old tokenizer's ids are padding and are left out of every mean.

    Returns:
        New tokens, `total` and by where their rows come from.
    """
    size = vocabulary_size(new)
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    assert isinstance(embeddings, Tensor)
    assert isinstance(head, nn.Linear)
    check_plain_head(Head(head), type(model).__name__)
    make_rows, counts = _row_maker(model, old, new, config)
    inputs = make_rows(embeddings)
    outputs = inputs if head.weight is embeddings else make_rows(head.weight)
    bias = None if head.bias is None else make_rows(head.bias[:, None])[:, 0]

    model.resize_token_embeddings(size, mean_resizing=False)
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    model.get_input_embeddings().weight.copy_(inputs)  # type: ignore[operator]
    head.weight.copy_(outputs)
    if bias is not None:
        head.bias.copy_(bias)
    ids = {f"{role}_token_id": getattr(new, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    for settings in (model.config, model.config.get_text_config()):
        settings.update(ids)
    model.generation_config = GenerationConfig(**ids)  # anything else it said of ids was of the old vocabulary
    return {"total": size, **counts}


def _row_maker(
    model: PreTrainedModel, old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, config: AdaptConfig
) -> tuple[Callable[[Tensor], Tensor], dict[str, int]]:
    """What turns a table of old rows into one of new rows, and the new tokens by where their rows come from."""
    size = vocabulary_size(new)
    if config.rows == "random":
        std = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
        generator = torch.Generator().manual_seed(config.seed)
        return lambda table: (torch.randn(size, table.shape[1], generator=generator) * std).to(table), {"random": size}
    used = min(vocabulary_size(old), len(model.get_input_embeddings().weight))  # type: ignore[arg-type]
    alignment = align_vocabularies(old, new, old_rows=used)
    return lambda table: mean_rows(table[:used], alignment), alignment.counts


def mean_rows(table: Float[Tensor, "V D"], alignment: Alignment) -> Float[Tensor, "V2 D"]:
    """For each new token the mean of its pieces' rows in `table`; of all rows where it has no pieces."""
    counts = torch.tensor([len(pieces) for pieces in alignment.pieces])
    ids = torch.tensor([id_ for pieces in alignment.pieces for id_ in pieces], dtype=torch.long)
    found = embedding_bag(ids, table.float(), counts.cumsum(0) - counts, mode="mean")
    found[counts == 0] = table.float().mean(0)
    return found.to(table.dtype)
