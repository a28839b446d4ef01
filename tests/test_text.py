"""Text from elsewhere, made harmless where it is shown."""

import pytest

from memlm.text import as_markdown, printable, without_controls


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain — 東京 é\n\tindented", "plain — 東京 é\n\tindented"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("over\rwritten\x08", "over\\rwritten\\x08"),
        ("c1 \x9b31m", "c1 \\x9b31m"),
        ("right\u202eto left", "right\\u202eto left"),
        ("lone \udc80", "lone \\udc80"),
    ],
)
def test_control_characters_are_shown_as_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("data/medquad-2.jsonl", "data/medquad-2.jsonl"),
        ("a | b", "a \\| b"),
        ("[click](http://evil)", "\\[click\\](http://evil)"),
        ("<script>", "\\<script\\>"),
        ("*bold*\n# heading", "\\*bold\\* # heading"),
        ("\x1b[31m", "\\\\x1b\\[31m"),
    ],
)
def test_a_name_is_no_markup(text: str, line: str) -> None:
    assert as_markdown(text) == line


def test_what_a_model_says_commands_no_terminal_and_keeps_its_language() -> None:
    assert without_controls("a\x1b[31mb\r\x9b2J\n\tc") == "a\\x1b[31mb\\x0d\\x9b2J\n\tc"
    persian = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"  # with a joiner that shows nothing by itself
    assert without_controls(persian) == persian
