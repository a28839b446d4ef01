"""What a memory carried to another tokenizer is worth: adapted and from scratch at a tenth of the budget, and in full.

A memory of SmolLM2's vocabulary is carried to stories15M (Llama-2 vocabulary) on the same documents. Rows of the table:

| row | start | budget |
|---|---|---|
| `scratch-10` | random weights of the same shape | 10% |
| `pieces-10` | the memory, each token's rows from its pieces (memlm's default) | 10% |
| `random-10` | the memory, all rows random (as in the paper) | 10% |
| `scratch-100` | random weights of the same shape | 100% |

Each is mixed with stories15M at the weight that is best on validation, and measured on test. Documents go to splits by
the hash of their text, so test documents are none that the memory was trained on. It may know training documents beyond
--max-tokens, though, and their near-duplicates in the test split are then not left out: give as many tokens as it was
trained on to rule that out.

    python -m benchmarks.adapt_vocabulary --memory runs/medquad/memory --out runs/adapt

Source: Memory Decoder, cross-vocabulary adaptation (arXiv:2508.09874), which goes on for 10% of the budget.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from transformers.utils import logging

from benchmarks.stories import check
from memlm import adapt_memory, build_corpus, build_datastore, build_targets, evaluate_perplexity, train_memory
from memlm.corpus.config import CorpusConfig
from memlm.manifest import library_versions
from memlm.memory.config import AdaptConfig, DecoderStart
from memlm.runs.recipe import data_path
from memlm.targets.config import TargetsConfig
from memlm.train.config import TrainConfig


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--memory", required=True, help="memory of another tokenizer, from memlm train")
    parser.add_argument("--out", type=Path, required=True, help="folder for all stages; a stopped run goes on there")
    parser.add_argument("--documents", default="medquad/medquad.txt", help="text file below $MEMLM_DATA")
    parser.add_argument("--document-separator", default="\n\n")
    parser.add_argument("--max-tokens", type=int, default=200_000, help="of training; a tenth more in each other split")
    parser.add_argument("--epochs", type=float, default=2.0, help="the whole budget")
    parser.add_argument("--budget", type=float, default=0.1, help="share of it for the short rows")
    parser.add_argument("--teacher-epochs", type=float, default=0.0, help="fine-tune the teacher first; 0: as it is")
    parser.add_argument("--k", type=int, default=256)
    parser.add_argument("--target-temperature", type=float, default=4.0)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def run(settings: argparse.Namespace) -> dict[str, Any]:
    """Every stage, and the figures of all rows."""
    out, base = settings.out, check()["folder"]

    def stage(name: str) -> Path:
        print(f"{name} -> {out / name}", file=sys.stderr)
        return out / name

    corpus = stage("corpus")
    build_corpus(
        [data_path(settings.documents)],
        tokenizer=base,
        out=corpus,
        config=CorpusConfig(
            document_separator=settings.document_separator,
            block_size=256,  # as far as stories15M sees
            start_token="bos",
            max_tokens=settings.max_tokens,
            near_duplicate_ngram=32,
            near_duplicate_overlap=0.0,
            seed=0,  # that of the memory's corpus: its training documents stay training documents
        ),
    )
    common = {"learning_rate": settings.learning_rate, "batch_size": settings.batch_size, "seed": settings.seed}
    teacher = base
    if settings.teacher_epochs > 0:
        teacher = str(stage("teacher"))
        config = TrainConfig(kl_weight=0, epochs=settings.teacher_epochs, **common)
        train_memory(corpus, init=base, out=teacher, config=config)
    build_datastore(corpus, teacher=teacher, out=stage("datastore"))
    build_targets(
        out / "datastore",
        out=stage("targets"),
        config=TargetsConfig(k=settings.k, target_temperature=settings.target_temperature),
    )
    start: dict[str, dict[str, Any]] = {}
    for rows in ("pieces", "random"):
        config = AdaptConfig(rows=rows, budget=settings.budget, seed=settings.seed)
        folder = stage(f"start-{rows}")
        start[rows] = adapt_memory(settings.memory, tokenizer=base, out=folder, config=config).facts

    short = settings.epochs * settings.budget
    percent = f"{100 * settings.budget:g}"
    plan = {
        f"scratch-{percent}": ("pieces", True, short),  # a fresh start takes only the shape of it
        f"pieces-{percent}": ("pieces", False, short),
        f"random-{percent}": ("random", False, short),
        "scratch-100": ("pieces", True, settings.epochs),
    }
    table: dict[str, dict[str, Any]] = {}
    report: dict[str, Any] = {}
    for name, (rows, fresh, epochs) in plan.items():
        config = TrainConfig(start=DecoderStart(fresh=fresh), epochs=epochs, **common)
        init, folder = str(out / f"start-{rows}"), stage(f"memory-{name}")
        facts = train_memory(out / "targets", init=init, base=base, out=folder, config=config).facts
        report = evaluate_perplexity(corpus, base=base, memory=str(folder), out=stage(f"evaluation-{name}"))
        table[name] = {
            "epochs": epochs,
            "steps": facts["steps"],
            **{part: report[part] for part in ("memory", "mixture", "ratio")},
        }
    return {
        "name": "adapt_vocabulary",
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in vars(settings).items()},
        "parameters": start["pieces"]["parameters"],
        "tokens": start["pieces"]["tokens"],
        "test_tokens": report["tokens"],
        "base": report["base"],
        "rows": table,
        "versions": library_versions(),
    }


if __name__ == "__main__":
    logging.disable_progress_bar()
    print(json.dumps(run(parse())))
