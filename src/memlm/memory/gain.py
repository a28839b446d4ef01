"""What a memory gained on validation text, in words: for cards, `memlm info` and the line after training."""

from typing import Any

_NOTHING = 0.999  # mixture over base from which on the difference is smaller than any reader should care for


def gain_line(facts: dict[str, Any], base: str = "base") -> str:
    """Perplexities of base, memory and mixture on validation text, and mixture over base.

    Args:
        facts: Of a memory that was validated.
        base: What the base is called.
    """
    validation = facts["validation"]
    best, alone = validation["best"], validation.get("base_perplexity")  # memlm 0.1.0 did not keep the base's
    tokens = facts["corpus"]["splits"]["validation"]["positions"]
    memory, mixture, weight = (best[key] for key in ("memory_perplexity", "mixture_perplexity", "mix_weight"))
    said = f"perplexity on {tokens:,} validation tokens: "
    said += f"{base} {alone:.2f}, memory {memory:.2f}" if alone is not None else f"memory {memory:.2f}"
    said += f", mixed {mixture:.2f} at mix_weight {weight:g}"
    if alone is None:
        return said
    ratio = mixture / alone
    return f"{said}, {ratio:.4f} of the base's" + ("; the memory gains nothing" if ratio >= _NOTHING else "")
