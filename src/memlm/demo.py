"""The demo: the whole road on documentation strings of packages that are installed anyway."""

import ast
import hashlib
import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from memlm.corpus.blocks import Corpus
from memlm.evaluate.perplexity import report_table
from memlm.evaluate.scores import Scores, score_corpus
from memlm.manifest import library_versions
from memlm.mix.scoring import mixture_label_log_probs
from memlm.models.fetching import fetch
from memlm.runs.plan import run_recipe

PACKAGES = ("transformers", "torch")
MODEL = "smollm2"
_LONGEST = 2000  # characters of one module, so that no module fills the corpus
_SHORTEST = 300
_SHARE = 0.3  # of all modules, chosen by the hash of their names: parsing all takes a minute and is not needed
_PASSAGE_TOKENS = 48


def run_demo(out: str | Path, *, train_tokens: int, say: Callable[[str], None]) -> tuple[dict[str, Any], str]:
    """Fetch the model, build the corpus, train a memory, evaluate it.

    Args:
        out: Folder for everything.
        train_tokens: Training tokens.
        say: Told what starts.

    Returns:
        The report, as `evaluate_perplexity` gives it, and a text with table, passages and what to try next.
    """
    out = Path(out)
    say(f"model {MODEL} (135M parameters), fetched once")
    fetch(MODEL)
    documents = out / "docstrings.jsonl"
    if not documents.is_file():
        say(f"reading documentation strings of {' and '.join(PACKAGES)}")
        out.mkdir(parents=True, exist_ok=True)
        temporary = documents.with_suffix(".writing")
        rows = (json.dumps({"text": text}) + "\n" for text in docstrings())
        temporary.write_text("".join(rows), encoding="utf-8")
        temporary.rename(documents)
    report = run_recipe(demo_recipe(str(documents), train_tokens), out, say=say)["memory"]
    return report, "\n".join(
        [*_headline(report), "", report_table(report), "", *_passages(out, report), "", *_next(out, report)]
    )


def demo_recipe(documents: str, train_tokens: int) -> dict[str, dict[str, Any]]:
    """The demo as a recipe."""
    return {
        "corpus": {
            "documents": [documents],
            "tokenizer": MODEL,
            "block_size": 256,
            "stride": 192,
            "max_tokens": train_tokens,
            "max_validation_tokens": train_tokens // 8,
            "max_test_tokens": train_tokens // 6,
            "near_duplicate_ngram": 24,
            "near_duplicate_overlap": 0.1,
        },
        "datastore": {"teacher": MODEL},
        "targets": {"k": 256, "target_temperature": 4.0},
        "train": {"init": MODEL, "epochs": 1, "learning_rate": 1e-4, "batch_size": 4},
    }


def docstrings() -> Iterator[str]:
    """One document per module: its name, and each documented definition with its signature and documentation.

    Sources are parsed, nothing is imported.
    """
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue
        root = Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(root.rglob("*.py")):
            name = ".".join((package, *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
            if int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 >= _SHARE:
                continue
            text = _module_text(name, path)
            if len(text) >= _SHORTEST:
                yield text[:_LONGEST]


def _module_text(name: str, path: Path) -> str:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return ""
    parts = [ast.get_docstring(tree) or ""]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            if isinstance(node, ast.ClassDef):
                parts.append(f"class {node.name}\n{text}")
            else:
                parts.append(f"def {node.name}({ast.unparse(node.args)})\n{text}")
    body = "\n\n".join(part for part in parts if part)
    return f"{name}\n\n{body}" if len(body) >= _SHORTEST else ""


def _headline(report: dict[str, Any]) -> list[str]:
    base, mixture = report["base"]["perplexity"], report["mixture"]["perplexity"]
    low, high = report["ratio"]["interval"]
    return [
        f"Perplexity on held-out modules: {base:.2f} with the base alone, {mixture:.2f} with the memory beside it"
        f" ({1 - mixture / base:.0%} lower; 95% of resamplings of the documents: {1 - high:.0%} to {1 - low:.0%})."
    ]


def _passages(out: Path, report: dict[str, Any]) -> list[str]:
    """Three held-out passages: where the memory helped most, typically, and least."""
    corpus = Corpus(out / "corpus")
    split, tokenizer = corpus.split("test"), corpus.tokenizer
    settings = report["run"]["config"]
    shared = {"dtype": settings["dtype"], "batch_tokens": settings["batch_tokens"]}
    base: Scores = score_corpus(corpus, report["run"]["base"], beside=None, **shared)["test"]
    memory = score_corpus(corpus, report["run"]["memory"], beside=report["run"]["base"], **shared)["test"]
    mixed = mixture_label_log_probs(base.label, memory.label, report["mixture"]["mix_weight"])
    gain = mixed - base.label
    counts = np.bincount(base.document)
    means = np.bincount(base.document, weights=gain) / np.maximum(counts, 1)
    long_enough = np.flatnonzero(counts >= _PASSAGE_TOKENS)
    ranked = long_enough[np.argsort(-means[long_enough])]
    if not len(ranked):
        return []
    lines = []
    labels = split.labels()
    for title, document in zip(
        ("helped most", "typical", "helped least"), ranked[[0, len(ranked) // 2, -1]], strict=True
    ):
        places = np.flatnonzero(base.document == document)
        sums = np.convolve(gain[places], np.ones(_PASSAGE_TOKENS), "valid")
        start = int(
            sums.argmin() if title == "helped least" else sums.argmax() if title == "helped most" else len(sums) // 2
        )
        window = places[start : start + _PASSAGE_TOKENS]
        lines += [
            f"[{title}] {means[document]:+.2f} nats a token in this document",
            _indented(str(tokenizer.decode(labels[window]))),
        ]
        change = np.exp(mixed[window]) - np.exp(base.label[window])  # of the probability of the token that came
        order = window[np.argsort(-change)]
        for word, chosen in (("lifted", order[:4]), ("sank", order[::-1][:3])):
            moved = [
                f"{tokenizer.decode(labels[p])!r} {np.exp(base.label[p]):.1%} -> {np.exp(mixed[p]):.1%}" for p in chosen
            ]
            lines.append(f"    {word}: " + ", ".join(moved))
        lines.append("")
    return lines[:-1]


def _indented(text: str) -> str:
    return "\n".join("    | " + line for line in text.splitlines() if line.strip())


def _next(out: Path, report: dict[str, Any]) -> list[str]:
    versions = library_versions()
    return [
        f"plot: {out / 'evaluation-memory' / 'perplexity.png'}",
        f"made with torch {versions.get('torch')}, transformers {versions.get('transformers')},"
        f" {versions.get('threads')} threads",
        "try next:",
        f'  memlm generate "The generation config" --base {MODEL} --memory {out / "memory"} --max-new-tokens 60',
    ]


__all__ = ["PACKAGES", "demo_recipe", "docstrings", "run_demo"]
