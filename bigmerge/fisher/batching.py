"""Which examples go through the model together: of like length, longest first, as many as memory suggests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class BatchLimits:
    """The most one batch may hold.

    Attributes:
        examples: rows of the batch.
        tokens: rows × longest row, so padding counts.
    """

    examples: int
    tokens: int


def batch_limits(
    model: Any, *, task_scores_tokens: bool, batch_size: int | None, memory: int, device: torch.device
) -> BatchLimits:
    """Limits that keep the activations of one batch within `memory` bytes, as far as the config tells.

    Beyond a few thousand tokens a batch gains nothing, so memory is not filled for its own sake.

    Args:
        task_scores_tokens: whether logits are kept for every token (a language model).
        batch_size: exactly this many examples, whatever memory says; None: decided here.
    """
    if batch_size is not None:
        return BatchLimits(batch_size, 1 << 62)
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    width = _number(config, "hidden_size", "n_embd", "d_model", default=1024)
    inner = _number(config, "intermediate_size", "n_inner", "ffn_dim", default=4 * width)
    layers = _number(config, "num_hidden_layers", "n_layer", "num_layers", default=24)
    itemsize = next(model.parameters()).element_size()
    # Kept for the backward pass, roughly: about twelve vectors of the layer's width, three of its inner one.
    per_token = itemsize * layers * (12 * width + 3 * inner)
    if task_scores_tokens:
        per_token += (
            4 * 4 * _number(config, "vocab_size", default=32_000)
        )  # logits, softmax, columns, gradient
    cpu = device.type == "cpu"
    return BatchLimits(64 if cpu else 256, max(1, min(memory // per_token, 4096 if cpu else 32_768)))


def make_batches(lengths: Mapping[int, int], limits: BatchLimits) -> list[tuple[int, ...]]:
    """Split examples (id → tokens) into batches of ids.

    Longest first: if memory does not suffice, that shows at once; and what remains goes ever faster. The
    result depends on the arguments alone.
    """
    batches: list[tuple[int, ...]] = []
    current: list[int] = []
    for example in sorted(lengths, key=lambda example: (-lengths[example], example)):
        longest = lengths[current[0]] if current else 0
        if current and (len(current) == limits.examples or (len(current) + 1) * longest > limits.tokens):
            batches.append(tuple(current))
            current = []
        current.append(example)
    if current:
        batches.append(tuple(current))
    return batches


def _number(config: Any, *names: str, default: int) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return default
