"""Stages stopped in the middle, as by Ctrl-C or a lost machine."""

import contextlib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from memlm.stage import Stage
from memlm.train import trainer as trainer_module


class Interrupted(BaseException):
    """Unlike KeyboardInterrupt it cannot stop pytest itself."""


@contextlib.contextmanager
def interrupted_after(
    step: int, error: type[BaseException] = Interrupted
) -> Iterator[pytest.ExceptionInfo[BaseException]]:
    """The run in the `with` block ends after `step` by `error`; one that does not come so far fails the test."""
    original = trainer_module._TokenBar.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            raise error
        original(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module._TokenBar, "on_step_end", on_step_end)
        with pytest.raises(error) as stop:
            yield stop


@contextlib.contextmanager
def files_written(pattern: str = "*", *, most: int | None = None) -> Iterator[list[str]]:
    """Names, filled in as they come, of the files that match and that stages in the `with` block begin to write.

    With `most`, the stage ends as it is about to write one more; if it writes no more, the test fails.
    """
    writing, names = Stage.writing, []

    def recorded(stage: Stage, name: str) -> contextlib.AbstractContextManager[Path]:
        if fnmatch(name, pattern):
            if len(names) == most:
                raise Interrupted
            names.append(name)
        return writing(stage, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "writing", recorded)
        with contextlib.nullcontext() if most is None else pytest.raises(Interrupted):
            yield names
