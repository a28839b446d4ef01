"""How perplexity falls with a memory's size: `python -m benchmarks.scaling RESULTS.jsonl` fits what studies found.

The law is MLP Memory's, `PPL = (b * N) ** g` with N parameters, a line between logarithms; of each study, for the
memory alone and for its mixtures. The 95% interval of g is that of the line's slope, by its residuals: with four sizes
it is wide, and tells whether there is a law at all.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

WAYS = ("alone", "fixed", "posterior", "both")
_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}
"""Degrees of freedom to the 97.5% quantile of Student's t; beyond them the normal's."""


def fitted(sizes: Sequence[float], perplexities: Sequence[float]) -> dict[str, Any]:
    """The law through these points.

    Args:
        sizes: Parameters of each memory, three different ones at least.
        perplexities: One each.

    Raises:
        ValueError: There are too few sizes.
    """
    if len(set(sizes)) < 3:
        raise ValueError(f"{len(set(sizes))} sizes tell no law; three are needed at least")
    x, y = np.log(np.array(sizes, float)), np.log(np.array(perplexities, float))
    slope, start = np.polyfit(x, y, 1)
    freedom = len(x) - 2
    spread = math.sqrt(float(((y - start - slope * x) ** 2).sum()) / freedom / float(((x - x.mean()) ** 2).sum()))
    reach = _STUDENT.get(freedom, 1.96) * spread
    return {
        "exponent": round(float(slope), 5),
        "interval": [round(float(slope) - reach, 5), round(float(slope) + reach, 5)],
        "log_scale": None if slope == 0 else float(start / slope),
        "sizes": len(set(sizes)),
    }


def laws(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Study to its points, `parameters` and a perplexity each way, and to the `law` of each way."""
    sizes = {(line["study"], line["key"]): line["parameters"] for line in lines if line["what"] == "point"}
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line["what"] != "arm":
            continue
        point = {"arm": line["arm"], "parameters": sizes[line["study"], line["key"]]}
        point |= {way: line["in_domain"][way]["perplexity"] for way in WAYS}
        found.setdefault(line["study"], {"points": []})["points"].append(point)
    for study in found.values():
        points = study["points"]
        study["law"] = {way: fitted([p["parameters"] for p in points], [p[way] for p in points]) for way in WAYS}
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print points and laws; the exit status is 1 where there is nothing to fit."""
    assert __doc__
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="JSON lines of `python -m benchmarks.study`")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    try:
        text = given.results.read_text(encoding="utf-8")
        found = laws([json.loads(line) for line in text.splitlines() if line])
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {given.results}: {error}", file=sys.stderr)
        return 1
    if given.json:
        print(json.dumps(found))
        return 0
    for name, study in found.items():
        print(f"{name}\n{'arm':<14}{'parameters':>14}" + "".join(f"{way:>12}" for way in WAYS))
        for point in study["points"]:
            print(f"{point['arm']:<14}{point['parameters']:>14,}" + "".join(f"{point[way]:>12.3f}" for way in WAYS))
        for way, law in study["law"].items():
            low, high = law["interval"]
            print(f"{way}: PPL = (b N)^g, g {law['exponent']:.4f} ({low:.4f} to {high:.4f}) of {law['sizes']} sizes")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
