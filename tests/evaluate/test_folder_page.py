"""Pages about folders."""

import base64
import re
from pathlib import Path

from typer.testing import CliRunner

from memlm.cli import app
from memlm.evaluate.folder_page import folder_page, training_figure
from memlm.evaluate.perplexity import evaluate_perplexity
from memlm.manifest import read_manifest


def test_a_page_of_every_stage_is_whole_and_needs_no_network(
    corpus_folder: Path,
    datastore_folder: Path,
    targets_folder: Path,
    memory_folder: Path,
    model_folder: str,
    tmp_path: Path,
) -> None:
    out = tmp_path / "evaluation"
    report = evaluate_perplexity(corpus_folder, base=model_folder, memory=memory_folder, out=out, dtype="float32")
    page = folder_page([corpus_folder, datastore_folder, targets_folder, memory_folder, out], "a <run>")
    assert "<h1>a &lt;run&gt;</h1>" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    pictures = re.findall(r"base64,([A-Za-z0-9+/=]+)", page)
    assert [base64.b64decode(found)[:4] for found in pictures] == [b"\x89PNG"] * 2
    assert f"{report['mixture']['perplexity']:.2f}" in page
    recall = read_manifest(datastore_folder).facts["recall"]["value"]
    assert f"<td>recall · value</td><td>{recall}</td>" in page
    agreeing = read_manifest(targets_folder).facts["label_likeliest"]
    assert f"<td>label_likeliest</td><td>{agreeing}</td>" in page
    for entry in read_manifest(memory_folder).facts["validation"]["history"]:
        assert str(entry["mixture_perplexity"]) in page


def test_the_curves_are_those_of_training(memory_folder: Path) -> None:
    facts = read_manifest(memory_folder).facts
    left, right = training_figure(facts).axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in left.lines}
    assert drawn["loss"] == [[entry["step"], entry["loss"]] for entry in facts["training"]]
    mixture = next(line for line in right.lines if line.get_label() == "mixture").get_xydata().tolist()
    assert mixture == [[e["step"], e["mixture_perplexity"]] for e in facts["validation"]["history"]]


def test_the_command_writes_a_page_of_a_folder_or_of_a_run(memory_folder: Path, tmp_path: Path) -> None:
    for place, count in ((memory_folder, 1), (memory_folder.parent, 4)):
        told = CliRunner().invoke(app, ["info", str(place), "--html", str(tmp_path / "page.html")])
        assert told.exit_code == 0, told.output
        assert (tmp_path / "page.html").read_text(encoding="utf-8").count("<h2>") >= count
    nothing = CliRunner().invoke(app, ["info", str(tmp_path), "--html", str(tmp_path / "page.html")])
    assert nothing.exit_code != 0
