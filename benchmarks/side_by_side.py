"""Two studies and a comparison of a million tokens, together: `python -m benchmarks.side_by_side`.

Steps of small models leave an accelerator waiting for its host, which several processes may fill. What keeps it busy
by itself gains nothing: an exact search beside two trainings took 3.5 times what it takes alone.
Each command starts when those it builds on have ended; what they find is in files below `--work` at once. The same call
again goes on where the one before was cut off.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

_ROOT = Path(__file__).parents[1]
_STUDIES = {name: f"benchmarks/studies/{name}-million.yaml" for name in ("medquad", "contracts")}
_NO_LIVE = ("--set", "study.live_k=[]")
ARMS = ("twin", "mixture", "mixed", "imitation")
_FROM_TARGETS = ("mixed", "imitation")
_QUICK = ("medquad-corpora", "medquad-twin")


@dataclass(frozen=True)
class Command:
    """One process."""

    name: str
    arguments: tuple[str, ...]
    """Of Python; `{work}` stands for the folder of runs."""
    after: tuple[str, ...] = ()
    """Commands that must have ended."""
    ended: Event = field(default_factory=Event, compare=False)


def _study(name: str, study: str, *arguments: str, after: tuple[str, ...] = ()) -> Command:
    results = f"{{work}}/{Path(study).stem}.jsonl"
    shared = ("--work", "{work}/study", "--results", results, "--keep-all")
    return Command(name, ("-m", "benchmarks.study", study, *shared, *arguments), after)


def _compare(name: str, *settings: str, after: tuple[str, ...]) -> Command:
    recipe = "recipes/accelerator/medquad-compare.yaml"
    given = [part for setting in settings for part in ("--set", setting)]
    return Command(name, ("-m", "benchmarks.recipe", recipe, "--out", "{work}/study/compare", *given), after)


def commands(corpora: Sequence[str] = tuple(_STUDIES)) -> list[Command]:
    """All, in the order in which they are started where several could be; the comparison is of MedQuAD."""
    found = []
    for corpus in corpora:
        study, ready = _STUDIES[corpus], f"{corpus}-corpora"
        found.append(_study(ready, study, "--prepare"))
        found.append(_study(f"{corpus}-targets", study, "--prepare", "--arms", "mixed", after=(ready,)))
        for arm in ARMS:
            after = (f"{corpus}-targets" if arm in _FROM_TARGETS else ready,)
            if arm == "imitation" and corpus != corpora[0]:  # it searches again; one corpus wholly, not two in part
                after = (*after, f"{corpora[0]}-all")
            found.append(_study(f"{corpus}-{arm}", study, *_NO_LIVE, "--arms", arm, after=after))
    for corpus in corpora:
        study, arms = _STUDIES[corpus], ARMS if corpus == corpora[0] else ARMS[:-1]
        done = tuple(f"{corpus}-{arm}" for arm in arms)
        found.append(_study(f"{corpus}-live", study, "--arms", after=(f"{corpus}-imitation",)))  # of the same targets
        found.append(_study(f"{corpus}-all", study, *_NO_LIVE, "--arms", *arms, after=done))
        more = ("--search-once", *_NO_LIVE, "--arms", "twin", "mixed", "--seeds", "1", "2")
        found.append(_study(f"{corpus}-more-seeds", study, *more, after=(f"{corpus}-twin", f"{corpus}-mixed")))
    if "medquad" not in corpora:
        return found
    untimed = "compare.timed_tokens=0"
    found.append(_compare("tuned-bases", "compare.rows=[dapt, lora]", untimed, after=("medquad-all",)))
    found.append(_compare("mlp", "compare.rows=[mlp]", untimed, after=("tuned-bases",)))
    found.append(_compare("compare", untimed, after=("mlp",)))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run all; the exit status is 1 where one failed or ran out of time."""
    assert __doc__
    parser = argparse.ArgumentParser(prog="python -m benchmarks.side_by_side", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/side-by-side"), help="default runs/side-by-side")
    parser.add_argument("--minutes", type=float, default=60.0, help="what is running then is ended; default 60")
    parser.add_argument("--corpora", nargs="+", choices=_STUDIES, default=list(_STUDIES), help="default both")
    parser.add_argument("--quick", action="store_true", help="toy size, on random words with a random model")
    given = parser.parse_args(arguments)
    work, end, began = given.work.resolve(), time.monotonic() + 60 * given.minutes, time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    there = [command for command in commands(given.corpora) if not given.quick or command.name in _QUICK]
    by_name = {command.name: command for command in there}
    threads = str(max(1, (os.cpu_count() or 1) // 4))
    paths = os.pathsep.join([str(_ROOT / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    settings = {"OMP_NUM_THREADS": threads, **os.environ, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "true"}

    def run(command: Command) -> bool:
        try:
            for name in by_name.keys() & set(command.after):
                by_name[name].ended.wait()
            arguments = [part.replace("{work}", str(work)) for part in command.arguments]
            log = work / f"{command.name}.log"
            with log.open("a", encoding="utf-8") as printed:
                whole = [sys.executable, *arguments, *(["--quick"] if given.quick else [])]
                left = max(0.0, end - time.monotonic())
                status = subprocess.run(
                    whole, cwd=_ROOT, env=settings, stdout=printed, stderr=subprocess.STDOUT, timeout=left, check=False
                ).returncode
        except subprocess.TimeoutExpired:
            status = -1
        finally:
            command.ended.set()
        state = "ok" if status == 0 else f"failed, see {log}"
        print(f"{time.monotonic() - began:6.0f} s  {command.name}: {state}", flush=True)
        return status == 0

    with ThreadPoolExecutor(len(there)) as pool:
        bad = not all(list(pool.map(run, there)))
    for results in sorted(work.glob("*.jsonl")):
        print(results.read_text(encoding="utf-8"), end="")
    if (report := work / "study" / "compare" / "report.json").is_file():
        print(json.dumps(json.loads(report.read_text(encoding="utf-8"))))
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
