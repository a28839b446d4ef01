"""How much a memory counts along a text that changes its subject, as a picture.

Run: python examples/weights_along_a_text.py BASE MEMORY TEXT.txt WEIGHTS.png
"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import AutoTokenizer

from memlm import MixedLM

base, memory, text, picture = sys.argv[1:5]
model = MixedLM.from_pretrained(base, memory=memory)
tokenizer = AutoTokenizer.from_pretrained(memory)
ids = tokenizer(Path(text).read_text(encoding="utf-8"), return_tensors="pt").input_ids
with torch.inference_mode():
    weights = torch.as_tensor(model.components(ids).weights[0])[0]  # after each token, for the one to come

figure = Figure(figsize=(10, 0.42 * (1 + len(weights) // 24)), layout="constrained")
axes = figure.subplots()
axes.set_axis_off()
axes.set_xlim(0, 100)
across, line = 0.0, 0
for token, weight in zip(ids[0, 1:].tolist(), weights[:-1].tolist(), strict=True):
    shown = str(tokenizer.decode([token])).replace("\n", "⏎").replace("$", r"\$")
    wide = 0.78 * len(shown) + 0.2
    if across + wide > 100:
        across, line = 0.0, line + 1
    axes.text(
        across,
        -line,
        shown,
        family="monospace",
        fontsize=7.5,
        bbox={"facecolor": (0.1, 0.6, 0.35, weight), "edgecolor": "none", "pad": 1},
    )
    across += wide
axes.set_ylim(-line - 0.5, 1)
axes.set_title(f"gate {model.gate.gate}: the greener, the more the memory counted for this token", fontsize=9)
figure.savefig(picture, dpi=150)
