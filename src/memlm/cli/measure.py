"""Commands that measure what a memory gains: evaluate perplexity, tasks, lm-eval, bench, compare."""

from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from memlm.cli.checks import check_file_to_write, check_folder, check_models
from memlm.cli.options import (
    Base,
    CorpusFolder,
    Dtype,
    Json,
    Memories,
    MixWeights,
    Overrides,
    alone,
    by_name,
    models_by_name,
    number,
    with_settings,
)
from memlm.cli.printing import next_line, print_result, quiet, say
from memlm.config import MAX_COUNT, MAX_SEED, read_recipe
from memlm.errors import ConfigError, InputError, MemlmError
from memlm.evaluate.config import BenchConfig, EvaluateConfig, GenerationConfig, PassageConfig
from memlm.files import replacing, write_json
from memlm.mix.gate_config import GateConfig
from memlm.targets.config import RetrievalConfig


@with_settings("mix_weight", "prompt_window")
def perplexity(
    corpus: CorpusFolder,
    base: Base,
    memory: Memories,
    config: EvaluateConfig | None,
    retrieval: RetrievalConfig | None,
    gate: GateConfig | None,
    mix_weight: MixWeights = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.json and a plot; default none is written.")
    ] = None,
    passages: Annotated[
        bool,
        typer.Option("--passages", help="Show test passages where the memories helped most, typically and least."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Test perplexity of base, memories and mixture, with intervals; weights are chosen on the validation split.

    A memory may be any causal LM of the same tokenizer; a datastore is live kNN-LM. Each model scores the text once;
    the scores are kept in the cache ($MEMLM_HOME/scores), every mixture is computed from them.

    Example: memlm evaluate perplexity c/ --base smollm2 --memory m/ --json

    Example: memlm evaluate perplexity c/ --base smollm2 --memory d/ --k 256 --target-temperature 4

    Example: memlm evaluate perplexity c/ --base smollm2 --memory law=m1/ --memory bio=m2/

    Example: memlm evaluate perplexity other-domain/ --base smollm2 --memory m/ --mix-weight 0.4 --gate posterior
    """
    check_folder(corpus, "corpus")
    memories, weights = by_name(memory, mix_weight)
    check_models(base, *memories.values())
    quiet()
    from memlm.evaluate.passages import passages as shown
    from memlm.evaluate.perplexity import evaluate_perplexity
    from memlm.evaluate.report import report_table

    if weights is not None:
        given = config.model_dump() if config is not None else {}
        config = EvaluateConfig.parse({**given, "mix_weight": alone(weights)})
    asked: dict[str, Any] = {"base": base, "memory": alone(memories), "config": config, "retrieval": retrieval}
    report = evaluate_perplexity(corpus, out=out, gate=gate, **asked)
    told = [report_table(report)]
    if passages and not as_json:
        told += ["", shown(corpus, report, **asked), ""]
    named = [part for value in memory for part in ("--memory", value)]
    told.append(next_line("memlm", "generate", "PROMPT", "--base", base, *named))
    print_result(report, as_json, "\n".join(told))


@with_settings()
def tasks(
    names: Annotated[
        list[str],
        typer.Argument(metavar="TASK...", help="Tasks or groups of lm-eval; papers:NAME for those of the papers."),
    ],
    base: Base,
    memory: Memories,
    retrieval: RetrievalConfig | None,
    gate: GateConfig | None,
    mix_weight: MixWeights = None,
    include: Annotated[list[str] | None, typer.Option(help="Folder of further task files; may be repeated.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the papers' tasks; default they come from the hub.")
    ] = None,
    other: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=MODEL", help="A further model that answers alone; may be repeated."),
    ] = None,
    limit: Annotated[int | None, number(1, MAX_COUNT, "Items of each task at most; default all.")] = None,
    num_fewshot: Annotated[int | None, number(0, 1000, "Examples in front of each item; default the task's.")] = None,
    batch_size: Annotated[int, number(1, 1 << 16, "Requests in one forward pass.")] = 8,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Wrap every item as a chat turn.")] = False,
    dtype: Dtype = "auto",
    seed: Annotated[int, number(0, MAX_SEED, "Draws examples and resamplings.")] = 0,
    out: Annotated[Path | None, typer.Option(help="File to write the report to, as JSON.")] = None,
    as_json: Json = False,
) -> None:
    """Tasks of lm-eval for the base alone, with the fixed weight and with the gate, on the same items.

    Values are those of each task's first metric; changes are paired with the base, with 95% intervals. Tasks come from
    the hub, or from files in a folder (--include). Of the papers there are papers:nine (sst2, mr, cr, rt, hyp, cb, rte,
    agn, yahoo), papers:questions (nq, hotpotqa, webquestions, triviaqa) and papers:hallucination (truthfulqa, halueval,
    strategyqa).

    Example: memlm evaluate tasks arc_easy sciq --base smollm2 --memory m/ --limit 200

    Example: memlm evaluate tasks papers:nine papers:nq --data tasks/ --base smollm2 --memory m/ --other dapt=dapt/
    """
    memories, weights = by_name(memory, mix_weight)
    others = models_by_name(other or [])
    check_models(base, *memories.values(), *others.values())
    check_file_to_write(out)
    quiet()
    from memlm.evaluate.tasks import evaluate_tasks, tasks_table

    report = evaluate_tasks(
        names,
        base=base,
        memory=alone(memories),
        mix_weight=alone(weights),
        gate=gate,
        retrieval=retrieval,
        include=include or [],
        data=data,
        others=others,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        chat_template=chat_template,
        dtype=dtype,
        seed=seed,
    )
    if out is not None:
        write_json(out, report)
    print_result(report, as_json, tasks_table(report))


def lm_eval(
    context: typer.Context,
    base: Base,
    memory: Memories,
    mix_weight: MixWeights = None,
    gate: Annotated[str | None, typer.Option(help="posterior, confidence, both, or none.")] = None,
    dtype: Dtype = "auto",
) -> None:
    """lm-eval's own command line with a mixture as its model; every other option is lm-eval's.

    Example: memlm evaluate lm-eval --base smollm2 --memory m/ --tasks arc_easy --limit 50 --output_path results/
    """
    memories, weights = by_name(memory, mix_weight)
    check_models(base, *memories.values())
    quiet()
    from memlm.evaluate.tasks import check_lm_eval

    check_lm_eval()
    from memlm.evaluate.lm_eval import run_lm_eval

    run_lm_eval(context.args, base=base, memory=alone(memories), mix_weight=alone(weights), gate=gate, dtype=dtype)


@with_settings()
def generation(
    corpus: CorpusFolder,
    base: Base,
    memory: Memories,
    config: GenerationConfig | None,
    retrieval: RetrievalConfig | None,
    gate: GateConfig | None,
    mix_weight: MixWeights = None,
    as_json: Json = False,
) -> None:
    """What a mixture says on its own: how much of the training text it recites, how it repeats itself.

    Beginnings of documents are gone on with greedily, by the base alone, with the fixed weight and under the gate. A
    memory of private text can recite it; held-out documents show what is merely predictable.

    Example: memlm evaluate generation c/ --base smollm2 --memory m/ --passages 200
    """
    check_folder(corpus, "corpus")
    memories, weights = by_name(memory, mix_weight)
    check_models(base, *memories.values())
    quiet()
    from memlm.evaluate.generation import evaluate_generation, generation_table

    report = evaluate_generation(
        corpus,
        base=base,
        memory=alone(memories),
        mix_weight=alone(weights),
        gate=gate,
        retrieval=retrieval,
        config=config,
    )
    print_result(report, as_json, generation_table(report))


@with_settings()
def bench(
    base: Annotated[str, typer.Argument(help="Folder, hub id or packaged name of the base.")],
    memory: Memories,
    config: BenchConfig | None,
    retrieval: RetrievalConfig | None,
    gate: GateConfig | None,
    passage: PassageConfig | None,
    prompts: Annotated[Path, typer.Option(help="Text file with one prompt per line.")],
    in_context: Annotated[
        Path | None,
        typer.Option(metavar="CORPUS", help="Folder of a corpus whose training text the base reads passages of."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file to draw times per token in.")] = None,
    as_json: Json = False,
) -> None:
    """Time decoding and scoring with the base alone and beside each memory, in turns, on this machine.

    Several memories are timed one by one; a datastore is live kNN-LM. The base alone is transformers' own generate.

    With a corpus the base is also timed with a passage of it in front, found anew every 4 tokens (BM25).

    Example: memlm bench smollm2 --memory m=m/ --memory knn=d/ --in-context c/ --prompts questions.txt --plot bench.png
    """
    check_file_to_write(plot)
    if plot is not None and find_spec("matplotlib") is None:
        raise ConfigError("a plot needs matplotlib: pip install 'memlm[plot]'")
    memories = by_name(memory, None)[0]
    if in_context is not None:
        check_folder(in_context, "corpus")
    check_models(base, *memories.values())
    quiet()
    from memlm.evaluate.bench import bench, bench_table

    try:
        lines = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompts {prompts}: {error}") from None
    report = bench(
        base, memories, lines, gate=gate, retrieval=retrieval, in_context=in_context, passages=passage, config=config
    )
    if plot is not None:
        from memlm.evaluate.plot import bench_figure, deterministic_figure

        with replacing(plot) as temporary:
            deterministic_figure(lambda: bench_figure(report), temporary)
    print_result(report, as_json, bench_table(report))


def compare(
    recipe: Annotated[Path, typer.Argument(help="YAML with a section per stage, and one named compare.")],
    settings: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder for stages and report; default runs/RECIPE_NAME.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what there is, and about what is to come.")] = False,
    as_json: Json = False,
) -> None:
    """A memory against what one could have done instead: in-context retrieval, live kNN-LM, fine-tuning, LoRA, a twin.

    What is finished, here or in a run beside it, is used; a stopped comparison goes on. Settings, checkpoints and
    weights of every row are chosen on validation text. The report is report.html, report.md and report.json.

    Example: memlm compare recipes/cpu/medquad.yaml

    Example: memlm compare recipes/cpu/medquad.yaml --plan --set 'compare.rows=[knn, dapt, twin, memory]'
    """
    from memlm.runs.plan import plan_table, run_folder
    from memlm.runs.recipe import Recipe

    sections, folder = read_recipe(recipe, settings or []), out or run_folder(recipe)
    Recipe(sections)  # wrong keys and values before anything heavy is imported
    quiet()
    from memlm.runs.compare import Comparison
    from memlm.runs.comparison import comparison_text

    comparison = Comparison(sections, folder)
    steps = comparison.plan()
    if plan:
        print_result({"steps": [asdict(step) for step in steps]}, as_json, plan_table(steps))
        try:
            comparison.check_parts()
        except MemlmError as error:
            say(f"note: as things are it would not start: {error}")
        return
    say(plan_table(steps))
    report = comparison.run(say)
    print_result({"folder": str(folder), **report}, as_json, f"{comparison_text(report)}\n\n{folder / 'report.html'}")
