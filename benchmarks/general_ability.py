"""What a memory does to general ability: tasks of classification, for the base, the fixed weight and the gate.

`python -m benchmarks.general_ability FOLDER --base smollm2 --memory m/` runs those of the papers' tasks whose labels
are told by words and whose files are below a folder, and pools the ones in which the base alone is above chance.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.report import hardware, one_line_errors
from memlm.errors import InputError
from memlm.evaluate.papers import PREFIX, TASKS
from memlm.evaluate.tasks import BASE, evaluate_tasks, tasks_table
from memlm.files import write_json


def chances(folder: Path) -> dict[str, float]:
    """Task to what chance gives, of those whose files are there.

    Raises:
        InputError: There are none.
    """
    labelled = {name: task for name, task in TASKS.items() if task.words}
    found = {}
    for name, task in labelled.items():
        if any((folder / place).is_file() for place in task.files):
            found[PREFIX + name] = 1 / len(task.words)
        else:
            print(f"{name}: no {folder / task.files[0]}; left out", file=sys.stderr)
    if not found:
        raise InputError(f"{folder} holds none of the tasks {', '.join(labelled)}")
    return found


@one_line_errors
def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status is 1 where something is wrong."""
    assert __doc__
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.general_ability", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the tasks' folders are")
    parser.add_argument("--base", required=True)
    parser.add_argument("--memory", required=True)
    parser.add_argument("--gate", help="default as the memory has it")
    parser.add_argument("--limit", type=int, default=100, help="items of a task at most; default 100")
    parser.add_argument("--seed", type=int, default=0, help="draws the items")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, help="file for the report")
    given = parser.parse_args(arguments)
    above = chances(given.folder)
    asked = {"base": given.base, "memory": given.memory, "gate": given.gate, "dtype": given.dtype}
    report = evaluate_tasks(list(above), data=given.folder, limit=given.limit, seed=given.seed, above=above, **asked)
    report["chance"], report["machine"] = above, hardware()
    print(tasks_table(report))
    known = [task for task, chance in above.items() if report["tasks"][task]["values"][BASE]["interval"][0] > chance]
    print(f"pooled: {', '.join(known) or 'none'}, where the base alone is above chance")
    if given.out is not None:
        write_json(given.out, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
