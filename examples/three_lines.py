"""A base and a memory in three lines, then what the memory changed.

Run: python examples/three_lines.py BASE MEMORY "What is asthma?"
"""

import sys

import torch
from transformers import AutoTokenizer

from memlm import MixedLM

base, memory, prompt = sys.argv[1:4]
model = MixedLM.from_pretrained(base, memory=memory)

tokenizer = AutoTokenizer.from_pretrained(memory)
inputs = tokenizer(prompt, return_tensors="pt")
for weight in (0.0, *model.mix_weights.values()):
    model.set_mix_weight(weight)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    print(f"mix_weight {weight:g}: {tokenizer.decode(output[0], skip_special_tokens=True)}")

with torch.inference_mode():
    probs = model(**inputs).logits[0, -1].softmax(-1)
print(
    "next token:",
    {tokenizer.decode([i]): round(p, 3) for p, i in zip(*map(torch.Tensor.tolist, probs.topk(5)), strict=True)},
)
