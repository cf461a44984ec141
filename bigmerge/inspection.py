"""`bigmerge inspect`: what a checkpoint or a Fisher is, without reading more than headers where they suffice."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigmerge.checkpoints.arguments import resolve
from bigmerge.checkpoints.checkpoint import Checkpoint, natural_key
from bigmerge.checkpoints.fisher_facts import Moments, fisher_facts, is_fisher, recorded_moments
from bigmerge.merging.heads import architectures
from bigmerge.quantities import format_bytes

_LAYER = re.compile(r"^(.*?\.\d+)\.")
_BAR = 30


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is.

    Attributes:
        fisher: what a Fisher's header says of how it was estimated; None for a model.
        layers: for a Fisher whose header records sums: layer → (share of ΣF, mean of F), in natural order.
    """

    path: Path
    checkpoint: Checkpoint
    fisher: dict[str, Any] | None
    layers: dict[str, tuple[float, float]]

    @property
    def kind(self) -> str:
        return "Fisher" if self.fisher is not None else "model"

    @property
    def parameters(self) -> int:
        return sum(spec.numel for spec in self.checkpoint.tensors.values())

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "path": str(self.path),
            "kind": self.kind.lower(),
            "architectures": architectures(self.checkpoint),
            "files": [{"name": file.name, "bytes": file.stat().st_size} for file in self.checkpoint.files],
            "parameters": self.parameters,
            "bytes": self.checkpoint.nbytes,
            "fingerprint": self.checkpoint.fingerprint(),
            "dtypes": dict(Counter(spec.dtype for spec in self.checkpoint.tensors.values())),
            "fisher": self.fisher,
            "layers": {name: {"share": share, "mean": mean} for name, (share, mean) in self.layers.items()},
            "metadata": {
                key: value
                for key, value in self.checkpoint.metadata.items()
                if not key.startswith("bigmerge.") and len(value) < 1000
            },
            "tensors": {
                name: {"dtype": spec.dtype, "shape": list(spec.shape), "file": spec.path.name}
                for name, spec in self.checkpoint.tensors.items()
            },
        }

    def describe(self, *, tensors: bool) -> str:
        """What is printed for people; with `tensors` every tensor too."""
        checkpoint = self.checkpoint
        dtypes = Counter(spec.dtype for spec in checkpoint.tensors.values())
        classes = ", ".join(architectures(checkpoint))
        lines = [
            f"{self.path}: {self.kind}{f' ({classes})' if classes else ''}",
            f"  {self.parameters:,} numbers in {len(checkpoint.tensors)} tensors "
            f"({', '.join(f'{count} {dtype}' for dtype, count in dtypes.most_common())}), "
            f"{format_bytes(checkpoint.nbytes)} in {len(checkpoint.files)} file(s)",
            f"  fingerprint {checkpoint.fingerprint()}",
        ]
        if self.fisher is not None:
            if not self.fisher:
                lines.append("  its header does not say how it was estimated")
            for key, value in self.fisher.items():
                lines.append(f"  {key.replace('_', ' ')}: {value}")
        if self.layers:
            lines.append("  share of the Fisher's mass, and its mean, by layer:")
            width = max(map(len, self.layers))
            top = max(share for share, _ in self.layers.values()) or 1.0
            for name, (share, mean) in self.layers.items():
                bar = "█" * round(_BAR * share / top)
                lines.append(f"    {name:<{width}}  {share:6.1%}  {mean:9.3g}  {bar}")
        if tensors:
            width = max(map(len, checkpoint.tensors), default=0)
            lines += [
                f"  {name:<{width}}  {spec.dtype:<7} {list(spec.shape)}  {spec.path.name}"
                for name, spec in checkpoint.tensors.items()
            ]
        return "\n".join(lines)


def inspect_checkpoint(path: str | Path) -> Inspection:
    """Look at the checkpoint at `path` (or of that hub name).

    Raises:
        CheckpointError: it is malformed or not there.
    """
    checkpoint = resolve(path)
    facts = fisher_facts(checkpoint) if is_fisher(checkpoint) else None
    layers = _by_layer(recorded_moments(checkpoint)) if is_fisher(checkpoint) else {}
    return Inspection(Path(path), checkpoint, facts, layers)


def _by_layer(moments: dict[str, Moments]) -> dict[str, tuple[float, float]]:
    groups: dict[str, Moments] = {}
    for name in sorted(moments, key=natural_key):
        match = _LAYER.match(name)
        layer = match[1] if match else name.rpartition(".")[0] or name
        groups[layer] = groups[layer] + moments[name] if layer in groups else moments[name]
    whole = sum(group.total for group in groups.values())
    return {layer: (group.total / whole if whole else 0.0, group.mean) for layer, group in groups.items()}
