"""An explanation, and how it looks: as text for a terminal, as HTML for a notebook or a file."""

import html
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from memlm.text import printable

_WIDTH = 100
_TOKEN, _DOCUMENT = 20, 24
_GREEN, _RED, _PLAIN = "\x1b[32m", "\x1b[31m", "\x1b[0m"
_COMMON, _RARE = 1000, 10
_GROUPS = (
    f"every {_COMMON:,}th token or more: function words, marks",
    "less often",
    f"fewer than {_RARE} times: the long tail",
    "never",
)
_LIFTED = math.log(1.25)  # mixture over base from which on a token has a colour


@dataclass(frozen=True)
class Neighbor:
    """A place of the training corpus whose context is near the one that a token was generated in."""

    document: str
    """Name of its document."""
    distance: float
    """Squared L2 between the keys of both contexts."""
    before: str
    """Text before the token, within the document."""
    token: str
    """What came next there."""
    after: str
    """Text after the token, within the document."""
    entry: int
    """Entry id in the datastore."""


@dataclass(frozen=True)
class ExplainedToken:
    """What was thought of one generated token, given all text before it; probabilities over the shared vocabulary."""

    text: str
    """`�` where the token is a part of a character."""
    token_id: int
    base_prob: float
    memory_probs: dict[str, float]
    """Per memory."""
    mixture_prob: float
    base_choice: str
    """The likeliest token of the base alone."""
    base_choice_prob: float
    """Its probability under the base."""
    neighbors: list[Neighbor]
    """Nearest first."""
    memory_choices: dict[str, str] = field(default_factory=dict)
    """The likeliest token of each memory; none where a retriever found nothing."""
    weights: dict[str, float] = field(default_factory=dict)
    """What each memory counted here."""
    corpus_count: int | None = None
    """How often it is predicted in the training text of the datastore; None: there is none."""

    @property
    def lift(self) -> float:
        """By how many nats the memories made the token likelier than the base had it."""
        return math.log(max(self.mixture_prob, 1e-9) / max(self.base_prob, 1e-9))


@dataclass(frozen=True)
class Explanation:
    """A greedy answer, token by token."""

    prompt: str
    """As the model reads it, a chat template included."""
    text: str
    mix_weights: dict[str, float]
    """What each memory counts where no gate weighs it, as far as that is known; the base gets the rest."""
    tokens: list[ExplainedToken]
    """An end token, which `text` leaves out, included."""
    note: str
    """How to read the neighbours, or how to get them."""
    gate: str = "none"
    """What weighed the memories; `none`: their weights were fixed."""
    corpus_positions: int | None = None
    """Predicted tokens of the datastore's training text; None: there is none."""

    @property
    def names(self) -> list[str]:
        """Of the memories."""
        return list(self.tokens[0].memory_probs) if self.tokens else list(self.mix_weights)

    @property
    def weighed(self) -> str:
        """How the memories were weighed, as a line."""
        if self.gate != "none":
            return f"gate: {self.gate}"
        return "mix_weight: " + ", ".join(f"{name} {weight:g}" for name, weight in self.mix_weights.items())

    def moved(self, count: int) -> tuple[list[ExplainedToken], list[ExplainedToken]]:
        """Up to `count` tokens that the memories made likelier, and as many that they made less likely, by how much the
        probability of the token changed."""

        def change(token: ExplainedToken) -> float:
            return token.mixture_prob - token.base_prob

        ranked = sorted(self.tokens, key=change, reverse=True)
        lifted = [token for token in ranked[:count] if change(token) > 0]
        return lifted, [token for token in ranked[::-1][:count] if change(token) < 0]

    def _repr_html_(self) -> str:
        """For notebooks: each token as dark as the memories lifted it; its probabilities where one points at it."""
        return explanation_html(self)


# --- as text ------------------------------------------------------------------------------------------------------


def explanation_text(explanation: Explanation, *, colour: bool = False) -> str:
    """The explanation as lines of text: per token its probabilities, then what memories would have liked better, then
    its neighbours.

    Args:
        explanation: What `explain` gives.
        colour: Show tokens that the memories lifted in green, and those that they lowered in red, for a terminal.
    """
    names, gated = explanation.names, explanation.gate != "none"
    columns = ["base", *names, "mixture", *([f"w({name})" for name in names] if gated else [])]
    widths = [max(8, len(name) + 2) for name in columns]
    lines = [
        textwrap.fill(_one_line(explanation.prompt + "".join(token.text for token in explanation.tokens)), _WIDTH),
        explanation.weighed,
        "",
        f"{'token':<{_TOKEN}}"
        + "".join(f"{name:>{width}}" for name, width in zip(columns, widths, strict=True))
        + "   likeliest for the base alone",
    ]
    if any(token.neighbors for token in explanation.tokens):
        lines.append("    squared distance, document, and the place in it: «what came next there»")
    for token in explanation.tokens:
        probs = [token.base_prob, *(token.memory_probs[name] for name in names), token.mixture_prob]
        probs += [token.weights[name] for name in names] if gated else []
        shown = _clip(repr(token.text), _TOKEN)
        lines.append(
            _coloured(shown, token, colour)
            + " " * (_TOKEN - len(shown))
            + "".join(f"{prob:>{width}.4f}" for prob, width in zip(probs, widths, strict=True))
            + f"   {_clip(repr(token.base_choice), _TOKEN)} {token.base_choice_prob:.4f}"
        )
        others = [f"{name} {choice!r}" for name, choice in token.memory_choices.items() if choice != token.text]
        if others:
            lines.append(_clip(f"    likeliest for {_one_line(', '.join(others))}", _WIDTH))
        lines += [_neighbor_line(neighbor) for neighbor in token.neighbors]
    return "\n".join([*lines, "", textwrap.fill(explanation.note, _WIDTH)])


