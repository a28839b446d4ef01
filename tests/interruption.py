"""Stages stopped in the middle, as by Ctrl-C or a lost machine."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from memlm.stage import Stage
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


@contextlib.contextmanager
def interrupted_after_arrays(count: int) -> Iterator[None]:
    """The stage in the `with` block ends when it is about to save one more array than these."""
    save, saved = Stage.save_array, []

    def save_array(stage: Stage, name: str, array: np.ndarray) -> None:
        if len(saved) == count:
            raise Interrupted
        saved.append(name)
        save(stage, name, array)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "save_array", save_array)
        with pytest.raises(Interrupted):
            yield
