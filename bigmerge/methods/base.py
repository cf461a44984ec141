"""What a merge method is.

A method is arithmetic on one block of one tensor. Reading, memory, order, threads, resuming and writing
belong to the engine (`bigmerge.merging.engine`). One module in `bigmerge.methods`, or an entry point of
the group `bigmerge.methods` in another distribution, adds a method.
"""

from __future__ import annotations

import dataclasses
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from bigmerge.checkpoints.fisher_facts import Moments
from bigmerge.errors import UsageError
from bigmerge.registry import Registry

if TYPE_CHECKING:
    import torch


class View(ABC):
    """One block of one tensor as a method sees it: 1-D tensors of the same length, in the compute dtype.

    Attributes:
        tensor: the tensor's name, for messages.
        weights: λ of each model, as given.
        target: position of the privileged model.
        tensor_moments: companion → per model, over this whole tensor; only what `Method.statistics` names.
        model_moments: companion → per model, over all merged tensors; only what `Method.statistics` names.
    """

    tensor: str
    weights: Sequence[float]
    target: int
    tensor_moments: Mapping[str, Sequence[Moments]]
    model_moments: Mapping[str, Sequence[Moments]]

    @abstractmethod
    def theta(self, model: int) -> torch.Tensor:
        """The block of model number `model`, in a scratch buffer that the method may overwrite."""

    @abstractmethod
    def companion(self, kind: str, model: int) -> torch.Tensor:
        """The same block of a companion ("fisher") of that model, in a scratch buffer.

        Raises:
            CheckpointError: an element is negative.
        """

    @abstractmethod
    def scratch(self) -> torch.Tensor:
        """One more scratch buffer, of undefined content."""

    @abstractmethod
    def give_back(self, *buffers: torch.Tensor) -> None:
        """Scratch buffers that are no longer needed; `Method.buffers` counts those out at the same time."""


class Method(ABC):
    """Base of merge methods: frozen dataclasses whose fields are the method's parameters.

    A field's annotation (bool, int, float, str or a Literal), default and `metadata["help"]` are the one
    source for validation, command line options, and documentation.

    Attributes:
        name: as given on the command line.
        summary: one line.
        source: paper or code that defines it.
        companions: what it needs beside each model's weights, e.g. ("fisher",).
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    companions: ClassVar[tuple[str, ...]] = ()

    def check(self, weights: Sequence[float]) -> None:  # noqa: B027 - most methods take any weights
        """Check the models' λ.

        Raises:
            UsageError: the method has no meaning for them.
        """

    def statistics(self) -> tuple[str, ...]:
        """The companions whose moments must be known before the first block."""
        return ()

    @abstractmethod
    def buffers(self, models: int) -> int:
        """The most scratch buffers held at the same time when `models` models are merged."""

    @abstractmethod
    def combine(self, view: View) -> torch.Tensor:
        """The merged block, in a scratch buffer that is not given back."""


METHODS: Registry[Method] = Registry("merge method", "bigmerge.methods", Method, "bigmerge.methods")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, read off its dataclass field."""

    name: str
    kind: Any
    default: Any
    help: str

    def convert(self, value: Any) -> Any:
        """`value` (perhaps text) as this parameter's type.

        Raises:
            UsageError: it is none of the allowed values.
        """
        if typing.get_origin(self.kind) is Literal:
            choices = typing.get_args(self.kind)
            if value in choices:
                return value
            raise UsageError(f"{self.name}: {value!r} is none of {', '.join(map(str, choices))}")
        if self.kind is bool:
            text = str(value).lower()
            if text in {"true", "yes", "1", "false", "no", "0"}:
                return text in {"true", "yes", "1"}
            raise UsageError(f"{self.name}: {value!r} is neither true nor false")
        try:
            return self.kind(value)
        except (TypeError, ValueError):
            raise UsageError(f"{self.name}: {value!r} is no {self.kind.__name__}") from None


def parameters_of(method: type[Method]) -> list[Parameter]:
    """The parameters of a method, in order."""
    hints = typing.get_type_hints(method)
    return [
        Parameter(field.name, hints[field.name], field.default, field.metadata.get("help", ""))
        for field in dataclasses.fields(method)  # type: ignore[arg-type]
    ]


def build_method(name: str, values: Mapping[str, Any]) -> Method:
    """The method `name` with parameters `values`; what is not given keeps its default.

    Raises:
        UsageError: no such method or parameter, or a value outside its range.
    """
    kind = METHODS.get(name)
    known = {parameter.name: parameter for parameter in parameters_of(kind)}
    for key in values:
        if key not in known:
            raise UsageError(
                f"the method {name!r} has no parameter {key!r}",
                hint=f"it has: {', '.join(known) or 'none'}",
                method=name,
                parameter=key,
            )
    return kind(**{key: known[key].convert(value) for key, value in values.items()})
