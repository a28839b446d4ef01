"""The demo: the whole road on documentation strings of packages that are installed anyway."""

import ast
import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from memlm.corpus.build import build_corpus
from memlm.errors import ArtifactError
from memlm.evaluate.config import EvaluateConfig
from memlm.evaluate.passages import passages
from memlm.evaluate.perplexity import evaluate_perplexity
from memlm.evaluate.plot import weights_of
from memlm.evaluate.report import report_table
from memlm.files import read_json, replacing, write_json
from memlm.manifest import library_versions, read_manifest
from memlm.models.fetching import fetch
from memlm.models.loading import default_device, load_causal_lm, parse_dtype
from memlm.progress import told_to
from memlm.runs.plan import run_recipe

PACKAGES = ("transformers", "torch")
MODEL = "smollm2"
FEWEST, MOST = 6_000, 60_000
"""Training tokens of a demo that sizes itself: with fewer, two documents are left to test on; more gains little."""
_BLOCK, _BATCH = 256, 4
_VALIDATION, _TEST = 1 / 8, 1 / 6  # tokens, as shares of the training split's
_BLOCK_TOKENS = 1.45  # tokens in blocks per token of the corpus, as measured at 6,000 and 20,000 tokens (1.40 to 1.45)
_PART_SECONDS = 10  # of each part: loading a model, saving, searching
_LONGEST = 2000  # characters of one module, so that no module fills the corpus
_SHORTEST = 300
_ELSEWHERE = "trained"  # what the memory is called there, so that its bar has a name of its own
_LICENCE_TOKENS = 2000
_LONGEST_LICENCE = 1500  # characters
_SHARE = 0.3  # of all modules, chosen by the hash of their names: parsing all takes a minute and is not needed


@dataclass(frozen=True)
class Speed:
    """What this machine does with the demo's model, in tokens a second."""

    reading: float
    """Forward pass, head included."""
    training: float
    """Forward and backward pass and the optimizer's share."""


def run_demo(
    out: str | Path, *, train_tokens: int | None = None, minutes: float = 10, say: Callable[[str], None]
) -> tuple[dict[str, Any], str]:
    """Fetch the model, build the corpus, train a memory, evaluate it.

    Args:
        out: Folder for everything. A demo that goes on there keeps the size it was begun with.
        train_tokens: Training tokens; None: as many as fit into `minutes` on this machine.
        minutes: What the demo may take, once the model is fetched.
        say: Told what starts.

    Returns:
        The report, as `evaluate_perplexity` gives it, and a text with table, passages and what to try next.
    """
    out = Path(out)
    say(f"model {MODEL} (135M parameters), fetched once")
    fetch(MODEL)
    began = time.monotonic()
    documents = out / "docstrings.jsonl"
    if not documents.is_file():
        say(f"reading documentation strings of {' and '.join(PACKAGES)}")
        rows = (json.dumps({"text": text}) + "\n" for text in docstrings())
        with replacing(documents) as temporary:
            temporary.write_text("".join(rows), encoding="utf-8")
    size = out / "size.json"
    if not size.is_file():
        say("measuring how fast this machine reads and trains")
        speed = measured_speed()
        left = 60 * minutes - (time.monotonic() - began)
        write_json(size, {"train_tokens": train_tokens or tokens_within(left, speed), **asdict(speed)})
    speed, kept = _kept(size)
    tokens = train_tokens or kept
    parts = seconds_by_part(tokens, speed)
    expected = sum(parts.values()) / 60
    say(
        f"this machine reads {speed.reading:,.0f} and trains {speed.training:,.0f} tokens/s:"
        f" {tokens:,} training tokens, about {expected:.0f} minutes"
    )
    if train_tokens is None and expected > minutes:
        say(f"that is more than {minutes:g} minutes, but fewer tokens would give a table that says nothing")
    with _one_bar(TimeLeft(parts), say) as told:
        report = run_recipe(demo_recipe(str(documents), tokens), out, say=told)["memory"]
        elsewhere = _elsewhere(out, report, told)
    say(f"took {(time.monotonic() - began) / 60:.1f} minutes")
    ending = [_headline(report), *elsewhere, "", report_table(report), "", _passages(out, report), "", _next(out)]
    return report, "\n".join(ending)


def _kept(path: Path) -> tuple[Speed, int]:
    """Speed and training tokens that the demo was begun with."""
    kept = read_json(path)
    names = ("reading", "training", "train_tokens")
    values = [kept[name] for name in names if isinstance(kept, dict) and isinstance(kept.get(name), int | float)]
    if len(values) < len(names) or not all(0 < value < 1e12 for value in values):
        raise ArtifactError(f"{path} holds no size of a demo; delete it, then it is measured again")
    return Speed(values[0], values[1]), int(values[2])


