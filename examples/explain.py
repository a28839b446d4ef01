"""Why a base and a memory say what they say: per token, who wanted it and which places of the corpus are near.

Run: python examples/explain.py BASE MEMORY DATASTORE "What is asthma?"
"""

import sys

from transformers import AutoTokenizer

from memlm import MixedLM, explain

base, memory, datastore, prompt = sys.argv[1:5]
model = MixedLM.from_pretrained(base, memory=memory)
explanation = explain(model, AutoTokenizer.from_pretrained(memory), prompt, datastore=datastore)

for token in explanation.tokens:
    gain = token.mixture_prob - token.base_prob
    print(f"{token.text!r}: base {token.base_prob:.3f}, memory {gain:+.3f}; the base alone: {token.base_choice!r}")
    for near in token.neighbors:
        place = f"{near.before}«{near.token}»{near.after}"
        print(f"    {near.document}, squared distance {near.distance:.0f}: {place!r}")
print(explanation.note)  # near neighbours are evidence, not cause
