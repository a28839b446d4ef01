"""How a comparison looks: as Markdown, as a page that needs no network, and as a plot."""

import contextlib
import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memlm.evaluate.page import bold, heading, html_table, page, picture
from memlm.evaluate.plot import deterministic_figure
from memlm.files import replacing, write_json
from memlm.text import duration, size, table

_PLOT = "perplexity.png"
_TITLE = "What a memory is worth here"
_NOTES = (
    "**Bold**: the best, or not told apart from it (the 95% interval of their paired ratio holds 1). Documents are"
    " resampled for intervals. Weights, settings and checkpoints of every row are chosen on validation text."
)


def write_comparison(report: Mapping[str, Any], out: Path) -> None:
    """Write `report.json`, `report.md`, `report.html` and, where matplotlib is installed, a plot to `out`."""
    write_json(out / "report.json", dict(report))
    plot = None
    with contextlib.suppress(ImportError):
        deterministic_figure(lambda: comparison_figure(report), out / _PLOT)
        plot = out / _PLOT
    for name, text in (
        ("report.md", comparison_markdown(report, plot is not None)),
        ("report.html", comparison_html(report, plot)),
    ):
        with replacing(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def comparison_text(report: Mapping[str, Any]) -> str:
    """The tables as lines for a terminal."""
    parts = []
    for title, rows in _tables(report):
        parts += [title, *table([[cell.replace("**", "") for cell in row] for row in rows]), ""]
    return "\n".join([*parts, *_facts(report)])


def comparison_markdown(report: Mapping[str, Any], plot: bool) -> str:
    """The report as Markdown."""
    lines = [f"# {_TITLE}", "", *(f"- {fact}" for fact in _facts(report)), "", _NOTES, ""]
    for title, (head, *rows) in _tables(report):
        lines += [f"## {title}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
        lines.append("")
    if plot:
        lines += [f"![perplexities with their intervals]({_PLOT})", ""]
    return "\n".join(lines)


def comparison_html(report: Mapping[str, Any], plot: Path | None) -> str:
    """The report as one page; the plot is part of it."""
    body = ["<ul>", *(f"<li>{html.escape(fact)}</li>" for fact in _facts(report)), "</ul>"]
    body.append(f"<p><small>{bold(html.escape(_NOTES))}</small></p>")
    if plot is not None:
        body.append(picture(plot.read_bytes(), "perplexities with their intervals"))
    for title, rows in _tables(report):
        body += [heading(title), html_table(rows)]
    return page(_TITLE, body)


def comparison_figure(report: Mapping[str, Any]) -> Any:
    """Perplexity of every row on the test text with its interval, beside the base's."""
    from matplotlib.figure import Figure

    rows = [row for row in report["rows"] if "test" in row]
    figure = Figure(figsize=(9, 0.8 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    base = rows[0]["test"]["perplexity"]
    for place, row in enumerate(rows):
        found = row["test"]
        if found["perplexity"] is None:
            continue
        colour = "#b0413e" if found["best"] else "#1f5fa8"
        if found["interval"] is not None:
            axes.plot(found["interval"], [place, place], color=colour, linewidth=2, alpha=0.5)
        axes.plot([found["perplexity"]], [place], "o", color=colour)
    if base is not None:
        axes.axvline(base, color="#555555", linewidth=1)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(f"test perplexity and 95% interval, {report['test']['tokens']:,} tokens; red: best")
    axes.grid(alpha=0.3, axis="x")
    return figure


def _facts(report: Mapping[str, Any]) -> list[str]:
    run, test = report["run"], report["test"]
    facts = [
        f"base {run['base']}; {run['training_tokens']:,} training tokens, {run['validation_tokens']:,} validation",
        f"{test['tokens']:,} test tokens of {test['documents']:,} documents",
    ]
    if "general" in report:
        facts.append(f"{report['general']['tokens']:,} tokens of general text, which nothing here was chosen on")
    part = next((row["part"] for row in report["rows"] if "part" in row), None)
    if part is not None:
        base = part["base"]["perplexity"]
        facts.append(f"in-context retrieval: {part['tokens']:,} of the test tokens, where the base has {base:.2f}")
    if any("test" in row and row["test"]["interval"] is None for row in report["rows"]):
        facts.append("no intervals, and nothing is marked as best: one document, or no resampling")
    facts += report.get("notes", [])
    facts.append(f"precision {run['dtype']}; memlm {run['versions'].get('memlm', '?')}")
    return facts


def _tables(report: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """Title and rows, the first of them the head."""
    rows = report["rows"]
    quality = [["method", "weighed by", "perplexity", "95% interval", "over base", "95% interval", "bits per byte"]]
    quality[0] += ["general text over base"] if "general" in report else []
    for row in rows:
        found = row.get("test") or row["part"]
        cells = [row["title"], _way(row), _bold_if(found.get("best", False), _number(found["perplexity"], 2))]
        cells += [_interval(found["interval"], 2), _number(found["ratio"]["perplexity"], 4)]
        cells += [_interval(found["ratio"]["interval"], 4), _number(found.get("bits_per_byte"), 4)]
        if "general" in report:
            ratio = row["general"]["ratio"]["perplexity"] if "general" in row else None
            cells.append("" if ratio is None else f"{ratio - 1:+.2%}")
        quality.append(cells)
    costs = [["method", "settings", "parameters added", "trained on", "last training", "its disk", "stages before"]]
    costs[0] += ["time per token", "first token"]
    seen: set[str] = set()
    for row in rows:
        if row["row"] in seen:
            continue
        seen.add(row["row"])
        added, decoding = row.get("added", {}), row.get("decoding", {})
        tried = [f"{key} {value}" for found in added.get("settings", {}).values() for key, value in found.items()]
        speed = f"{1e3 / decoding['tokens_per_s']:.0f} ms" if decoding else ""
        speed += f"; drafted {1e3 / row['drafted']['tokens_per_s']:.0f} ms" if "drafted" in row else ""
        costs.append(
            [
                row["title"],
                ", ".join(tried),
                _count(added.get("parameters")),
                f"{added['training_tokens']:,} tokens" if added.get("training_tokens") else "",
                duration(added["seconds"]) if added.get("seconds") is not None else "",
                size(added["disk_bytes"]) if added.get("disk_bytes") else "",
                _before(added.get("before")),
                speed,
                f"{decoding['ttft_ms']:.0f} ms" if decoding else "",
            ]
        )
    tables = [("Perplexity", quality)]
    if report.get("bases"):
        beside = [["base", "parameters", "weighed by", "perplexity", "95% interval", "over that base", "95% interval"]]
        for row in report["bases"]:
            found = row["test"]
            way = "alone" if row["way"] == "alone" else f"with the memory, {row['way']}"
            cells = [row["base"], _count(row["parameters"]), way, _number(found["perplexity"], 2)]
            cells += [_interval(found["interval"], 2), _number(found["ratio"]["perplexity"], 4)]
            beside.append([*cells, _interval(found["ratio"]["interval"], 4)])
        tables.append(("One memory beside other bases", beside))
    if report.get("tasks"):
        tables.append(("Tasks", _tasks(report["tasks"])))
    tables.append(("What it costs", costs))
    if report.get("searched"):
        tried = [["row", "settings", "validation perplexity", ""]]
        for entry in report["searched"]:
            settings = ", ".join(f"{key} {value}" for key, value in entry["settings"].items())
            title = next(row["title"] for row in rows if entry["row"] in row["row"].split("+"))
            tried.append(
                [title, settings, _number(entry["validation_perplexity"], 4), "chosen" if entry["chosen"] else ""]
            )
        tables.append(("What was searched", tried))
    frequency = report.get("by_label_frequency") or []
    if frequency:
        labels = {f"{row['row']}|{row['way']}": [row["title"], _way(row)] for row in rows}
        spans = [
            "never"
            if row["from"] == 0
            else f"{row['from']:,} or more"
            if row["below"] is None
            else f"{row['from']:,} to {row['below'] - 1:,}"
            for row in frequency
        ]
        head = ["how often training had the token", "", *spans]
        tokens = ["tokens", "", *(f"{row['tokens']:,}" for row in frequency)]
        lines = [
            [*label, *(_number(row[name], 2) for row in frequency)]
            for name, label in labels.items()
            if name in frequency[0]
        ]
        tables.append(("Perplexity by how often training had the token", [head, tokens, *lines]))
    return tables


def _tasks(found: Mapping[str, Any]) -> list[list[str]]:
    """Ways as rows, tasks as columns; a memory stands under the gate."""
    tasks, pooled = found["tasks"], found["pooled"]
    head = [
        "method",
        *(f"{name.removeprefix('papers:')}: {task['metric']}" for name, task in tasks.items()),
        "mean",
        "over base in points",
        "95% interval",
    ]
    items = ["items", *(f"{task['items']:,}" for task in tasks.values()), f"{pooled['items']:,}", "", ""]
    lines = [head, items]
    for row, title in found["titles"].items():
        cells = [f"{task['values'][row]['value']:.3f}" for task in tasks.values()]
        change = pooled["change"].get(row)
        points = "" if change is None else f"{100 * change['value']:+.1f}"
        interval = None if change is None or change["interval"] is None else [100 * x for x in change["interval"]]
        lines.append([title, *cells, f"{pooled['values'][row]['value']:.3f}", points, _interval(interval, 1)])
    return lines


def _label(row: Mapping[str, Any]) -> str:
    return row["title"] if row["way"] == "alone" else f"{row['title']}, {row['way']}"


def _way(row: Mapping[str, Any]) -> str:
    return "" if row["way"] == "alone" else row["way"]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _interval(interval: list[float] | None, digits: int) -> str:
    return "" if interval is None else f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"


def _before(stages: Mapping[str, Any] | None) -> str:
    """What had to be made first, and may be shared."""
    if stages is None:
        return ""
    took = "?" if stages["seconds"] is None else duration(stages["seconds"])
    return f"{', '.join(stages['stages'])}: {took}, {size(stages['disk_bytes'])}"


def _count(parameters: int | None) -> str:
    return "" if parameters is None else f"{parameters / 1e6:,.1f}M"


def _bold_if(wanted: bool, text: str) -> str:
    return f"**{text}**" if wanted and text else text
