"""Pages that need no network: tables and pictures in one HTML file, readable on a phone and in print."""

import base64
import html
from collections.abc import Sequence

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 80rem; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
.scroll { overflow-x: auto; margin-bottom: 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left }
thead th { border-bottom: 2px solid #888; vertical-align: bottom }
thead th, td.long { white-space: normal }
td.long { min-width: 10rem }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff }
img { max-width: min(100%, 52rem); height: auto }
small { color: #555 }
@media (max-width: 40rem) { body { font-size: 13px; margin: 1rem auto; padding: 0 .6rem }
  th, td { padding: .25rem .35rem }
  th:first-child, td:first-child { white-space: normal; min-width: 6.5rem } td.long { min-width: 8rem }
  td:nth-child(2):not(:last-child) { white-space: normal } }
@media print { body { margin: 0; max-width: none; font-size: 8px }
  .scroll { overflow: visible } td, th { padding: .2rem .3rem }
  tr, img { break-inside: avoid } h2 { break-after: avoid } }
"""
_LONG = 24  # characters from which on a cell may break into lines


def page(title: str, body: Sequence[str]) -> str:
    """A whole page of parts in HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n"
        + "\n".join([f"<h1>{html.escape(title)}</h1>", *body])
        + "\n</body></html>\n"
    )


def heading(text: str) -> str:
    """A heading of a part."""
    return f"<h2>{html.escape(text)}</h2>"


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is the head; `**text**` is bold."""
    head, *others = rows
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in others)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>\n{lines}</tbody></table></div>'


def _cell(text: str) -> str:
    kind = ' class="long"' if len(text) > _LONG else ""
    return f"<td{kind}>{bold(html.escape(text))}</td>"


def picture(png: bytes, told: str) -> str:
    """A picture as part of the page.

    Args:
        told: What it shows, for those who cannot see it.
    """
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(told)}" src="data:image/png;base64,{data}">'


def bold(text: str) -> str:
    """HTML of escaped text with `**bold**` parts."""
    parts = text.split("**")
    return "".join(part if number % 2 == 0 else f"<b>{part}</b>" for number, part in enumerate(parts))