def _coloured(text: str, token: ExplainedToken, colour: bool) -> str:
    lift = token.lift
    if not colour or abs(lift) < _LIFTED:
        return text
    return f"{_GREEN if lift > 0 else _RED}{text}{_PLAIN}"


def _neighbor_line(neighbor: Neighbor) -> str:
    name = _one_line(neighbor.document)
    name = name if len(name) <= _DOCUMENT else "…" + name[1 - _DOCUMENT :]
    line = f"    {neighbor.distance:>10.1f}  {name:<{_DOCUMENT}}  "
    token = _one_line(neighbor.token)
    bare = token.strip() or token
    gap = " " if token.startswith(" ") and bare != token else ""
    before, after = _one_line(neighbor.before) + gap, _one_line(neighbor.after)
    room = max(0, _WIDTH - len(line) - len(bare) - 2)
    before = before if len(before) <= room // 2 else "…" + before[len(before) - room // 2 + 1 :]
    return f"{line}{before}«{bare}»{_clip(after, room - len(before))}"


def _one_line(text: str) -> str:
    return printable(re.sub(r"\s+", " ", re.sub(r"\s*\n\s*", "⏎", text)))


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: max(0, length - 1)] + "…"


def moved_text(explanation: Explanation, *, count: int = 5, colour: bool = False) -> str:
    """A passage with its tokens coloured, its perplexity for base and mixture, and where the memories helped and hurt
    most, as lines of text."""
    tokens = explanation.tokens
    text = explanation.prompt + "".join(_coloured(token.text, token, colour) for token in tokens)
    plain = _one_line(explanation.prompt + "".join(token.text for token in tokens))
    lines = [textwrap.fill(plain, _WIDTH) if not colour else re.sub(r"\s*\n\s*", "⏎", text)]
    lines.append(passage_line(explanation))
    for word, found in zip(("helped most", "hurt most"), explanation.moved(count), strict=True):
        moved = ", ".join(f"{token.text!r} {token.base_prob:.1%} -> {token.mixture_prob:.1%}" for token in found)
        lines.append(_one_line(f"{word}: {moved or 'nowhere'}"))
    return "\n".join(lines)


def passage_line(explanation: Explanation) -> str:
    """Perplexity of a passage for the base alone and for the mixture."""
    tokens = explanation.tokens
    base, mixture = _perplexities(tokens)
    return f"{len(tokens)} tokens, perplexity {base:.2f} for the base alone, {mixture:.2f} with the memories"


def frequency_text(explanations: Sequence[Explanation]) -> str | None:
    """Perplexity of all passages by how often the training text has a token: function words and marks against the long
    tail, as lines of text; None where no datastore tells.
    """
    groups: dict[str, list[ExplainedToken]] = {name: [] for name in _GROUPS}
    often, between, seldom, never = groups.values()
    for explanation in explanations:
        for token in explanation.tokens:
            if token.corpus_count is None or not explanation.corpus_positions:
                return None
            is_common = token.corpus_count * _COMMON >= explanation.corpus_positions
            rare = never if not token.corpus_count else seldom if token.corpus_count < _RARE else between
            (often if is_common else rare).append(token)
    lines = ["by how often the training text has the token:"]
    for name, tokens in groups.items():
        told = "none here" if not tokens else "perplexity {:.2f} -> {:.2f}".format(*_perplexities(tokens))
        lines.append(f"  {name:<50}{len(tokens):>6} tokens, {told}")
    return "\n".join(lines)


def _perplexities(tokens: Sequence[ExplainedToken]) -> tuple[float, float]:
    """Of some tokens, for the base alone and for the mixture."""
    base, mixture = (
        math.exp(-sum(math.log(max(getattr(token, name), 1e-30)) for token in tokens) / len(tokens))
        for name in ("base_prob", "mixture_prob")
    )
    return base, mixture


# --- as HTML ----------------------------------------------------------------------------------------------------------


def explanation_html(explanation: Explanation) -> str:
    """The answer as HTML: green where the memories made a token likelier than the base had it, red where less."""
    names = explanation.names
    spans = []
    for token in explanation.tokens:
        lift = token.lift
        colour = "0, 150, 80" if lift > 0 else "200, 60, 40"
        lines = [f"base {token.base_prob:.4f}", *(f"{name} {token.memory_probs[name]:.4f}" for name in names)]
        lines += [f"weight of {name} {weight:.2f}" for name, weight in token.weights.items()]
        lines += [f"mixture {token.mixture_prob:.4f}", f"the base's favourite: {token.base_choice!r}"]
        lines += [f"the favourite of {name}: {choice!r}" for name, choice in token.memory_choices.items()]
        for near in token.neighbors:
            place = f"{_one_line(near.before)}«{_one_line(near.token)}»{_one_line(near.after)}"
            lines.append(f"{near.document}: {place}")
        shade = f"background: rgba({colour}, {min(0.6, abs(lift) / 5):.2f})"
        spans.append(f'<span style="{shade}" title="{_html(chr(10).join(lines))}">{_html(token.text)}</span>')
    return (
        f'<div style="white-space: pre-wrap">{_html(explanation.prompt)}{"".join(spans)}</div>'
        f"<small>Green: likelier with the memories than without; red: less likely. Point at a token for its figures. "
        f"{_html(explanation.weighed)}. {_html(explanation.note)}</small>"
    )


def _html(text: str) -> str:
    return html.escape(printable(text))
