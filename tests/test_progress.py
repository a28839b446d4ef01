"""Progress where no terminal is there to draw in."""

import re
import sys

import pytest

from memlm.progress import note, progress_bar, told_to


@pytest.fixture(autouse=True)
def _lines_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memlm.progress.LINE_SECONDS", 0.0)


def test_a_log_gets_a_line_now_and_then_with_count_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(400_000, "teacher pass", initial=100_000) as bar:
        bar.set_postfix({"loss": "2.500"}, refresh=False)
        bar.update(150_000)
    (line,) = capsys.readouterr().err.splitlines()  # and not once more at the end
    assert re.fullmatch(r"teacher pass: 250,000 of 400,000 tok, [\d,]+ tok/s, 00:0\d left, loss=2.500", line)


def test_what_an_earlier_run_has_done_is_in_no_rate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([0.0, 0.0, 10.0, 10.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times, 10.0))
    monkeypatch.setattr("memlm.progress.LINE_SECONDS", 5.0)
    with progress_bar(2000, "searching", initial=1000) as bar:
        bar.update(100)
    assert capsys.readouterr().err.splitlines()[0] == "searching: 1,100 of 2,000 tok, 10 tok/s, 01:30 left"


def test_the_first_line_comes_soon_and_others_at_their_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("memlm.progress.LINE_SECONDS", 30.0)
    with progress_bar(100, "searching") as bar:
        for _ in range(100):
            now[0] += 1
            bar.update(1)
    counts = re.findall(r"^searching: (\d+) of 100 tok", capsys.readouterr().err, re.MULTILINE)
    assert counts == ["5", "35", "65", "95", "100"]


def test_work_that_is_done_soon_leaves_no_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memlm.progress.LINE_SECONDS", 30.0)
    with progress_bar(10, "searching") as bar:
        bar.update(10)
    assert capsys.readouterr().err == ""


def test_an_unknown_total_is_not_made_up(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(0, "tokenising") as bar:
        bar.update(5)
    assert re.match(r"tokenising: 5 tok, [\d,]+ tok/s\n", capsys.readouterr().err)


def test_a_notebook_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    with progress_bar(10, "searching") as bar:
        bar.update(10)
    assert "searching: 100%|" in capsys.readouterr().err


def test_a_listener_hears_all_and_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    heard = []
    with told_to(lambda *what: heard.append(what)), progress_bar(10, "searching") as bar:
        note("nothing to do")
        bar.update(4)
    assert heard == [("searching", 0, 10), ("searching", 4, 10)]
    assert capsys.readouterr().err == ""
