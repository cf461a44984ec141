"""What to merge and how: all that the result's bytes depend on besides the inputs' content."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from bigmerge.checkpoints.checkpoint import Checkpoint
from bigmerge.checkpoints.fisher_facts import fisher_facts
from bigmerge.merging.alignment import Selection
from bigmerge.merging.sources import Source
from bigmerge.methods.base import Method, parameters_of

DEFAULT_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Recipe:
    """One merge.

    Attributes:
        sources: the models, with weights and Fishers.
        target: position of the model that unmergeable tensors, dtypes, config and tokenizer come from.
        base: with it the result is base + scale · (merged − base).
        dtype: safetensors name of the output's floating dtype; None: each tensor's dtype in the target.
        shard_bytes: most bytes of data in one output file.
    """

    sources: tuple[Source, ...]
    method: Method
    target: int = 0
    base: Checkpoint | None = None
    base_label: str | None = None
    scale: float = 1.0
    selection: Selection = field(default_factory=Selection)
    dtype: str | None = None
    shard_bytes: int = DEFAULT_SHARD_BYTES

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(source.weight for source in self.sources)

    def describe(self) -> dict[str, Any]:
        """The recipe as JSON: the same for the same merge, wherever and however it runs."""
        models = []
        for source in self.sources:
            entry: dict[str, Any] = {
                "name": source.label,
                "weight": source.weight,
                "fingerprint": source.checkpoint.fingerprint(),
            }
            if self.method.companions and source.fisher is not None:
                facts = fisher_facts(source.fisher)
                entry["fisher"] = {
                    "fingerprint": source.fisher.fingerprint(),
                    **{key: facts[key] for key in ("labels", "examples", "task") if key in facts},
                }
            models.append(entry)
        described: dict[str, Any] = {
            "format": 1,
            "method": self.method.name,
            "parameters": {
                parameter.name: getattr(self.method, parameter.name)
                for parameter in parameters_of(type(self.method))
            },
            "models": models,
            "target": self.sources[self.target].label,
        }
        if self.base is not None:
            described["base"] = {"name": self.base_label, "fingerprint": self.base.fingerprint()}
            described["scale"] = self.scale
        described["dtype"] = self.dtype
        described["selection"] = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self.selection).items()
        }
        described["shard_bytes"] = self.shard_bytes
        return described
