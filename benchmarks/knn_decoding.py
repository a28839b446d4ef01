"""Live kNN-LM slows down as its datastore grows, at equal recall; what parametric memories take stands beside it."""

import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from benchmarks.decoding import decoder, prove_mixture
from benchmarks.models import parameter_count, random_model, random_tokens, tiny_config, untrained_mlp
from benchmarks.report import bar_line, prove
from benchmarks.synthetic_store import write_store
from benchmarks.timing import interleave
from memlm.datastore.config import DatastoreConfig
from memlm.datastore.index import default_nlist
from memlm.errors import ConfigError
from memlm.memory.decoder import MemoryDecoder
from memlm.memory.protocol import Memory
from memlm.memory.retrieval import RetrievalMemory
from memlm.mix.mixed_lm import MixedLM
from memlm.models.layers import keep_layers
from memlm.models.loading import default_device, default_dtype, load_causal_lm
from memlm.models.taps import TapReader
from memlm.targets.config import RetrievalConfig

ENTRIES = (100_000, 1_000_000, 4_000_000)
PROJECTED = 500_000_000
K = 1024
_PAPER = 80  # MLP Memory's first version (arXiv:2508.01832v1), over kNN-LM of 500M tokens
_RELEASED = {"nlist": 4096, "nprobe": 32}  # of the released code, whatever that recalls
_TRAIN_VECTORS = 65_536
_RECALL_SAMPLE = 64


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """Three lines: parametric memories, growth of the search, and kNN-LM projected to 500M.

    Sizes are those of `$MEMLM_BENCH_ENTRIES`, such as `100000,1000000`, where it is set. Datastores are written to a
    temporary folder (`$TMPDIR`), 2.4 kB an entry, and deleted; while one is measured its index is in memory, half that.
    """
    device = default_device()
    dtype = default_dtype(device)
    if quick:
        base = random_model(tiny_config(), dtype=dtype, device=device)
        entries, k, sizes = (200, 600, 1200), 8, {"context": 8, "steps": 2, "rounds": 1}
    else:
        base = load_causal_lm("smollm2", dtype=dtype).to(device)  # type: ignore[arg-type]
        entries, k, sizes = sizes_wanted(), K, {}
    memories: dict[str, Memory] = {
        "mlp": untrained_mlp(base, 1 if quick else 8),
        "decoder": MemoryDecoder(keep_layers(base, 1 if quick else 10).to(device)),  # type: ignore[arg-type]
    }
    rows = []
    for size in entries:
        for column, config in index_settings(size, k, quick=quick).items():
            with tempfile.TemporaryDirectory(prefix="memlm-knn-") as scratch:
                folder = write_store(Path(scratch) / "store", base, entries=size, config=config)
                rows.append({"column": column, **measure(base, memories, folder, k=k, **sizes)})
    yield parametric(rows, list(memories))
    yield growth(rows)
    yield projection(rows, list(memories))


def sizes_wanted() -> tuple[int, ...]:
    """Entries of the datastores, ascending.

    Raises:
        ConfigError: `$MEMLM_BENCH_ENTRIES` holds something else than numbers above 1.
    """
    given = os.environ.get("MEMLM_BENCH_ENTRIES")
    if not given:
        return ENTRIES
    numbers = given.split(",")
    if not all(number.strip().isdecimal() and int(number) > 1 for number in numbers):
        raise ConfigError(f"MEMLM_BENCH_ENTRIES = {given!r}: give numbers above 1, such as 100000,1000000")
    return tuple(sorted({int(number) for number in numbers}))


def index_settings(entries: int, k: int, *, quick: bool = False) -> dict[str, DatastoreConfig]:
    """By column: the library's own lists, tuned to its recall target at every size; and those of the released code.

    For a small datastore, whose index is exact, an inverted file stands beside it. Training keys and the recall sample
    are limited so that two cores build 4M entries.
    """
    config = DatastoreConfig(recall_k=k, recall_sample=_RECALL_SAMPLE, train_vectors=_TRAIN_VECTORS)
    lists = config.model_copy(update={"index": "ivf-flat"})
    released = {"nlist": 8, "nprobe": 2} if quick else _RELEASED
    found = {"library": lists, "released": lists.model_copy(update=released)}
    return {"exact": config, **found} if config.index_kind(entries) == "exact" else found


