"""A recipe without the command line: `python -m benchmarks.recipe RECIPE --out FOLDER` prints its reports as JSON.

One with a section `compare` is compared, as `memlm compare` does. `--quick` keeps the recipe's sections and runs them
at toy size, on random words with a random model.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock
from transformers.utils import logging

from memlm.config import read_recipe
from memlm.runs.compare import Comparison
from memlm.runs.plan import run_recipe

_TOKENS = 12_000
_QUICK = {
    "corpus": {
        "document_separator": "\n",
        "block_size": 64,
        "stride": None,
        "validation_fraction": 0.2,
        "test_fraction": 0.2,
    },
    "teacher": {"max_steps": 4, "dtype": "float32"},
    "datastore": {"dtype": "float32", "index": "exact", "nlist": None, "nprobe": None, "keep_keys": True},
    "targets": {"k": 8},
    "train": {
        "layers": 1,
        "epochs": 1,
        "max_steps": 4,
        "batch_size": 4,
        "accumulation": 1,
        "dtype": "float32",
        "like": None,
    },
    "mlp": {"layers": 1, "max_steps": 4, "dtype": "float32"},
    "dapt": {"max_steps": 4},
    "lora": {"max_steps": 4, "lora_rank": 2},
    "compare": {"general_separator": "\n", "general_tokens": 2000, "timed_tokens": 2, "search": {}, "tasks": []},
    "retrieval": {"k": 8},
    "evaluate": {"dtype": "float32", "bootstrap": 10},
}


def quick_overrides(recipe: str, out: Path) -> list[str]:
    """Write a toy model and its text below `out`; returns the settings that put them in the recipe's place."""
    from benchmarks.stage_memory import write_documents, write_teacher

    documents, model = out / "documents.txt", out / "model"
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(out / ".lock"):  # studies side by side share it
        if not documents.exists():
            write_teacher(model)
            write_documents(documents, _TOKENS)
            lines = documents.read_text(encoding="utf-8").splitlines()
            backwards = "\n".join(" ".join(reversed(line.split())) for line in lines)
            (out / "general.txt").write_text(backwards, encoding="utf-8")
            (out / "general-fit.txt").write_text(backwards.replace(" ", "  "), encoding="utf-8")
            for split, is_last_first in (("validation", False), ("test", True)):
                held = " ".join(lines[: len(lines) // 8]).split()
                few = (held[at : at + 200] for at in range(0, len(held), 200))  # words of a document
                part = [" ".join(sorted(words, reverse=is_last_first)) for words in few]
                (out / f"{split}.txt").write_text("\n".join(part), encoding="utf-8")
    found = []
    for name, section in read_recipe(recipe).items():
        given: dict[str, Any] = {key: str(model) for key in section if key in ("tokenizer", "init", "teacher", "base")}
        given |= {"bases": str(model)} if "bases" in section else {}
        texts = {"general": "general.txt", "general_fit": "general-fit.txt"}
        texts |= {f"{split}_documents": f"{split}.txt" for split in ("validation", "test")}
        given |= {key: str((out / file).resolve()) for key, file in texts.items() if key in section}
        given |= {"documents": str(documents.resolve())} if name == "corpus" else {}
        for key, value in (given | _QUICK.get(name, {})).items():
            found.append(f"{name}.{key}={json.dumps(value)}")
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run a recipe, and print one JSON object: row name to report."""
    assert __doc__
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipe", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--out", type=Path, required=True, help="folder for its stages; finished ones are used again")
    parser.add_argument("--quick", action="store_true", help="toy size")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="another setting")
    given = parser.parse_args(arguments)
    logging.disable_progress_bar()
    overrides = quick_overrides(given.recipe, given.out) if given.quick else []
    sections = read_recipe(given.recipe, [*overrides, *given.set])

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    reports = (
        Comparison(sections, given.out).run(say) if "compare" in sections else run_recipe(sections, given.out, say=say)
    )
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
