"""The report of an evaluation, and how it looks."""

import html
from typing import Any

from memlm.evaluate.plot import fixed_of, number, ratio_line, weights_of
from memlm.memory.config import UNNAMED, named
from memlm.scores.table import BASE

MIXTURE = "mixture"


class Report(dict[str, Any]):
    """What `evaluate_perplexity` found; a dictionary that notebooks show as a table."""

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(label)}</td><td>{number(row['perplexity'])}</td><td>{_interval(row)}</td></tr>"
            for label, row in _rows(self)
        )
        head = "<tr><th></th><th>perplexity</th><th>95% interval</th></tr>"
        return f"<table>{head}{rows}</table><small>{html.escape('; '.join(_notes(self)))}</small>"


def _rows(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What each row is called, and its figures."""
    memories = [(f"{name} alone", report[name]) for name in weights_of(report)]
    fixed = (f"mixture, weight {_shown(weights_of(report))}", fixed_of(report))
    rows = [("base alone", report[BASE]), *memories, fixed]
    if report[MIXTURE].get("gate", "none") != "none":
        rows.append((f"mixture, gate {report[MIXTURE]['gate']}", report[MIXTURE]))
    return rows


def _shown(weights: dict[str, float]) -> str:
    return ", ".join(f"{w:g}" if [*weights] == [UNNAMED] else f"{n} {w:g}" for n, w in weights.items())


def _interval(row: dict[str, Any]) -> str:
    return "" if row["interval"] is None else "{:.2f} to {:.2f}".format(*row["interval"])


def _notes(report: dict[str, Any]) -> list[str]:
    chosen = "chosen on validation" if fixed_of(report)["mix_weight_from"] == "validation" else "given"
    documents = f"{report['documents']:,} document{'s' if report['documents'] > 1 else ''}"
    single = "; no interval: one document" if report["documents"] == 1 else ""
    return [
        f"{ratio_line('mixture / base', report['ratio'])}{single}",
        f"{report['tokens']:,} test tokens of {documents}; mix_weight {chosen}",
        *([] if report[MIXTURE].get("gate", "none") == "none" else [_gate_line(report)]),
    ]


def _gate_line(report: dict[str, Any]) -> str:
    against = ratio_line("gate / fixed weight", report[MIXTURE]["ratio_to_fixed"])
    return f"{against}; mean weight under the gate {_shown(named(report[MIXTURE]['mean_weight']))}"


def report_table(report: dict[str, Any]) -> str:
    """The report as lines of text: perplexities with intervals and their ratio, then the split by label frequency."""
    rows = _rows(report)
    width = max(24, *(len(label) + 1 for label, _ in rows))
    lines = [f"{'':<{width}}{'perplexity':>12}   95% interval"]
    lines += [f"{label:<{width}}{number(row['perplexity']):>12}   {_interval(row)}".rstrip() for label, row in rows]
    lines += [*_notes(report), ""]
    columns = {name: max(10, len(name) + 2) for name in (BASE, *weights_of(report), MIXTURE)}
    heads = "".join(f"{name:>{wide}}" for name, wide in columns.items())
    lines.append(f"{'label seen in training':<24}{'tokens':>9}{heads}")
    for row in report["by_label_frequency"]:
        if row["below"] is None:
            span = f"{row['from']:,} times or more"
        else:
            span = "never" if row["from"] == 0 else f"{row['from']:,} to {row['below'] - 1:,} times"
        numbers = "".join(f"{number(row[name]):>{wide}}" for name, wide in columns.items())
        lines.append(f"{span:<24}{row['tokens']:>9,}{numbers}")
    return "\n".join(lines)
