"""Commands that use memories: generate, explain, chat."""

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from memlm.cli.checks import check_file_to_write, check_models
from memlm.cli.options import (
    UNNAMED,
    Base,
    Dtype,
    Json,
    Memories,
    MixWeights,
    alone,
    by_name,
    number,
    weights_by_name,
    with_settings,
)
from memlm.cli.printing import print_result, quiet, say
from memlm.config import MAX_SEED
from memlm.errors import ConfigError, InputError
from memlm.files import replacing
from memlm.mix.gate_config import LONGEST_DRAFT, GateConfig
from memlm.targets.config import RetrievalConfig
from memlm.text import without_controls

_MOST_NEW = 1_000_000  # tokens
_CHAT_PRIOR = 0.1
_SAMPLED_DRAFT = 4
_LOWEST_TEMPERATURE = 1e-6  # of sampling; at a lower one logits overflow, and it would be greedy anyway
Temperature = Annotated[float, number(0, 1e6, "Sampling temperature; 0 is greedy.")]
TopP = Annotated[float, number(0, 1, "Nucleus of sampling.")]
Seed = Annotated[int, number(0, MAX_SEED, "Of sampling.")]
Drafting = Annotated[
    str, typer.Option(help="Tokens that the memory drafts at a time; auto: what is fastest; off: none.")
]
SpecialTokens = Annotated[
    bool, typer.Option("--special-tokens", help="Special tokens spelled in a prompt are those tokens, not text.")
]
ChatTemplate = Annotated[bool, typer.Option("--chat-template", help="Wrap the prompt as a chat turn.")]


@with_settings()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    base: Base,
    memory: Memories,
    retrieval: RetrievalConfig | None,
    gate: GateConfig | None,
    mix_weight: MixWeights = None,
    max_new_tokens: Annotated[int, number(1, _MOST_NEW, "Tokens to generate at most.")] = 40,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    drafting: Drafting = "auto",
    chat_template: ChatTemplate = False,
    special_tokens: SpecialTokens = False,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Generate text with a base and one or more memories. A memory that reads tokens alone drafts ahead of the base;
    what comes is the mixture's as without that.

    Example: memlm generate "What is asthma?" --base smollm2 --memory m/ --max-new-tokens 40

    Example: memlm generate "The court" --base smollm2 --memory law=m1/ --memory bio=m2/ --mix-weight law=0.3
    --mix-weight bio=0.4
    """
    _check_drafting(drafting)
    check_models(base, *by_name(memory, mix_weight)[0].values())
    quiet()
    turn = _turn(prompt, chat_template)
    model, tokenizer = _mixed(base, memory, mix_weight, gate, dtype, retrieval, chat=chat_template)
    draft = _drafts(model, drafting, temperature)
    _say_spelled(tokenizer, turn, special_tokens)
    text = generate_text(
        model,
        tokenizer,
        turn,
        max_new_tokens,
        temperature,
        top_p,
        seed,
        draft,
        stream=not as_json,
        special_tokens=special_tokens,
    )
    weighed = {"gate": model.gate.gate, "mix_weight": alone(model.mix_weights)}
    print_result({"prompt": prompt, "text": text, **weighed}, as_json)


@with_settings()
def explain(
    prompt: Annotated[str | None, typer.Argument(help="Text to go on from.")] = None,
    *,
    base: Base,
    memory: Memories,
    retrieval: RetrievalConfig | None,
    gate: GateConfig | None,
    datastore: Annotated[
        str | None,
        typer.Option(help="Datastore folder that snippets come from; default a live retrieval memory's own."),
    ] = None,
    passages: Annotated[
        Path | None,
        typer.Option(
            help="Text file whose passages, blank lines between them, are explained instead of an answer; with a"
            " datastore also function words against the long tail."
        ),
    ] = None,
    mix_weight: MixWeights = None,
    max_new_tokens: Annotated[int, number(1, _MOST_NEW, "Tokens to generate at most.")] = 20,
    neighbors: Annotated[int, number(0, 1000, "Snippets per token.")] = 3,
    html: Annotated[Path | None, typer.Option(help="File to write the answer to as a page, token by token.")] = None,
    chat_template: ChatTemplate = False,
    special_tokens: SpecialTokens = False,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Answer greedily; per token, what base, memory and mixture thought of it and where the corpus has its like.

    A snippet is a place of the training split whose context is near, with document and squared distance. That is
    evidence of what the corpus says in such places, not proof that it caused the token.

    Example: memlm explain "What is asthma?" --base smollm2 --memory m/ --datastore d/

    Example: memlm explain "What is asthma?" --base smollm2 --memory m/ --html answer.html

    Example: memlm explain --passages cases.txt --base smollm2 --memory m/ --html cases.html
    """
    if (prompt is None) == (passages is None):
        raise ConfigError("give a prompt to go on from, or --passages FILE to explain what is there")
    check_models(base, *by_name(memory, mix_weight)[0].values(), datastore)
    check_file_to_write(html)
    quiet()
    from memlm.mix.explain import check_datastore, explain, explain_passage, searched_memory
    from memlm.mix.explanation import explanation_html, explanation_text, frequency_text, moved_text, passage_line
    from memlm.models.loading import resolve
    from memlm.models.tokenizers import load_tokenizer

    texts = [] if passages is None else _passages(passages)
    turn = _turn(prompt, chat_template) if prompt is not None else ""
    if datastore is not None:
        check_datastore(datastore, load_tokenizer(resolve(base)))  # before weights are loaded
    model, tokenizer = _mixed(base, memory, mix_weight, gate, dtype, retrieval, chat=chat_template)
    for text in texts or [turn]:
        _say_spelled(tokenizer, text, special_tokens)
    shared: dict[str, Any] = {
        "datastore": searched_memory(model, tokenizer, datastore, retrieval),  # opened once, for all passages
        "neighbors": neighbors,
        "special_tokens": special_tokens,
    }
    if passages is None:
        found = [explain(model, tokenizer, turn, max_new_tokens=max_new_tokens, **shared)]
    else:
        found = [explain_passage(model, tokenizer, text, **shared) for text in texts]
    if html is not None:
        from memlm.evaluate.page import page

        lines = [f"<p>{passage_line(part)}</p>" if passages is not None else "" for part in found]
        parts = [line + explanation_html(part) for line, part in zip(lines, found, strict=True)]
        with replacing(html) as temporary:
            temporary.write_text(page("What the memories changed", ["\n<hr>\n".join(parts)]), encoding="utf-8")
        say(f"{html} shows it as a page")
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if passages is None:
        print_result(asdict(found[0]), as_json, explanation_text(found[0], colour=colour), styled=True)
    else:
        told = "\n\n".join(moved_text(part, colour=colour) for part in found)
        if by_frequency := frequency_text(found):
            told += f"\n\n{by_frequency}"
        print_result({"passages": [asdict(part) for part in found]}, as_json, told, styled=True)


