"""Choosing the engine."""

from __future__ import annotations

import torch

from bigmerge.errors import UsageError
from bigmerge.fisher.batch import Batch
from bigmerge.fisher.engines.base import ENGINES, Score
from bigmerge.fisher.engines.hooks import HooksEngine
from bigmerge.fisher.engines.loop import LoopEngine

#: from this many tokens on, one example is work enough that batching gains nothing and only costs memory
LONG_INPUT = 256


def choose_engine(
    requested: str,
    model: torch.nn.Module,
    typical_length: float,
    batch_size: int,
    score: Score | None = None,
    batch: Batch | None = None,
) -> tuple[str, str]:
    """Which engine to use and why.

    Args:
        requested: "auto" or an engine's name.
        typical_length: tokens in a typical example.
        batch_size: examples per batch.
        score, batch: with both, the first example is run to see that the hooks cover the model.

    Returns:
        (name in `ENGINES`, reason for people).

    Raises:
        UsageError: there is no such engine, or "hooks" is asked for and cannot be exact for this model.
    """
    hooks, loop = HooksEngine.name, LoopEngine.name
    if requested not in ("auto", hooks):
        ENGINES.get(requested)
        return requested, "as requested"
    if requested == "auto" and batch_size == 1:
        return loop, "batches hold one example"
    if requested == "auto" and typical_length >= LONG_INPUT:
        return loop, f"inputs are long (typically {typical_length:.0f} tokens)"
    problems = HooksEngine.unsupported(model, score, batch)
    if not problems:
        short = f"inputs are short (typically {typical_length:.0f} tokens) and every layer has an exact rule"
        return hooks, short if requested == "auto" else "as requested"
    name, reason = next(iter(problems.items()))
    if requested == "auto":
        return loop, f"{len(problems)} parameters have no exact layer rule, e.g. {name}: {reason}"
    raise UsageError(
        f"--per-example hooks is not exact for {len(problems)} parameters, e.g. {name}: {reason}",
        hint="use --per-example loop, which is exact for every model",
        parameters=problems,
    )
