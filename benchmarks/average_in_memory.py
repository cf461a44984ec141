"""The usual way: load the models with transformers, average their state dicts, save.

Run as `python -m benchmarks.average_in_memory OUT MODEL...`; prints its own seconds.
"""

from __future__ import annotations

import sys
import time

import torch
from transformers import AutoModelForCausalLM


def main(out: str, names: list[str]) -> None:
    """Average the models in float32, a tensor at a time, and save with transformers."""
    started = time.perf_counter()
    models = [AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16) for name in names]
    states = [model.state_dict() for model in models]
    with torch.no_grad():
        for name, tensor in states[0].items():
            tensor.copy_(sum(state[name].float() for state in states) / len(states))
    models[0].save_pretrained(out)
    print(time.perf_counter() - started)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