def measured_speed() -> Speed:
    """A few steps of the demo's model on one block, timed: about half a minute on the slowest machines.

    A step of plain fine-tuning stands for one of distillation, which takes hardly longer (docs/performance.md).
    """
    import torch

    device = default_device()
    native = parse_dtype("auto", device) == torch.bfloat16
    model = load_causal_lm(MODEL, dtype=torch.float32).to(device)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    tokens = torch.randint(model.config.get_text_config().vocab_size, (1, _BLOCK), device=device)

    def read(tokens: torch.Tensor = tokens) -> None:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=native):
            model(tokens, use_cache=False)

    def learn(tokens: torch.Tensor = tokens) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=native):
            loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    read(tokens[:, :16])  # the first of each kind allocates
    learn(tokens[:, :16])
    step()
    reading, learning, stepping = _seconds(read, 4), _seconds(learn, 8), _seconds(step, 1)
    return Speed(_BLOCK / reading, _BLOCK / (learning + stepping / _BATCH))


def _seconds(act: Callable[[], None], enough: float) -> float:
    """Mean seconds of a call, over as many as `enough` seconds hold, at least one and at most ten."""
    import torch

    began, calls = time.monotonic(), 0
    while not calls or (calls < 10 and time.monotonic() - began < enough):
        act()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        calls += 1
    return (time.monotonic() - began) / calls


def seconds_by_part(train_tokens: int, speed: Speed) -> dict[str, float]:
    """Expected seconds of what takes long, in order, named as the stages' progress bars are.

    Blocks overlap, so more is read than the corpus holds; validation and test split are shares of the training split.
    """

    def reading(share: float) -> float:
        return _BLOCK_TOKENS * share * train_tokens / speed.reading

    work = {
        "teacher pass": reading(1),
        "scoring validation: base": reading(_VALIDATION),
        "training": _BLOCK_TOKENS * train_tokens / speed.training + reading(_VALIDATION),
        "scoring validation: memory": reading(_VALIDATION),
        "scoring test: base, memory": 2 * reading(_TEST),
        f"scoring test: base, {_ELSEWHERE}": 2 * _LICENCE_TOKENS / speed.reading,
    }
    return {part: seconds + _PART_SECONDS for part, seconds in work.items()}


