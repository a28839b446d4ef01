"""How help looks: commands and options in groups, each command in one line; a hint for options of another name."""

from collections.abc import Iterable
from typing import Any

from typer.core import TyperCommand, TyperGroup

_OTHER_NAMES = {
    "--lr": "--learning-rate",
    "--bs": "--batch-size",
    "--per-device-train-batch-size": "--batch-size",
    "--num-train-epochs": "--epochs",
    "--gradient-accumulation-steps": "--accumulation",
    "--warmup-ratio": "--warmup",
    "--warmup-steps": "--warmup",
    "--wd": "--weight-decay",
    "--beta": "--kl-weight",
    "--alpha": "--mix-weight",
    "--lambda": "--mix-weight",
    "--lmbda": "--mix-weight",
    "--weight": "--mix-weight",
    "--knn-temp": "--target-temperature",
    "--tau": "--target-temperature",
    "--neighbours": "--neighbors",
    "--model": "--base",
    "--base-model": "--base",
    "--knn-model": "--teacher",
    "--output": "--out",
    "--output-dir": "--out",
    "-o": "--out",
    "--max-tokens": "--max-new-tokens",
    "--temp": "--temperature",
    "--max-length": "--block-size",
    "--separator": "--document-separator",
}
"""What other tools call an option."""


class Command(TyperCommand):
    """A command whose help shows its options by group and its examples as they are typed."""

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        paragraphs = [" ".join(part.split()) for part in (self.help or "").split("\n\n")]
        for text in (part for part in paragraphs if not part.startswith("Example: ")):
            formatter.write_paragraph()
            with formatter.indentation():
                formatter.write_text(text)
        if examples := [part.removeprefix("Example: ") for part in paragraphs if part.startswith("Example: ")]:
            with formatter.section("Examples"):
                formatter.write("".join(f"{'':>{formatter.current_indent}}{example}\n" for example in examples))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_groups(
            formatter,
            (
                ("Arguments" if param.param_type_name == "argument" else _group(param, "Options"), record)
                for param in self.get_params(ctx)
                if (record := param.get_help_record(ctx)) is not None
            ),
        )

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # of typer's own click, or of the package click, as its version has it
            meant = _OTHER_NAMES.get(getattr(error, "option_name", ""))
            if type(error).__name__ == "NoSuchOption" and any(meant in param.opts for param in self.params):
                error.possibilities = [meant]  # type: ignore[attr-defined]
            raise


class Group(TyperGroup):
    """Commands whose list shows them by group, each whole in one line."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        _write_groups(
            formatter,
            ((_group(c, "Commands"), (name, c.get_short_help_str(200))) for name, c in commands if c is not None),
        )


def _group(item: Any, otherwise: str) -> str:
    return getattr(item, "rich_help_panel", None) or otherwise


def _write_groups(formatter: Any, records: Iterable[tuple[str, tuple[str, str]]]) -> None:
    groups: dict[str, list[tuple[str, str]]] = {}
    for group, record in records:
        groups.setdefault(group, []).append(record)
    for group, rows in groups.items():
        with formatter.section(group):
            formatter.write_dl(rows)
