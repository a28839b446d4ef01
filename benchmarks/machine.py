"""What this machine is and lacks; SmolLM2 is fetched, so that no benchmark spends its time on that.

`python -m benchmarks.machine` prints a JSON line, and ends with 1 where a package that memlm imports is missing.
"""

import importlib.util
import json
import sys

REQUIRED = ("torch", "transformers", "accelerate", "datasets", "faiss", "filelock", "gguf", "jaxtyping", "numpy")
REQUIRED += ("pyarrow", "pydantic", "safetensors", "tqdm", "yaml", "zstandard")
OPTIONAL = {"typer": "the command line", "pytest": "tests", "peft": "fine-tuning as a baseline"}


def missing(names: tuple[str, ...]) -> list[str]:
    """Those of some packages that are not installed."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def main(*, quick: bool) -> int:
    """Print the line; the exit status."""
    lacking = missing(REQUIRED)
    found = {"name": "machine", "missing": lacking, "missing_optional": missing(tuple(OPTIONAL))}
    if not lacking:
        from benchmarks.report import hardware
        from memlm.manifest import library_versions
        from memlm.models.fetching import fetch

        found |= {"hardware": hardware(), "versions": library_versions()}
        found["model"] = None if quick else str(fetch("smollm2"))
    print(json.dumps(found))
    return int(bool(lacking))


if __name__ == "__main__":
    sys.exit(main(quick="--quick" in sys.argv[1:]))