def measure(
    base: PreTrainedModel,
    memories: Mapping[str, Memory],
    store: Path,
    *,
    k: int,
    context: int = 128,
    steps: int = 8,
    rounds: int = 15,
) -> dict[str, Any]:
    """Seconds per decoded token of the base alone, with each memory, with live kNN-LM, and of the search alone.

    Args:
        base: Whose activations the datastore holds.
        memories: Name to parametric memory.
        store: Datastore.
        k: Neighbours.
        context: Tokens in the cache.
        steps: Tokens decoded per round.
        rounds: How often each side is timed.

    Raises:
        WrongAnswerError: A mixture is not the sum of its parts, or a key is not its own nearest neighbour.
    """
    live = RetrievalMemory(store, RetrievalConfig(k=k))
    prove_search(live)
    mixed = {name: MixedLM(base, memory, 0.5) for name, memory in {**memories, "knn": live}.items()}
    tokens = random_tokens(1, context + steps, live.vocab_size, base.device)
    before, after = tokens[:, :context], tokens[:, context:]
    for model in mixed.values():
        prove_mixture(model, before, after)
    assert live.tap is not None
    reader = TapReader(base, live.tap)
    queries = reader.read(tokens)[0, context:].split(1)
    sides = {name: decoder(model, before, after) for name, model in {"base": base, **mixed}.items()}
    timing = interleave(
        {**sides, "search": lambda: [live.retrieve(query) for query in queries]}, device=base.device, rounds=rounds
    )
    facts = live.store.manifest.facts
    found: dict[str, Any] = {
        "entries": live.store.n_entries,
        "index": facts["index"],
        "recall": facts["recall"],
        "compared": compared(live.store.n_entries, facts["index"]),
        "k": k,
        "rounds": rounds,
        "steps": steps,
        "memory_parameters": {name: parameter_count(memory) for name, memory in memories.items()},
    }
    found["seconds_per_token"] = {name: timing.median(name) / steps for name in timing.seconds}
    found["slowdown"] = {name: round(timing.ratio(name, "base"), 4) for name in mixed}
    found["slowdown_spread"] = {name: timing.spread(name, "base") for name in mixed}
    return found


def prove_search(live: RetrievalMemory, sample: int = 32) -> None:
    """Raise unless stored keys find themselves first, at no distance.

    Raises:
        WrongAnswerError: They do not.
    """
    keys = live.store.keys
    assert keys is not None
    own = np.linspace(0, len(keys) - 1, min(sample, len(keys))).astype(np.int64)
    distances, ids = live.store.index.search(keys.gather(own), 1)
    # |x - y|² from products of float32: a few roundings of |x|²
    scale = float((keys.gather(own) ** 2).sum(1).max())
    prove(float((ids[:, 0] != own).mean()), 0.0, f"{live.store.folder.name}: keys that are not their own neighbour")
    prove(float(distances.max()), 1e-5 * scale, f"{live.store.folder.name}: distance of a key to itself")


def compared(entries: int, index: Mapping[str, Any]) -> float:
    """Vectors that a query is compared with: all, or the centroids and the lists searched, at their mean length."""
    if index["kind"] == "exact":
        return entries
    return index["nlist"] + index["nprobe"] * entries / index["nlist"]


# --- what the rows say ------------------------------------------------------------------------------------------------


def parametric(rows: Sequence[dict[str, Any]], memories: Sequence[str]) -> dict[str, Any]:
    """The slowdown by the slowest parametric memory, which no datastore can change; its spread is that of timing."""
    slowdowns = {name: [row["slowdown"][name] for row in rows] for name in memories}
    worst = max(statistics.median(found) for found in slowdowns.values())
    return bar_line("knn_decoding/parametric", worst, slowdowns=slowdowns, rows=list(rows))


