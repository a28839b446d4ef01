"""Text that came from elsewhere (documents, file names), made harmless where it is shown."""

import re


def printable(text: str) -> str:
    """`text` with control characters as escapes, so that a terminal obeys none; line ends and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def as_markdown(text: str) -> str:
    """`text` as one line of Markdown that shows it as it is, and is no markup."""
    line = printable(text).replace("\n", " ").replace("\t", " ")
    return re.sub(r"([\\`*_\[\]<>|~&])", r"\\\1", line)