def _passages(path: Path) -> list[str]:
    """The passages of a text file.

    Raises:
        InputError: It cannot be read, or has none.
    """
    try:
        parts = re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"passages {path}: {error}") from None
    found = [part.strip() for part in parts if part.strip()]
    if not found:
        raise InputError(f"passages {path}: there is no text in it")
    return found


def _turn(prompt: str, chat_template: bool) -> str | list[dict[str, str]]:
    from memlm.models.prompts import check_prompt

    check_prompt(prompt)  # before weights are loaded
    return [{"role": "user", "content": prompt}] if chat_template else prompt


def _say_spelled(tokenizer: Any, prompt: str | list[dict[str, str]], special_tokens: bool) -> None:
    """Say which special tokens a prompt spells, and what becomes of them."""
    from memlm.models.prompts import spelled_in
    from memlm.models.tokenizers import spelled_note

    if note := spelled_note("prompt", spelled_in(tokenizer, prompt), special_tokens=special_tokens):
        say(note)


def _mixed(
    base: str,
    memory: list[str],
    mix_weight: list[str] | None,
    gate: GateConfig | None,
    dtype: str,
    retrieval: RetrievalConfig | None,
    *,
    chat: bool,
) -> tuple[Any, Any]:
    """The mixture and its tokenizer; in a chat memories have to prove themselves before they speak."""
    memories, weights = by_name(memory, mix_weight)
    given = gate.model_fields_set if gate is not None else set()
    if chat and "prior" not in given and (weights is None or "gate" in given):
        gate = (gate or GateConfig()).model_copy(update={"prior": _CHAT_PRIOR})
    from memlm.mix.mixed_lm import MixedLM
    from memlm.models.loading import resolve
    from memlm.models.tokenizers import load_tokenizer

    options: Any = {"memory": memories, "mix_weight": weights, "gate": gate}
    model = MixedLM.on_default_device(base, dtype=dtype, retrieval=retrieval, **options)
    return model, load_tokenizer(resolve(base))


def _check_drafting(drafting: str) -> None:
    """Raise unless the option is auto, off or a number of tokens.

    Raises:
        ConfigError: It is not.
    """
    if drafting not in ("auto", "off") and not (drafting.isdecimal() and 1 <= int(drafting) <= LONGEST_DRAFT):
        raise ConfigError(f"--drafting {drafting}: give a number of tokens from 1 to {LONGEST_DRAFT}, auto or off")


