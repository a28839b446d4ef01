"""The card of a memory: what it was made from, how good it is, how to load it; and its way to the hub."""

import json
from pathlib import Path
from typing import Any

from memlm.errors import ArtifactError
from memlm.files import lasting_name, links_in
from memlm.manifest import GATE_FILE, MANIFEST, RUN, check_payload, is_artifact, read_manifest
from memlm.memory.gain import gain_line
from memlm.memory.protocol import MemorySettings
from memlm.text import as_markdown

CARD_FILE = "README.md"

CARD_HEAD = """---
library_name: memlm
tags:
- memlm
- {tag}
---

# {title}
"""
"""How every card begins, which `push_to_hub` knows by the library's name."""

_TEMPLATE = """
This is not a language model to be served alone. It is a *memory*: it votes on the next token beside a frozen base,
`p = w * p_memory + (1 - w) * p_base`.

```python
from memlm import MixedLM

model = MixedLM.from_pretrained({base}, memory="THIS_FOLDER_OR_HUB_ID")  # weighed token by token
```

{fixed}

{serves}

## From what

| | |
|---|---|
| kind | {settings.kind}, {facts[parameters]:,} parameters |
| start | {start} |
| teacher | {teacher} |
| corpus | {documents}; {train[tokens]:,} training tokens of {train[documents]:,} documents |
| targets | {targets} |
| training | {training} |
| context | {settings.context_length} tokens |

## How good

{figures}
"""


def memory_card(
    settings: MemorySettings, facts: dict[str, Any], sources: dict[str, str], config: dict[str, Any]
) -> str:
    """The card as Markdown, its `library_name` memlm, so that no hub widget serves the memory alone by mistake.

    Args:
        facts: What training found out; `config` are its settings.
        sources: Names of corpus, teacher, start model and base.
    """
    if sources.get("teacher") == lasting_name(sources["base"]):
        sources = {**sources, "teacher": sources["base"]}  # as typed: equal runs elsewhere give equal cards
    base, sources = json.dumps(sources["base"]), {name: as_markdown(source) for name, source in sources.items()}
    targets = facts.get("targets_config")
    if config["kl_weight"] == 0:
        made = "none: plain fine-tuning"
    elif targets and targets.get("teacher_share") == 1:
        folds = targets.get("folds")
        of_folds = f"teachers of {folds} folds say of the documents that they have not read"
        made = f"what {of_folds if folds else 'the teacher says of the text'}; no neighbours"
    elif targets and "k" in targets:
        own = " and their document" if targets["exclude_document"] else ""
        made = f"k {targets['k']}, temperature {targets['target_temperature']:g}, without the position itself{own}"
        if share := targets.get("teacher_share"):
            made += f"; the teacher's own distribution has a share of {share:g}"
    else:
        made = "imported"
    tag = {"decoder": "memory-decoder", "mlp": "mlp-memory"}.get(settings.kind, settings.kind)
    return CARD_HEAD.format(tag=tag, title="A memory for frozen language models") + _TEMPLATE.format(
        base=base,
        settings=settings,
        facts=facts,
        sources=sources,
        train=facts["corpus"]["splits"]["train"],
        fixed=_fixed(settings.mix_weight),
        serves=_serves(settings, sources),
        start=_start(config, sources),
        teacher=sources.get("teacher", "none"),
        documents=sources.get("documents", "unknown"),
        targets=made,
        training=f"kl_weight {config['kl_weight']}, {facts['epochs']:g} epochs,"
        f" learning rate {config['learning_rate']:g}, seed {config['seed']}",
        figures=_figures(facts, sources),
    )


def _serves(settings: MemorySettings, sources: dict[str, str]) -> str:
    if settings.tap is None:
        return "Any causal language model with the same tokenizer can stand in for the base."
    return f"It reads `{settings.tap}` of {sources['base']} and serves this base alone."


def _fixed(weight: float | None) -> str:
    chosen = "=w`" if weight is None else f"={weight}`, which validation text chose,"
    return (
        f"`mix_weight{chosen} fixes the weight at every token instead, which harms text outside of the corpus's domain."
    )


def _start(config: dict[str, Any], sources: dict[str, str]) -> str:
    if "init" not in sources:
        takes_head = config["kind"] == "mlp" and config["head"] != "random"
        return "fresh, head of the base where the widths are equal" if takes_head else "fresh"
    notes, layers = [], config["layers"]
    if layers is not None:
        notes.append(f"{layers if isinstance(layers, int) else len(layers)} layers")
    if config["fresh"]:
        notes.append("random weights")
    return sources["init"] + (f" ({', '.join(notes)})" if notes else "")


def _figures(facts: dict[str, Any], sources: dict[str, str]) -> str:
    if "validation" not in facts:
        return "No validation split was held out."
    line = gain_line(facts, f"base {sources['base']}")
    return (
        f"{line[:1].upper()}{line[1:]}. The weight was chosen on the same tokens; `memlm evaluate perplexity` gives"
        " figures on the test split."
    )


def push_to_hub(folder: str | Path, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Upload a finished memory folder with its card; returns its address.

    Args:
        folder: What `memlm train` wrote.
        repo_id: `user/name` on the hub; made where it does not exist.
        private: Visibility of a new repository; the account's default if None.
        token: Access token; the stored one if None.

    Raises:
        ArtifactError: The folder is no finished memory or is damaged, has no card, or holds a link.
    """
    folder, chosen = Path(folder), {}
    if is_artifact(folder):
        manifest = read_manifest(folder, "memory")
        check_payload(folder, manifest)
        chosen["allow_patterns"] = sorted({*manifest.payload, MANIFEST, CARD_FILE, GATE_FILE})
    if links := links_in(folder):
        raise ArtifactError(f"{links[0]} is a link: what it leads to would be uploaded; delete it")
    card = folder / CARD_FILE
    if not card.is_file() or "library_name: memlm" not in card.read_text(encoding="utf-8"):
        raise ArtifactError(f"{folder} has no card that names memlm as its library; push what memlm train wrote")
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=[RUN], **chosen))
