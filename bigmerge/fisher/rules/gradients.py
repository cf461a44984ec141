"""Per-example gradients of one parameter in factored form, and the sum of their squares.

With sequences the gradient of a linear weight for one example is G_n = Σ_t g_nt x_ntᵀ. The squares of G_n
do not follow from squares of g and x (positions are not examples), but materialising all B gradients is not
needed either: each form below adds Σ_n G_n∘G_n to a total with at most one gradient's worth of scratch.

Whatever the model's dtype, squares are computed and summed in float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch

#: up to this many positions the T(T+1)/2 products of pairs are cheaper than a gradient per example
PAIRS_UP_TO = 4


class Workspace:
    """Float32 scratch that is kept between calls: one buffer per device, as large as was ever asked for.

    Args:
        memory: bytes that temporary blocks should stay within.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self._buffers: dict[torch.device, torch.Tensor] = {}

    def matrix(self, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        """An uninitialised (rows, columns) matrix; the next call hands out the same memory."""
        buffer = self._buffers.get(device)
        if buffer is None or buffer.numel() < rows * columns:
            buffer = torch.empty(rows * columns, dtype=torch.float32, device=device)
            self._buffers[device] = buffer
        return buffer[: rows * columns].view(rows, columns)

    def examples(self, bytes_each: int) -> int:
        """How many blocks of `bytes_each` fit, at least one."""
        return max(1, self.memory // max(1, bytes_each))


class ExampleGradients(ABC):
    """Gradients G_n of one parameter for the B examples of a batch. A value: nothing changes it."""

    @abstractmethod
    def add_squares(self, total: torch.Tensor, workspace: Workspace) -> None:
        """Add Σ_n G_n∘G_n to `total`, float32 and contiguous, of the parameter's shape."""

    @abstractmethod
    def add_example(self, n: int, out: torch.Tensor) -> None:
        """Add G_n to `out`, float32 and contiguous, of the parameter's shape."""

    @abstractmethod
    def count(self) -> int:
        """B."""

    @abstractmethod
    def joined(self, other: ExampleGradients) -> ExampleGradients | None:
        """The gradients G_n + H_n in this form, or None if `other` is of another form."""


@dataclass(frozen=True)
class Outer(ExampleGradients):
    """G_n = Σ_t left_nt right_ntᵀ for a (rows, columns) parameter.

    Attributes:
        left: (B, T, rows).
        right: (B, T, columns).
    """

    left: torch.Tensor
    right: torch.Tensor

    def count(self) -> int:
        return len(self.left)

    def joined(self, other: ExampleGradients) -> Outer | None:
        if not isinstance(other, Outer):
            return None
        # a sum of two sums over positions is one sum over the positions of both
        return Outer(torch.cat((self.left, other.left), 1), torch.cat((self.right, other.right), 1))

    def add_example(self, n: int, out: torch.Tensor) -> None:
        out.addmm_(self.left[n].float().t(), self.right[n].float())

    def add_squares(self, total: torch.Tensor, workspace: Workspace) -> None:
        positions = self.left.shape[1]
        if positions == 1:
            self._add_single_position(total, workspace)
        elif positions <= PAIRS_UP_TO:
            self._add_pairs(total, workspace)
        else:
            self._add_one_by_one(total, workspace)

    def _add_single_position(self, total: torch.Tensor, workspace: Workspace) -> None:
        """(g xᵀ)∘(g xᵀ) = g² (x²)ᵀ, so all examples are one matrix product."""
        step = workspace.examples(8 * (self.left.shape[2] + self.right.shape[2]))
        for start in range(0, self.count(), step):
            left = self.left[start : start + step, 0].float().square()
            right = self.right[start : start + step, 0].float().square()
            total.addmm_(left.t(), right)

    def _add_pairs(self, total: torch.Tensor, workspace: Workspace) -> None:
        """G∘G = Σ_{s≤t} c_st (g_s∘g_t)(x_s∘x_t)ᵀ with c = 1 on the diagonal and 2 off it."""
        positions = self.left.shape[1]
        first, second = torch.triu_indices(positions, positions, device=total.device)
        weight = torch.where(first == second, 1.0, 2.0).unsqueeze(1)
        step = workspace.examples(8 * len(first) * (self.left.shape[2] + self.right.shape[2]))
        for start in range(0, self.count(), step):
            left = self.left[start : start + step].float()
            right = self.right[start : start + step].float()
            left = (left[:, first] * left[:, second]).mul_(weight)
            right = right[:, first] * right[:, second]
            total.addmm_(left.flatten(0, 1).t(), right.flatten(0, 1))

    def _add_one_by_one(self, total: torch.Tensor, workspace: Workspace) -> None:
        """One gradient at a time into the same scratch, which stays in cache; in bands of rows if large."""
        rows, columns = self.left.shape[2], self.right.shape[2]
        band = min(rows, workspace.examples(4 * columns))
        for n in range(self.count()):
            left, right = self.left[n].float(), self.right[n].float()
            for start in range(0, rows, band):
                stop = min(start + band, rows)
                scratch = workspace.matrix(stop - start, columns, total.device)
                torch.mm(left[:, start:stop].t(), right, out=scratch)
                total[start:stop].addcmul_(scratch, scratch)


@dataclass(frozen=True)
class Rows(ExampleGradients):
    """G_n = Σ_t e_{ids_nt} values_ntᵀ: a gradient that is zero outside of few rows.

    Attributes:
        ids: int64 (B, T).
        values: (B, T, columns).
    """

    ids: torch.Tensor
    values: torch.Tensor

    def count(self) -> int:
        return len(self.ids)

    def joined(self, other: ExampleGradients) -> Rows | None:
        if not isinstance(other, Rows):
            return None
        return Rows(torch.cat((self.ids, other.ids), 1), torch.cat((self.values, other.values), 1))

    def add_example(self, n: int, out: torch.Tensor) -> None:
        out.index_add_(0, self.ids[n], self.values[n].float())

    def add_squares(self, total: torch.Tensor, workspace: Workspace) -> None:
        step = workspace.examples(12 * self.values[0].numel()) if self.count() else 1
        for start in range(0, self.count(), step):
            distinct = Rows(self.ids[start : start + step], self.values[start : start + step]).distinct()
            squares = distinct.sums.square_()
            total.index_add_(0, distinct.ids.flatten(), squares.flatten(0, 1))

    def distinct(self) -> DistinctRows:
        """The same gradients with repeated ids of an example summed into one."""
        ids, order = self.ids.sort(dim=1)
        new = torch.ones_like(ids, dtype=torch.bool)
        new[:, 1:] = ids[:, 1:] != ids[:, :-1]
        slot_of_sorted = new.cumsum(1) - 1
        slot = torch.empty_like(ids).scatter_(1, order, slot_of_sorted)
        # The number of distinct ids differs per example and asking for it would wait for the device, so
        # there is a slot for every position; slots left over hold id and position 0 and a sum of zero.
        blank = torch.zeros_like(ids)
        sums = torch.zeros(self.values.shape, dtype=torch.float32, device=ids.device)
        sums.scatter_add_(1, slot.unsqueeze(-1).expand_as(sums), self.values.float())
        return DistinctRows(
            ids=blank.scatter(1, slot_of_sorted, ids),
            positions=blank.scatter(1, slot_of_sorted, order),
            sums=sums,
        )


@dataclass(frozen=True)
class DistinctRows:
    """Per example, every touched row once.

    Attributes:
        ids: int64 (B, T), the row in each slot.
        positions: int64 (B, T), a position that touched it.
        sums: float32 (B, T, columns), the sum over the positions that touched it; zero in unused slots.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    sums: torch.Tensor


@dataclass(frozen=True)
class Dense(ExampleGradients):
    """The gradients themselves.

    Attributes:
        values: (B, *shape of the parameter).
    """

    values: torch.Tensor

    def count(self) -> int:
        return len(self.values)

    def joined(self, other: ExampleGradients) -> Dense | None:
        return Dense(self.values.float() + other.values.float()) if isinstance(other, Dense) else None

    def add_example(self, n: int, out: torch.Tensor) -> None:
        out.add_(self.values[n])

    def add_squares(self, total: torch.Tensor, workspace: Workspace) -> None:
        step = workspace.examples(8 * total.numel())
        for start in range(0, self.count(), step):
            total.add_(self.values[start : start + step].float().square().sum(0))


@dataclass(frozen=True)
class Mixed(ExampleGradients):
    """A sum of different forms, squared through one dense gradient at a time."""

    parts: tuple[ExampleGradients, ...]

    def count(self) -> int:
        return self.parts[0].count()

    def joined(self, other: ExampleGradients) -> Mixed:
        return Mixed((*self.parts, other))

    def add_example(self, n: int, out: torch.Tensor) -> None:
        for part in self.parts:
            part.add_example(n, out)

    def add_squares(self, total: torch.Tensor, workspace: Workspace) -> None:
        scratch = workspace.matrix(1, total.numel(), total.device).view(total.shape)
        for n in range(self.count()):
            self.add_example(n, scratch.zero_())
            total.addcmul_(scratch, scratch)


def combine(gradients: Iterable[ExampleGradients]) -> ExampleGradients:
    """The sum, example by example, of gradients of the same parameter, in as few forms as possible.

    A parameter that a model uses several times has one gradient per use, and (a + b)² ≠ a² + b².
    """
    kinds: list[ExampleGradients] = []
    for gradient in gradients:
        for index, kind in enumerate(kinds):
            both = kind.joined(gradient)
            if both is not None:
                kinds[index] = both
                break
        else:
            kinds.append(gradient)
    return kinds[0] if len(kinds) == 1 else Mixed(tuple(kinds))


def by_position(tensor: torch.Tensor) -> torch.Tensor:
    """(B, ..., features) as (B, T, features); (B, features) has T = 1."""
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])
