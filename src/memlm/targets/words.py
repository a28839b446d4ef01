"""Targets of a corpus: what a teacher says of it, or teachers of folds of what they have not read; no neighbours."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memlm.corpus.blocks import Corpus
from memlm.datastore.build import shard_blocks
from memlm.errors import ConfigError
from memlm.models.loading import default_device, dtype_name, parse_dtype
from memlm.progress import progress_bar
from memlm.stage import Plan, Stage, StageSpec, writing_behind
from memlm.targets.config import NEIGHBOURS, TargetsConfig
from memlm.targets.folder import shard_name, write_rest, write_shard
from memlm.targets.speakers import Named, Speakers, loaders, named_speakers
from memlm.targets.teacher import mixed_targets

_SHARD_POSITIONS = 16384  # little of it is lost where a run is stopped


def plan_words(
    corpus: str | Path, *, teacher: str | None, fold_teachers: Sequence[str | Path], config: TargetsConfig
) -> Plan:
    """What `build_targets` is to make of a corpus, and the work; raises what it raises before any work."""
    source = Corpus(corpus)
    given = [name for name in NEIGHBOURS if name in config.model_fields_set]
    if given and "teacher_share" not in config.model_fields_set:
        raise ConfigError(f"{given[0]} is for neighbours, which corpus {corpus} has none of: run memlm datastore")
    if "teacher_share" in config.model_fields_set and config.teacher_share != 1:
        raise ConfigError(
            f"teacher_share = {config.teacher_share}: the rest is for neighbours, which corpus {corpus} has none of:"
            " run memlm datastore"
        )
    if teacher is None and not fold_teachers:
        raise ConfigError(
            f"corpus {corpus} has no neighbours, so its targets are what a model says: give --teacher, or a"
            " --fold-teacher for each fold"
        )
    if teacher is not None and fold_teachers and not source.n_written:
        raise ConfigError(
            f"corpus {corpus} holds nothing that was written, of which --teacher would speak beside teachers of folds:"
            " give the one or the others"
        )
    speakers = named_speakers(source, teacher, fold_teachers)
    config = config.with_folds(speakers.folds).model_copy(update={"teacher_share": 1.0})
    parse_dtype(config.dtype)
    if teacher is not None:
        source.check_fits(teacher)
    spec = StageSpec(
        "targets",
        config=config.of_words(),
        inputs={"corpus": source.manifest.hash, **speakers.inputs},
        tokenizer=source.manifest.tokenizer,
        sources={**source.manifest.sources, "corpus": str(corpus), **speakers.sources},
    )
    return Plan(spec, lambda stage: _listen(stage, source, speakers, config))


def _listen(stage: Stage, corpus: Corpus, named: Named, config: TargetsConfig) -> dict[str, Any]:
    """Write the targets of all positions, and return the facts."""
    split = corpus.split("train")
    shards = shard_blocks(split.position_starts, _SHARD_POSITIONS)
    missing = [number for number in range(len(shards)) if not stage.has(shard_name(number))]
    dtype = stage.settled("dtype", dtype_name(parse_dtype(config.dtype, default_device())))
    speakers = Speakers(corpus, loaders(named.places, dtype), named.folds)
    mixing = {"teacher_share": 1.0, "max_support": config.max_support, "target_mass": config.target_mass}
    done = split.n_positions - sum(int(np.diff(split.position_starts[list(shards[number])])[0]) for number in missing)
    who = f"{len(named.places)} teachers read" if named.folds else f"{named.places[0]} reads"
    with progress_bar(split.n_positions, who, initial=done) as bar, writing_behind() as write:
        for number in missing:
            stage.kept = f"the targets of {done:,} of {split.n_positions:,} positions"
            blocks = np.arange(*shards[number])
            first, stop = split.position_starts[list(shards[number])].tolist()
            said, nats = mixed_targets(None, speakers.hear(blocks), first, bar.update, **mixing)
            write(write_shard, stage, number, [split[int(block)] for block in blocks], said, nats)
            done += stop - first
    facts = write_rest(stage, corpus, len(shards), held_out=speakers.perplexity(config.judged_positions))
    return facts | {"teacher_share": 1.0, "teacher_dtype": dtype}
