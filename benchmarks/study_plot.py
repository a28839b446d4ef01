"""What the studies found, as a picture: `python -m benchmarks.study_plot RESULTS.jsonl... --out PICTURE.png`.

On the left every arm's gated mixture over the gated mixture of the study's reference arm, in the domain: a dot per seed
with its 95% interval, of documents. On the right what the gate does to the reference arm's memory of each study: from
the weight that validation chose, where the arrow begins, to the gate, where it ends.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memlm.evaluate.plot import deterministic_figure

BAR = 0.97
"""A recipe that is better than the reference arm by this much was asked for."""
_COLORS = ("#1f5fa8", "#b0413e", "#3d8c57", "#8a5fb0", "#c98a1b", "#555555", "#2aa0a4", "#a03c78")


@dataclass
class Found:
    """The results of one study in one file."""

    name: str
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By the point's key; the last of each."""
    ratios: dict[str, dict[int, Mapping[str, Any]]] = field(default_factory=dict)
    """Arm to seed to what its gated mixture is over that of `against`."""
    against: str | None = None

    @property
    def reference(self) -> dict[str, Any]:
        """The first seed's line of the arm that others are compared to; of the only arm where none is."""
        lines = [line for line in self.arms.values() if self.against in (None, line["arm"])]
        return min(lines, key=lambda line: line["settings"]["train.seed"])


def read(files: Sequence[Path]) -> list[Found]:
    """Studies with an arm that was judged, in the order of the files.

    Raises:
        OSError: A file cannot be read.
        ValueError: A line is no JSON.
    """
    found: dict[tuple[Path, str, str], Found] = {}
    for file in files:
        for text in filter(None, file.read_text(encoding="utf-8").splitlines()):
            line = json.loads(text)
            study = found.setdefault((file, line["study"], line["hash"]), Found(line["study"]))
            if line["what"] == "arm":
                study.arms[line["key"]] = line
            elif line["what"] == "pairs":
                study.against = line["against"]
                seeds = {study.arms[key]["settings"]["train.seed"] for key in line["keys"] if key in study.arms}
                for arm, ratio in line["ratios"]["both"].items():
                    study.ratios.setdefault(arm, {}).update(dict.fromkeys(seeds, ratio))
    return [study for study in found.values() if study.arms]


def figure(studies: Sequence[Found]) -> Any:
    """The picture, see the module."""
    from matplotlib.figure import Figure

    rows = [(study, arm) for study in studies for arm in study.ratios]
    whole = Figure(figsize=(12, 1.6 + 0.24 * max(12, len(rows))), layout="constrained")
    left, right = whole.subplots(1, 2, width_ratios=(1.25, 1))
    colors = {id(study): _COLORS[at % len(_COLORS)] for at, study in enumerate(studies)}
    _draw_arms(left, rows, colors)
    _draw_gate(right, studies, colors)
    return whole


def _draw_arms(axes: Any, rows: Sequence[tuple[Found, str]], colors: Mapping[int, str]) -> None:
    for place, (study, arm) in enumerate(rows):
        seeds = sorted(study.ratios[arm])
        for at, seed in enumerate(seeds):
            ratio = study.ratios[arm][seed]
            value, (low, high) = ratio["perplexity"], ratio["interval"]
            height = place + 0.22 * (at - (len(seeds) - 1) / 2)
            axes.plot([low, high], [height, height], color=colors[id(study)], linewidth=1.2, alpha=0.6)
            axes.plot(value, height, "o", color=colors[id(study)], markersize=4)
    axes.axvline(1, color="#333333", linewidth=1)
    axes.axvline(BAR, color="#333333", linewidth=1, linestyle=":")
    axes.set_yticks(range(len(rows)), [f"{study.name}: {arm}" for study, arm in rows], fontsize=7.5)
    for label, (study, _) in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_color(colors[id(study)])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(
        "gated mixture in the domain, over the twin's (left of the dotted line: what was asked for)", fontsize=8
    )
    axes.set_title("what a memory is trained on", fontsize=10)


def _draw_gate(axes: Any, studies: Sequence[Found], colors: Mapping[int, str]) -> None:
    named: list[tuple[tuple[float, float], Found]] = []
    for study in studies:
        line, ends = study.reference, []
        for way in ("fixed", "both"):
            domain, general = line["in_domain"], line["general"]
            over = [part[way]["perplexity"] / part["base"]["perplexity"] for part in (domain, general)]
            ends.append((over[0], 100 * (over[1] - 1)))
        shape = {"arrowstyle": "-|>", "color": colors[id(study)], "linewidth": 1.4}
        axes.annotate("", ends[1], ends[0], arrowprops=shape)
        axes.plot(*ends[0], "o", color=colors[id(study)], markersize=4)
        named.append((ends[0], study))
    middle = sum(at[0] for at, _ in named) / len(named)
    for at, study in named:
        shift, side = ((-5, 3), "right") if at[0] > middle else ((5, 3), "left")
        look = {"textcoords": "offset points", "fontsize": 7.5, "color": colors[id(study)], "ha": side}
        axes.annotate(study.name, at, shift, **look)
    axes.axhline(0, color="#333333", linewidth=1)
    axes.margins(0.12)
    axes.set_xlabel("mixture over the base alone, in the domain", fontsize=8)
    axes.set_ylabel("general text: perplexity over the base's, %", fontsize=8)
    axes.set_title("from the fixed weight to the gate", fontsize=10)


def main(arguments: list[str] | None = None) -> int:
    """Draw; the exit status is 1 where there is nothing to draw."""
    assert __doc__
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study_plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS", help="files that benchmarks.study wrote")
    parser.add_argument("--out", type=Path, required=True, help="the picture, a PNG")
    given = parser.parse_args(arguments)
    try:
        studies = read(given.results)
        if not studies:
            raise ValueError("no arm was judged yet")
        deterministic_figure(lambda: figure(studies), given.out)
        return 0
    except (KeyError, OSError, ValueError) as error:
        print(f"error: {', '.join(map(str, given.results))}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
