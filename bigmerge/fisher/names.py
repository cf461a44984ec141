"""From a model's parameters to the tensors of the checkpoint it was loaded from.

transformers may rename, split or fuse tensors while loading (experts stacked into one parameter, a missing
prefix) and ties parameters. A Fisher is written with the checkpoint's own names and shapes, so that it pairs with
it tensor by tensor. All that loading does to the entries of a tensor is to move them, so the same
moves in reverse, by transformers' own rules, take a sum of squares back. The way is tried with
shapes alone before an estimate starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from bigmerge.checkpoints.checkpoint import Checkpoint
from bigmerge.errors import CheckpointError


class CheckpointNames:
    """How values shaped like the parameters of `model` are stored under the names of `checkpoint`.

    Attributes:
        shapes: checkpoint tensor → shape, for every tensor that will get a value.

    Raises:
        CheckpointError: a parameter cannot be traced to tensors of the checkpoint.
    """

    def __init__(self, model: torch.nn.Module, checkpoint: Checkpoint) -> None:
        self._model: Any = model
        self._stored = checkpoint.tensors
        self._aliases = _aliases(model)
        meta = {
            name: torch.empty(parameter.shape, device="meta") for name, parameter in model.named_parameters()
        }
        self.shapes = {name: tuple(value.shape) for name, value in self.convert(meta).items()}
        wrong = [
            f"{name}: {list(shape)} from the model, {list(self._stored[name].shape)} in the checkpoint"
            for name, shape in self.shapes.items()
            if shape != self._stored[name].shape
        ]
        if wrong:
            raise _untraceable(checkpoint, wrong)

    def convert(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Values by parameter name (as `model.named_parameters()` has them) → by checkpoint name.

        Memory is shared with `values` where transformers' rules allow. A tied parameter appears under each name
        that the checkpoint stores, which is one unless the file repeats it.

        Raises:
            CheckpointError: a name is not in the checkpoint, or entries are lost on the way.
        """
        tied = {name: value for name, value in values.items() if len(self._aliases[name]) > 1}
        free = {name: value for name, value in values.items() if name not in tied}
        converted: dict[str, torch.Tensor] = {}
        lost: list[str] = []
        for name, value in self._revert(free).items():
            stored = self._find(name)
            if stored is None:
                lost.append(name)
            else:
                converted[stored] = value
        if not lost and _entries(converted.values()) != _entries(free.values()):
            lost = sorted(free)
        for name, value in tied.items():
            found = [
                (stored, back)
                for alias in self._aliases[name]
                for reverted, back in self._revert({alias: value}).items()
                if (stored := self._find(reverted)) is not None
            ]
            if not found:
                lost.append(name)
            converted.update(found)
        if lost:
            raise CheckpointError(
                f"{type(self._model).__name__}: no tensor of the checkpoint belongs to these parameters: "
                + ", ".join(lost[:5])
                + (f" and {len(lost) - 5} more" if len(lost) > 5 else ""),
                hint="save the model again with transformers' save_pretrained and measure that copy",
                parameters=lost,
            )
        return converted

    def _revert(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        reverted: dict[str, torch.Tensor] = revert_weight_conversion(self._model, values)
        return reverted

    def _find(self, name: str) -> str | None:
        """The stored name of a parameter: loading adds or drops the backbone's prefix without a trace."""
        prefix = f"{self._model.base_model_prefix}."
        for candidate in (name, prefix + name, name.removeprefix(prefix)):
            if candidate in self._stored:
                return candidate
        return None


def _aliases(model: torch.nn.Module) -> dict[str, list[str]]:
    """First name of every distinct parameter → all its names."""
    first: dict[int, str] = {}
    aliases: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(first.setdefault(id(parameter), name), []).append(name)
    return aliases


def _entries(values: Iterable[torch.Tensor]) -> int:
    return sum(value.numel() for value in values)


def _untraceable(checkpoint: Checkpoint, wrong: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.root}: the model's parameters do not have the checkpoint's shapes:\n    "
        + "\n    ".join(wrong[:10]),
        hint="save the model again with transformers' save_pretrained and measure that copy",
        tensors=wrong,
    )
