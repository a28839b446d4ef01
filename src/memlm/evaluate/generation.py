"""What comes out where text is gone on with: word for word what training had, or something of its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memlm.config import settings_from
from memlm.corpus.blocks import Corpus, Split
from memlm.errors import InputError, ModelError
from memlm.evaluate.config import GenerationConfig
from memlm.evaluate.decoding import decode
from memlm.evaluate.speakers import Speakers
from memlm.files import lasting_name
from memlm.mix.gate_config import GateConfig, GateName
from memlm.mix.mixed_lm import MixedLM
from memlm.models.loading import load_on_default_device
from memlm.models.tokenizers import check_same, load_tokenizer
from memlm.progress import progress_bar
from memlm.scores.table import BASE
from memlm.targets.config import RetrievalConfig
from memlm.text import table

_SPLITS = {"held_in": "train", "held_out": "test"}
_N = (1, 2, 3)  # of distinct n-grams
_REPEATED = 4  # n-grams that count as repetition


def evaluate_generation(
    corpus: str | Path,
    *,
    base: str | Path,
    memory: Any,
    gate: GateName | GateConfig | None = None,
    mix_weight: float | Mapping[str, float] | None = None,
    retrieval: RetrievalConfig | None = None,
    config: GenerationConfig | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Let base and mixture go on with passages of the training text and of held-out text, and see what comes.

    Passages are the beginnings of documents. A passage is recited where greedy decoding gives what the document goes
    on with, token for token. Held-out passages show how much of that is no more than predictable.

    Args:
        corpus: Folder of the corpus stage that the memory was trained on.
        base: Path, hub id or packaged name.
        memory: Folder, datastore or loaded memory, or name to any of these.
        gate: As `MixedLM` takes it. Where one weighs the memories, fixed weights are tried beside it.
        mix_weight: As `MixedLM` takes it.
        retrieval: How datastores are searched.
        config: Default settings if None; or give them as keywords.

    Returns:
        `ways`: `base`, `fixed` and the gate's name, and `text` for the documents' own words, each with `held_in` and
        `held_out`: `recited` (share of passages, with `interval`, Wilson's 95%), `matched` (tokens in agreement from
        the first on, on average), `distinct` (different n-grams over all, for n of 1, 2 and 3), `repeated` (share of
        4-grams that came before in the same continuation), and `judged` (perplexity under the judge, where there is
        one). `passages`: how many of each; `run`: what was asked for.

    Raises:
        InputError: A split has no document that is long enough.
        ModelError: One of them gives scores that are not finite.
        TokenizerMismatchError: Base, memory or judge has another tokenizer than the corpus.
    """
    config = settings_from(GenerationConfig, config, settings)
    source = Corpus(corpus)
    source.check_read_by(str(base))
    passages = {name: passages_of(source.split(split), config) for name, split in _SPLITS.items()}
    for name, found in passages.items():
        if not len(found):
            length = config.prompt_tokens + config.new_tokens
            raise InputError(f"the {_SPLITS[name]} split of {corpus} has no document of {length} tokens")
    options: Any = {"memory": memory, "mix_weight": mix_weight, "gate": gate}
    speakers = Speakers(MixedLM.on_default_device(base, dtype=config.dtype, retrieval=retrieval, **options))
    judge = None
    if config.judge is not None:
        check_same(source.tokenizer, load_tokenizer(config.judge), f"corpus {corpus}", f"judge {config.judge}")
        judge = load_on_default_device(config.judge, config.dtype)
    report: dict[str, Any] = {"ways": {}, "passages": {name: len(found) for name, found in passages.items()}}
    total = len(speakers.names) * sum(report["passages"].values())
    with progress_bar(total, "going on with passages", unit="passage") as bar:
        for way in speakers.names:
            speaker, report["ways"][way] = speakers[way], {}
            for name, found in passages.items():
                prompts, watched = found[:, : config.prompt_tokens], f"base {base}" if way == BASE else None
                said = _continued(speaker, prompts, config, bar, watched)
                report["ways"][way][name] = _told(found, said, config, judge)
    report["ways"]["text"] = {
        name: _told(found, found[:, config.prompt_tokens :], config, judge) for name, found in passages.items()
    }
    report["run"] = {
        "corpus": source.manifest.hash,
        "base": lasting_name(str(base)),
        **speakers.told,
        "config": config.model_dump(),
    }
    return report