def tokens_within(seconds: float, speed: Speed) -> int:
    """The most training tokens that are expected to take at most `seconds`, between `FEWEST` and `MOST`."""
    fixed = sum(seconds_by_part(0, speed).values())
    each = (sum(seconds_by_part(MOST, speed).values()) - fixed) / MOST
    return max(FEWEST, min(MOST, int((seconds - fixed) / each) // 500 * 500))


class TimeLeft:
    """What is left of a plan, from what its parts have taken until now."""

    def __init__(self, parts: dict[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            parts: Name to expected seconds, in order.
            clock: Seconds that have gone by.
        """
        self._parts, self._clock, self._began = parts, clock, clock()
        self._done: dict[str, float] = {}  # share of each part that was begun
        self._skipped = 0.0  # expected seconds of what an earlier run has done

    def hear(self, part: str, done: float, total: float) -> None:
        """Note how far a part is; those before it are over. Parts without a place in the plan are passed over."""
        if part not in self._parts:
            return
        names = list(self._parts)
        told = dict.fromkeys(names[: names.index(part)], 1.0) | {part: done / total if total else 0.0}
        self._skipped += sum(share * self._parts[name] for name, share in told.items() if name not in self._done)
        self._done |= told

    @property
    def share(self) -> float:
        """How much of all is done, in [0, 1]."""
        return sum(share * self._parts[part] for part, share in self._done.items()) / sum(self._parts.values())

    @property
    def seconds(self) -> float:
        """Seconds left, at the pace of what was done since the start, which counts for more the more was done."""
        whole = sum(self._parts.values())
        trusted = whole / 4  # a fast first part says little of training, so this much counts as gone as expected
        paced = self.share * whole - self._skipped
        pace = (self._clock() - self._began + trusted) / (paced + trusted)
        return (1 - self.share) * whole * pace


@contextlib.contextmanager
def _one_bar(left: TimeLeft, say: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """One bar over all stages instead of theirs, on a terminal only; gives a `say` that adds the time left."""
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {postfix}"
    with tqdm(total=1.0, desc="demo", bar_format=form, disable=None, dynamic_ncols=True, leave=False) as bar:

        def hear(part: str, done: float, total: float) -> None:
            left.hear(part, done, total)
            bar.set_description(part, refresh=False)
            bar.set_postfix_str(_about(left.seconds), refresh=False)
            bar.update(left.share - bar.n)

        def told(line: str) -> None:
            bar.clear()
            say(f"{line} ({_about(left.seconds)})")

        with told_to(hear):
            yield told


def _about(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"


def demo_recipe(documents: str, train_tokens: int) -> dict[str, dict[str, Any]]:
    """The demo as a recipe."""
    return {
        "corpus": {
            "documents": [documents],
            "tokenizer": MODEL,
            "block_size": _BLOCK,
            "stride": 192,
            "max_tokens": train_tokens,
            "max_validation_tokens": int(_VALIDATION * train_tokens),
            "max_test_tokens": int(_TEST * train_tokens),
            "near_duplicate_ngram": 24,
            "near_duplicate_overlap": 0.1,
        },
        "datastore": {"teacher": MODEL},
        "targets": {"k": 256, "target_temperature": 4.0},
        "train": {"init": MODEL, "epochs": 1, "learning_rate": 1e-4, "batch_size": _BATCH},
    }


def docstrings() -> Iterator[str]:
    """One document per module: its name, and each documented definition with its signature and documentation.

    Sources are parsed, nothing is imported.
    """
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue
        root = Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(root.rglob("*.py")):
            name = ".".join((package, *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
            if int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 >= _SHARE:
                continue
            if text := _module_text(name, path):
                yield text[:_LONGEST]


def _module_text(name: str, path: Path) -> str:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return ""
    parts = [ast.get_docstring(tree) or ""]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            is_class = isinstance(node, ast.ClassDef)
            head = f"class {node.name}" if is_class else f"def {node.name}({ast.unparse(node.args)})"
            parts.append(f"{head}\n{text}")
    body = "\n\n".join(part for part in parts if part)
    return f"{name}\n\n{body}" if len(body) >= _SHORTEST else ""


def licences() -> Iterator[str]:
    """The beginnings of licences of installed packages, none twice: English that the demo's memory never saw."""
    seen: set[str] = set()
    for package in sorted(distributions(), key=lambda d: d.name or ""):
        for file in package.files or ():
            if not re.search(r"\.dist-info/.*\b(LICEN[CS]E|COPYING)[^/]*$", str(file)):
                continue
            with contextlib.suppress(OSError, UnicodeDecodeError):
                text = Path(str(file.locate())).read_text(encoding="utf-8")[:_LONGEST_LICENCE]
                opening = "".join(re.findall(r"[a-z]+", text.lower()))[-200:]  # holders and years come first
                if len(text) == _LONGEST_LICENCE and opening not in seen:
                    seen.add(opening)
                    yield text


def _elsewhere(out: Path, report: dict[str, Any], say: Callable[[str], None]) -> list[str]:
    """What the mixtures do to text of another kind; nothing where no licences are installed."""
    documents, corpus = out / "licences.jsonl", out / "elsewhere"
    rows = [json.dumps({"text": text}) + "\n" for text in licences()]
    if not rows:
        return []
    say(f"licences of installed packages, which the memory never saw -> {corpus}")
    if not documents.is_file():
        with replacing(documents) as temporary:
            temporary.write_text("".join(rows), encoding="utf-8")
    sizes = {"block_size": _BLOCK, "max_test_tokens": _LICENCE_TOKENS, "test_fraction": 0.9}
    build_corpus([str(documents)], tokenizer=MODEL, out=corpus, validation_fraction=0.0, **sizes)
    places, (weight,) = read_manifest(out / "evaluation-memory").sources, weights_of(report).values()
    there = evaluate_perplexity(
        corpus,
        base=places["base"],
        memory={_ELSEWHERE: places["memory"]},
        config=EvaluateConfig.parse({**report["run"]["config"], "mix_weight": {_ELSEWHERE: weight}}),
        gate=report["mixture"]["gate"],
    )
    return [_harm(there)]


def _harm(report: dict[str, Any]) -> str:
    base = report["base"]["perplexity"]
    told = {"the gate": report["mixture"], "the fixed weight": report["mixture"]["fixed"]}
    parts = [f"{row['perplexity']:.2f} ({row['perplexity'] / base - 1:+.1%}) with {name}" for name, row in told.items()]
    return f"On licence texts, of which the memory knows nothing: {base:.2f} with the base alone, {', '.join(parts)}."


def _headline(report: dict[str, Any]) -> str:
    base, mixture = report["base"]["perplexity"], report["mixture"]["perplexity"]
    fixed = report["mixture"]["fixed"]["perplexity"]
    interval = report["ratio"]["interval"]
    drawn = f"; 95% of resamplings of the documents: {1 - interval[1]:.0%} to {1 - interval[0]:.0%}" if interval else ""
    return (
        f"Perplexity on held-out modules: {base:.2f} with the base alone, {mixture:.2f} with the memory beside it"
        f" ({1 - mixture / base:.0%} lower{drawn}), weighed token by token; {fixed:.2f} with one weight for all."
    )


def _passages(out: Path, report: dict[str, Any]) -> str:
    """Three held-out passages: where the memory helped most, typically, and least."""
    places = read_manifest(out / "evaluation-memory").sources
    config = EvaluateConfig.parse(report["run"]["config"])
    return passages(out / "corpus", report, base=places["base"], memory=places["memory"], config=config)


def _next(out: Path) -> str:
    versions = library_versions()
    return (
        f"plot: {out / 'evaluation-memory' / 'perplexity.png'}\n"
        f"made with torch {versions.get('torch')}, transformers {versions.get('transformers')},"
        f" {versions.get('threads')} threads\n"
        "try next:\n"
        f'  memlm generate "The generation config" --base {MODEL} --memory {out / "memory"} --max-new-tokens 60'
    )
