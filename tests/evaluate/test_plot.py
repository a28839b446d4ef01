"""The plot of an evaluation, and what an evaluation tells of a single document."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memlm.evaluate.config import EvaluateConfig
from memlm.evaluate.intervals import Resampled
from memlm.evaluate.plot import plot_report, report_figure
from memlm.evaluate.report import report_table
from memlm.scores.mixtures import GRID


def made(gain: float = 0.05, *, memory: float | None = 400.0, named: bool = False, **other: Any) -> dict[str, Any]:
    """A report of a mixture that is better than its base of 20 by `gain`."""
    best = 20 * (1 - gain)
    curve = np.where(GRID < 0.3, 20 - (20 - best) * GRID / 0.3, best + (GRID - 0.3) ** 2 * 500)
    names = ["law", "bio"] if named else ["memory"]
    alone = {"perplexity": memory, "interval": None if memory is None else [0.9 * memory, 1.1 * memory]}
    weight = {"law": 0.2, "bio": 0.1} if named else 0.3
    return {
        "base": {"perplexity": 20.4, "interval": [20.1, 20.7]},
        **dict.fromkeys(names, alone),
        "mixture": {
            "perplexity": 20.4 * (1 - gain),
            "interval": [20.1 * (1 - gain), 20.7 * (1 - gain)],
            "mix_weight": weight,
            "mix_weight_from": "validation",
        },
        "ratio": {"perplexity": 1 - gain, "interval": [0.99 - gain, 1.005 - gain]},
        "tokens": 1000,
        "documents": 9,
        "by_label_frequency": [],
        "validation": {"tokens": 900, "mix_weights": GRID.tolist(), "perplexities": curve.tolist()},
        **other,
    }


@pytest.mark.parametrize("gain", [0.05, 0.005, -0.02])
@pytest.mark.parametrize("memory", [400.0, 19.9, None])
@pytest.mark.parametrize("named", [False, True])
def test_a_gain_of_some_hundredths_fills_the_plot_whatever_the_memory_is_alone(
    gain: float, memory: float | None, named: bool
) -> None:
    report = made(gain, memory=memory, named=named)
    choice, result = report_figure(report).axes
    low, high = choice.get_ylim()
    if gain > 0:
        assert (20 - 20 * (1 - gain)) / (high - low) > 0.3
    low, high = result.get_xlim()
    if abs(gain) > 0.01:  # a smaller one is lost in the intervals of this report, which are shown whole
        assert abs(report["base"]["perplexity"] - report["mixture"]["perplexity"]) / (high - low) > 0.15
    assert low < min(20.4, 20.4 * (1 - gain)) <= max(20.4, 20.4 * (1 - gain)) < high
    names = [label.get_text() for label in result.get_yticklabels()]
    assert names == ["base", *(["law", "bio"] if named else ["memory"]), "mixture"]
    told = " ".join(text.get_text() for text in result.texts)
    assert ("off the scale" in told) == (memory != 19.9)


def test_validation_and_test_are_told_apart_and_the_base_is_a_line_in_both() -> None:
    choice, result = report_figure(made()).axes
    assert choice.get_title() == "validation, 900 tokens"
    assert result.get_title() == "test, 1,000 tokens: mixture / base 0.9500 (0.9400 to 0.9550)"
    assert [20.0, 20.0] in [np.asarray(line.get_ydata()).tolist() for line in choice.lines]
    assert [20.4, 20.4] in [np.asarray(line.get_xdata()).tolist() for line in result.lines]
    (band,) = result.patches
    box = band.get_extents().transformed(result.transData.inverted())
    assert (box.x0, box.x1) == pytest.approx((20.1, 20.7))
    assert any("chosen: 0.3" in text.get_text() for text in choice.texts)


def test_what_has_no_figure_can_be_drawn(tmp_path: Path) -> None:
    nothing = {"perplexity": None, "interval": None}
    empty = {"tokens": 0, "mix_weights": GRID.tolist(), "perplexities": None}
    infinite = made(base=nothing, memory=None, ratio=nothing, validation=empty)
    infinite["mixture"] |= nothing
    for number, report in enumerate((infinite, made(), made())):
        plot_report(report, tmp_path / f"{number}.png")
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()


def test_a_plot_leaves_no_file_in_the_home_folder_and_the_users_backend_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "temporary").mkdir()
    (tmp_path / "report.json").write_text(json.dumps(made()))
    program = """
import json, os, sys
from pathlib import Path
from memlm.evaluate.plot import plot_report
plot_report(json.loads(Path("report.json").read_text()), Path("plot.png"))
assert "MPLCONFIGDIR" not in os.environ
assert "matplotlib.pyplot" not in sys.modules
"""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MPL", "XDG"))}
    environment = {**clean, "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temporary")}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True, timeout=120)
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert not list((tmp_path / "home").iterdir())
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("document", [np.zeros(5, np.int64), np.full(5, 3)])
def test_a_single_document_has_no_interval(document: np.ndarray) -> None:
    """Also where others stand beside it that have nothing to predict."""
    parts = {"base": np.linspace(-3, -1, 5), "mixture": np.full(5, -1.5)}
    found = Resampled(document, parts, EvaluateConfig(bootstrap=50))
    assert found.perplexity("base") == {"perplexity": pytest.approx(np.exp(2), abs=1e-4), "interval": None}
    assert found.ratio("mixture", "base")["interval"] is None
    two = Resampled(np.array([0, 0, 0, 1, 1]), parts, EvaluateConfig(bootstrap=50))
    assert two.perplexity("base")["interval"] is not None


def test_the_table_tells_the_ratio_and_why_there_is_no_interval() -> None:
    assert "mixture / base 0.9500 (0.9400 to 0.9550)\n" in report_table(made())
    alone = made(documents=1)
    for part in ("base", "memory", "mixture", "ratio"):
        alone[part] = {**alone[part], "interval": None}
    assert "mixture / base 0.9500; no interval: one document\n1,000 test tokens of 1 document;" in report_table(alone)