def passages_of(split: Split, config: GenerationConfig) -> NDArray[np.int64]:
    """`(N, prompt + new)` beginnings of documents that are long enough, evenly spread over the split."""
    length = config.prompt_tokens + config.new_tokens
    starts = split.offsets[:-1][np.diff(split.offsets) >= length]
    chosen = np.unique(np.linspace(0, len(starts) - 1, min(config.passages, len(starts))).round().astype(int))
    return np.asarray(split.tokens)[starts[chosen, None] + np.arange(length)].astype(np.int64)


def generation_table(report: Mapping[str, Any]) -> str:
    """The report as lines of text."""
    lines = []
    for name, title in (("held_in", "passages of the training text"), ("held_out", "held-out passages")):
        rows = [["", "recited", "95% interval", "tokens in agreement", "distinct 1 2 3", "repeated", "judged"]]
        for way, both in report["ways"].items():
            found = both[name]
            low, high = found["interval"]
            judged = "" if found.get("judged") is None else f"{found['judged']:.2f}"
            distinct = " ".join(f"{value:.2f}" for value in found["distinct"])
            cells = [f"{found['recited']:.1%}", f"{low:.1%} to {high:.1%}", f"{found['matched']:.1f}", distinct]
            rows.append([way, *cells, f"{found['repeated']:.1%}", judged])
        lines += [f"{report['passages'][name]:,} {title}", *table(rows), ""]
    return "\n".join(lines).rstrip()


def distinct(said: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams over all n-grams of some continuations; 0 where there is none."""
    grams = [tuple(tokens[i : i + n]) for tokens in said for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repeated(said: Sequence[Sequence[int]], n: int = _REPEATED) -> float:
    """Share of n-grams that came before in the same continuation, on average over continuations."""
    shares = [1 - distinct([tokens], n) if len(tokens) >= n else 0.0 for tokens in said]
    return float(np.mean(shares)) if shares else 0.0


def wilson(successes: int, trials: int) -> list[float]:
    """95% interval of a share, which holds at 0 and 1 too."""
    z, share = 1.959964, successes / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * np.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2)) / (1 + z * z / trials)
    return [round(max(0.0, float(middle - half)), 4), round(min(1.0, float(middle + half)), 4)]


def _continued(
    model: Any, prompts: NDArray[np.int64], config: GenerationConfig, bar: Any, name: str | None
) -> NDArray[np.int64]:
    """`(N, new)` greedy continuations; none ends early."""
    found = []
    for start in range(0, len(prompts), config.batch_size):
        batch = torch.from_numpy(prompts[start : start + config.batch_size]).to(model.device)
        found.append(decode(model, batch, config.new_tokens, name=name).cpu().numpy())
        bar.update(len(batch))
    return np.concatenate(found).astype(np.int64)


def _told(passages: NDArray[np.int64], said: NDArray[np.int64], config: GenerationConfig, judge: Any) -> dict[str, Any]:
    """The figures of continuations of passages."""
    agree = said == passages[:, config.prompt_tokens :]
    recited = int(agree.all(1).sum())
    tokens = said.tolist()
    return {
        "recited": round(recited / len(said), 4),
        "interval": wilson(recited, len(said)),
        "matched": round(float(np.cumprod(agree, 1).sum(1).mean()), 3),
        "distinct": [round(distinct(tokens, n), 4) for n in _N],
        "repeated": round(repeated(tokens), 4),
        "judged": None if judge is None else round(_judged(judge, passages, said, config), 4),
    }


@torch.inference_mode()
def _judged(judge: Any, passages: NDArray[np.int64], said: NDArray[np.int64], config: GenerationConfig) -> float:
    """Perplexity of continuations under another model, given their prompts."""
    total = 0.0
    whole = torch.from_numpy(np.concatenate([passages[:, : config.prompt_tokens], said], 1))
    for start in range(0, len(whole), config.batch_size):
        batch: Tensor = whole[start : start + config.batch_size].to(judge.device)
        log_probs = judge(batch).logits[:, config.prompt_tokens - 1 : -1].float().log_softmax(-1)
        total += float(log_probs.gather(-1, batch[:, config.prompt_tokens :, None]).double().sum())
    if np.isnan(total):
        raise ModelError(f"judge {config.judge} gives no finite scores")
    return float(np.exp(-total / said.size))
