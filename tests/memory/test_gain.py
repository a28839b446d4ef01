"""What a memory gained on validation text, in words."""

from typing import Any

import pytest

from memlm.memory.gain import gain_line


def facts(base: float | None, mixture: float, weight: float) -> dict[str, Any]:
    best = {"memory_perplexity": 30.0, "mixture_perplexity": mixture, "mix_weight": weight}
    validation = {"best": best} if base is None else {"base_perplexity": base, "best": best}
    return {"validation": validation, "corpus": {"splits": {"validation": {"positions": 4000}}}}


def test_base_memory_mixture_and_ratio_are_said() -> None:
    assert gain_line(facts(12.5, 10.0, 0.2), "b") == (
        "perplexity on 4,000 validation tokens: b 12.50, memory 30.00, mixed 10.00 at mix_weight 0.2,"
        " 0.8000 of the base's"
    )


@pytest.mark.parametrize(("mixture", "weight"), [(12.5, 0.0), (12.4999, 0.01)])
def test_a_memory_that_gained_nothing_is_called_so(mixture: float, weight: float) -> None:
    assert gain_line(facts(12.5, mixture, weight)).endswith("; the memory gains nothing")


def test_a_folder_that_kept_no_figure_of_the_base_says_what_it_has() -> None:
    assert gain_line(facts(None, 10.0, 0.2)).endswith("validation tokens: memory 30.00, mixed 10.00 at mix_weight 0.2")