def growth(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Search of the largest over the smallest datastore, inverted files only, and the line fitted through them."""
    lists = with_lists(rows)
    intercept, slope = fit(lists)
    seconds = [row["seconds_per_token"]["search"] for row in lists]
    return bar_line(
        "knn_decoding/growth",
        seconds[-1] / seconds[0],
        entries=[row["entries"] for row in lists],
        search_seconds_per_token=seconds,
        fit="seconds = intercept + slope * compared; compared = nlist + nprobe * entries / nlist",
        intercept_seconds=intercept,
        slope_seconds=slope,
        slope_between_sizes=slopes(lists),
        recall=[row.get("recall") for row in lists],
        released_lists={
            row["entries"]: {"search_seconds_per_token": row["seconds_per_token"]["search"], "recall": row["recall"]}
            for row in rows
            if row.get("column") == "released"
        },
        exact={row["entries"]: row["seconds_per_token"]["search"] for row in rows if row["index"]["kind"] == "exact"},
    )


def projection(rows: Sequence[dict[str, Any]], memories: Sequence[str]) -> dict[str, Any]:
    """How much faster the fastest parametric memory decodes than kNN-LM of 500M entries, if the fitted line goes on."""
    name = "knn_decoding/projected-to-500M"
    last = with_lists(rows)[-1]
    seconds = last["seconds_per_token"]
    fastest = min(memories, key=lambda memory: seconds[memory])
    intercept, slope = fit(with_lists(rows))
    if slope <= 0:
        return bar_line(name, None, reference=_PAPER, note="the search did not grow over these sizes")
    indexes = {
        "the library's default number of lists, as many searched as in those measured": {
            "kind": "ivf-flat",
            "nlist": default_nlist(PROJECTED),
            "nprobe": last["index"]["nprobe"],
        },
        "4,096 lists, 32 searched, as in the released code of the paper": {
            "kind": "ivf-flat",
            "nlist": 4096,
            "nprobe": 32,
        },
    }
    projections = []
    for assumption, index in indexes.items():
        search = intercept + slope * compared(PROJECTED, index)
        step = seconds["knn"] - seconds["search"] + search
        projections.append(
            {
                "assumption": assumption,
                "nlist": index["nlist"],
                "nprobe": index["nprobe"],
                "search_seconds_per_token": search,
                "ratio": round(step / seconds[fastest], 4),
            }
        )
    return bar_line(
        name,
        projections[0]["ratio"],
        reference=_PAPER,
        assumption="time goes on as fitted, batch 1, all keys in memory as float16; " + projections[0]["assumption"],
        projections=projections,
        measured={
            row["entries"]: round(row["seconds_per_token"]["knn"] / row["seconds_per_token"][fastest], 4)
            for row in with_lists(rows)
        },
        memory=fastest,
    )


def with_lists(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of inverted files with the library's own lists."""
    return [row for row in rows if row["index"]["kind"] != "exact" and row.get("column", "library") == "library"]


def slopes(rows: Sequence[dict[str, Any]]) -> list[float] | None:
    """The smallest and largest slope between two sizes; None for fewer than three, through which any line goes."""
    points = [(row["compared"], row["seconds_per_token"]["search"]) for row in rows]
    if len({x for x, _ in points}) < 3:
        return None
    found = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(points, 2) if a[0] != b[0]]
    return [min(found), max(found)]


def fit(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Intercept and slope of search seconds over vectors compared, by least squares; no intercept for one row."""
    x = np.array([row["compared"] for row in rows])
    y = np.array([row["seconds_per_token"]["search"] for row in rows])
    if len(set(x)) == 1:
        return 0.0, float(y.mean() / x.mean())
    slope, intercept = np.polyfit(x, y, 1)
    return float(intercept), float(slope)
