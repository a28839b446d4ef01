"""Training stopped in the middle, as by Ctrl-C or a lost machine."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from memlm.train import trainer as trainer_module


class Interrupted(BaseException):
    """Unlike KeyboardInterrupt it cannot stop pytest itself."""


@contextlib.contextmanager
def interrupted_after(step: int) -> Iterator[None]:
    """The run in the `with` block ends after `step`; one that does not come so far fails the test."""
    original = trainer_module._TokenBar.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            raise Interrupted
        original(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module._TokenBar, "on_step_end", on_step_end)
        with pytest.raises(Interrupted):
            yield
