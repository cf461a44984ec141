"""Finding out that a gradient was not finite, and whose."""

from __future__ import annotations

import torch

from bigmerge.errors import EstimationError
from bigmerge.fisher.batch import Batch
from bigmerge.fisher.engines.base import Engine
from bigmerge.fisher.engines.model_state import plainly_differentiable
from bigmerge.fisher.engines.reference import plain_gradients


def check_finite(engine: Engine, batch: Batch) -> None:
    """Make sure that adding `batch` left the engine's sums finite.

    Looks at every sum once and waits for each device once. Only if something is wrong are the examples run
    again, one at a time, to name the first culprit.

    Raises:
        EstimationError: the sums are not finite.
    """
    largest: dict[torch.device, list[torch.Tensor]] = {}
    for total in engine.sums.values():
        if total.numel():
            largest.setdefault(total.device, []).append(total.amax())  # carries NaN along
    if all(bool(torch.stack(values).isfinite().all()) for values in largest.values()):
        return
    broken = [
        name for name, total in engine.sums.items() if total.numel() and not bool(total.amax().isfinite())
    ]
    raise _culprit(engine, batch, broken)


def _culprit(engine: Engine, batch: Batch, broken: list[str]) -> EstimationError:
    """Run the examples alone; in float32 a square overflows from 1.8e19 on, so squares are looked at."""
    parameters = dict(engine.model.named_parameters())
    hint = "measure a float32 copy of the model, or leave the example out of the data"
    with plainly_differentiable(engine.model):
        for example, gradients in plain_gradients(
            engine.model, engine.labels, engine.score, batch, [parameters[name] for name in broken]
        ):
            names = [
                name
                for name, gradient in zip(broken, gradients, strict=True)
                if gradient is not None and not bool(gradient.float().square().isfinite().all())
            ]
            if names:
                return EstimationError(
                    f"the gradient of example {example} is not finite in {len(names)} parameters, "
                    f"first in {names[0]}",
                    hint=hint,
                    example=example,
                    parameters=names,
                )
    return EstimationError(
        f"the sum of squared gradients is not finite in {len(broken)} parameters, first in {broken[0]}, "
        f"after the batch of examples {', '.join(map(str, batch.ids))}, each of which is finite alone",
        hint=hint,
        examples=list(batch.ids),
        parameters=broken,
    )
