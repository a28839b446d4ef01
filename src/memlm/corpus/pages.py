"""The text of a web page."""

import re
from html.parser import HTMLParser
from typing import Any

_SILENT = frozenset({"script", "style", "template", "noscript"})  # what no reader sees
_LINES = frozenset("br li tr dt dd div option figcaption caption address".split())
"""Elements on a line of their own."""
_PARAGRAPHS = frozenset(
    """
    title p h1 h2 h3 h4 h5 h6 pre blockquote table ul ol dl hr section article main header footer nav aside figure form
    fieldset details summary body
    """.split()
)
"""Elements with an empty line around them."""
_REST = 1 << 13
"""Characters of a tag that never ends that are looked at for others: the parser takes the square of their number."""


def page_text(html: str) -> str:
    """What a reader sees of a page: its title and text, a line per block, without markup, scripts and styles.

    Of a long end that is one unfinished tag nothing is seen.
    """
    page = _Page()
    page.feed(html)
    if len(page.rawdata) <= _REST:
        page.close()
    return "".join(page.parts)


class _Page(HTMLParser):
    """Collects the text of a page in `parts`."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._silent = self._pre = 0  # elements around that are so
        self._line_ends = 0  # before the next text

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._silent += tag in _SILENT
        self._pre += tag == "pre"
        self._end_lines(tag)
        if tag in ("td", "th"):
            self.handle_data(" ")

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self._end_lines(tag)

    def handle_endtag(self, tag: str) -> None:
        self._silent = max(0, self._silent - (tag in _SILENT))
        self._end_lines(tag)
        self._pre = max(0, self._pre - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        if self._silent:
            return
        text = data if self._pre else re.sub(r"\s+", " ", data)
        if self._line_ends or not self.parts or self.parts[-1].endswith((" ", "\n")):
            text = text if self._pre else text.lstrip(" ")
        if not text:
            return
        if self._line_ends and self.parts:
            self.parts[-1] = self.parts[-1].rstrip(" ")
            self.parts.append("\n" * self._line_ends)
        self._line_ends = 0
        self.parts.append(text)

    def unknown_decl(self, data: str) -> None:
        """What a page declares is no text."""

    def parse_marked_section(self, i: int, report: Any = 1) -> int:
        try:
            return super().parse_marked_section(i, report)
        except AssertionError:  # on one that it does not know
            end = self.rawdata.find(">", i)
            return end + 1 if end >= 0 else -1

    def _end_lines(self, tag: str) -> None:
        self._line_ends = max(self._line_ends, 2 if tag in _PARAGRAPHS else 1 if tag in _LINES else 0)
