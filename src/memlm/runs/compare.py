"""What a memory gains over everything that could have been done instead: one comparison from one recipe."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from memlm.corpus.blocks import Corpus
from memlm.corpus.build import corpus_notes
from memlm.corpus.readers import find_sources, source_digest
from memlm.errors import MemlmError
from memlm.files import digest
from memlm.manifest import GATE_FILE, read_manifest
from memlm.memory.confidence import ConfidenceHead
from memlm.models.identity import model_identity
from memlm.runs.compare_recipe import CompareRecipe
from memlm.runs.comparison import write_comparison
from memlm.runs.figures import Figures
from memlm.runs.plan import make_step
from memlm.train.gate import FEWEST_DOCUMENTS, FEWEST_TOKENS, fit_gate


class Comparison(CompareRecipe):
    """A recipe's comparison: what has to be made for it, and the table."""

    def run(self, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
        """Make what is missing, and write `report.json`, `report.md`, `report.html` and a plot.

        Args:
            say: Told of each step before it starts.

        Returns:
            What `report.json` holds.
        """
        self.check_parts()
        there: dict[str, Path] = {}
        for step in self.steps:
            there[step.name] = make_step(self.out / step.name, step.plan(there), say)
            if step.name == "corpus":
                self.check_corpus(Corpus(there["corpus"]))  # and what training starts from
                for line in corpus_notes(read_manifest(there["corpus"])):
                    say(f"note: {line}")
        best = {
            row: min(points, key=lambda point: point.validation_perplexity(there))
            for row, points in self.points.items()
        }
        folders = {row: there[point.name] for row, point in best.items()}
        if "knn" in self.parts:
            folders["knn"] = there["datastore"]
        headed = self._with_heads(folders, Corpus(there["corpus"]), say)
        figures = Figures(self, there, best, folders | headed)
        say("scoring")
        report = figures.report()
        report["run"]["folders"] = {row: str(folder) for row, folder in folders.items()}
        write_comparison(report, self.out)
        if self.tasks is not None:
            report["tasks"] = figures.on_tasks(self.tasks, say)
            write_comparison(report, self.out)
        if self.config.timed_tokens:
            try:
                figures.time(report["rows"])
            except MemlmError as error:  # all else is there
                report["notes"] = [f"nothing was timed: {error}"]
            write_comparison(report, self.out)
        return report

    def _with_heads(self, folders: Mapping[str, Path], corpus: Corpus, say: Callable[[str], None]) -> dict[str, Path]:
        """The memories again, with heads that were fitted here; none without general text or enough held-out text.

        A head lies in a folder of the comparison's own, beside links to the memory's files: other runs may use that
        memory, and would find their mixtures changed.
        """
        texts, split = self.recipe.paths("compare", "general_fit"), corpus.split("validation")
        if not texts or split.n_positions < FEWEST_TOKENS or split.n_documents < FEWEST_DOCUMENTS:
            return {}
        separator, found = self.config.general_separator, {}
        for row in ("twin", "memory", "mlp"):
            if row not in folders:
                continue
            hashes = [read_manifest(folders[row]).hash, corpus.manifest.hash, model_identity(self.base)]
            key = digest([*hashes, source_digest(find_sources(texts)), separator, self.evaluate.dtype])
            place = self.out / "heads" / f"{row}-{key[:12]}"
            found[row] = place
            if ConfidenceHead.read(place) is not None:
                continue
            say(f"fitting a head for {row} -> {place}")
            _link_files(folders[row], place)
            fit_gate(
                place,
                corpus=corpus.folder,
                base=self.base,
                general=texts,
                dtype=self.evaluate.dtype,
                document_separator=separator,
                shared_documents=self.evaluate.shared_documents,
            )
        return found


def _link_files(folder: Path, out: Path) -> None:
    """Put the files of a finished folder into `out` too, but for a head; as links where the disk can."""
    for path in sorted(folder.resolve().rglob("*")):
        place = out / path.relative_to(folder.resolve())
        if path.is_dir() or path.name == GATE_FILE or place.exists():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, place)
        except OSError:
            shutil.copy2(path, place)