def _drafts(model: Any, drafting: str, temperature: float) -> int | str | None:
    """What the option asks of the model; a fixed length where it samples, so that a seed gives the same text again, and
    then only of a memory that drafts itself: what is looked up is seldom what is sampled."""
    from memlm.mix.drafting import can_draft, drafts_itself

    if drafting == "off" or (drafting == "auto" and not can_draft(model)):
        return None
    if drafting != "auto":
        return int(drafting)
    if temperature <= _LOWEST_TEMPERATURE:
        return "auto"
    return _SAMPLED_DRAFT if drafts_itself(model) else None


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str | list[dict[str, str]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    drafting: int | str | None = None,
    *,
    stream: bool,
    special_tokens: bool = False,
) -> str:
    """What the model adds to `prompt`; `stream` prints it as it comes."""
    import torch
    from transformers import TextStreamer

    from memlm.models.loading import embedding_rows
    from memlm.models.prompts import encode_prompt

    class Harmless(TextStreamer):
        """What a model says may hold commands to a terminal."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(without_controls(text), stream_end=stream_end)

    torch.manual_seed(seed)
    samples = temperature > _LOWEST_TEMPERATURE
    sampling = {"temperature": temperature, "top_p": top_p} if samples else {}
    inputs = encode_prompt(tokenizer, prompt, rows=embedding_rows(model), special_tokens=special_tokens)
    inputs = inputs.to(model.device)
    streamer = Harmless(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=samples,
        num_beams=1,  # whatever the base's own config says: text is shown as it comes, and tokens are all that is asked
        return_dict_in_generate=False,
        streamer=streamer,
        pad_token_id=tokenizer.eos_token_id,
        **sampling,
        **({} if drafting is None else {"drafting": drafting}),
    )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@with_settings()
def chat(
    base: Base,
    memory: Memories,
    retrieval: RetrievalConfig | None,
    gate: GateConfig | None,
    mix_weight: MixWeights = None,
    max_new_tokens: Annotated[int, number(1, _MOST_NEW, "Tokens of one answer at most.")] = 200,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    seed: Seed = 0,
    drafting: Drafting = "auto",
    special_tokens: SpecialTokens = False,
    dtype: Dtype = "auto",
) -> None:
    """Talk to a base and its memories. `/weight 0.3` (`/weight law=0.3 bio=0.1`) fixes mix_weight, `/gate posterior`
    weighs token by token, `/clear` starts anew, an empty line ends. The prior is 0.1 here unless it is given.

    Example: memlm chat --base smollm2 --memory m/
    """
    _check_drafting(drafting)
    check_models(base, *by_name(memory, mix_weight)[0].values())
    quiet()
    model, tokenizer = _mixed(base, memory, mix_weight, gate, dtype, retrieval, chat=True)
    if tokenizer.chat_template is None:
        say("this tokenizer has no chat template; turns are joined as plain text")
    names = list(model.memories)
    weights = ", ".join(f"{'' if names == [UNNAMED] else name + '='}{w:g}" for name, w in model.mix_weights.items())
    weighed = f"mix_weight {weights}" if model.gate.gate == "none" else f"gate {model.gate.gate}"
    say(f"{weighed}; /weight W, /gate NAME, /clear, empty line ends")
    turns: list[dict[str, str]] = []
    for line in _lines():
        if line == "/clear":
            turns = []
        elif line.startswith(("/weight", "/gate")):
            try:
                if line.startswith("/weight"):
                    model.set_mix_weight(weights_by_name(line.removeprefix("/weight").split(), model.memories))
                else:
                    name = line.removeprefix("/gate").strip() or None
                    model.set_gate(GateConfig.parse({**model.gate.model_dump(), "gate": name}))
            except ConfigError as error:
                say(f"error: {error}")
        else:
            _say_spelled(tokenizer, line, special_tokens)
            turns.append({"role": "user", "content": line})
            plain = "\n".join(turn["content"] for turn in turns) + "\n"
            prompt = turns if tokenizer.chat_template is not None else plain
            draft = _drafts(model, drafting, temperature)
            sampling = (max_new_tokens, temperature, top_p, seed, draft)
            answer = generate_text(model, tokenizer, prompt, *sampling, stream=True, special_tokens=special_tokens)
            turns.append({"role": "assistant", "content": answer})


def _lines() -> Iterator[str]:
    """What is typed, up to an empty line."""
    mark = "> " if sys.stdin.isatty() else ""
    try:
        while line := input(mark).strip():
            yield line
    except EOFError:
        return
    except UnicodeDecodeError as error:
        raise InputError(
            f"what was typed or piped is not {error.encoding}; see to the encoding of the terminal"
        ) from None
