"""From (x, g) of every use of a module to squares of per-example gradients, also of shared parameters.

A parameter that is used several times in a forward pass (tied embeddings, ALBERT's layers) has the sum of
its uses' gradients for a gradient, and (a + b)² ≠ a² + b²: its uses must be added up before squaring. The
modules that share parameters with each other form a group; most groups are one module used once, and then
squares are taken as soon as g is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bigmerge.errors import EstimationError
from bigmerge.fisher.rules.base import Rule
from bigmerge.fisher.rules.gradients import ExampleGradients, Outer, Rows, Workspace, combine


@dataclass(frozen=True)
class Use:
    """One call of a module.

    Attributes:
        index: its place among the calls of the group in this forward pass.
        rule: the module's.
        names: the module's parameter name → the model's.
        x: what the module was called with, detached, examples first.
        version: of x, to notice that it was overwritten afterwards.
    """

    index: int
    rule: Rule
    names: dict[str, str]
    x: torch.Tensor
    version: int

    def check_input(self) -> None:
        """Make sure that x is still what the module saw.

        Raises:
            EstimationError: the model changed it in place.
        """
        if self.x._version != self.version:
            name = next(iter(self.names.values()))
            raise EstimationError(
                f"the model overwrites the input of the layer with {name} after using it",
                hint="use --per-example loop",
                parameter=name,
            )


@dataclass(frozen=True)
class TiedHead:
    """What is left of a head after its own squares a² were added: enough for the 2ab with the embedding.

    The gradient of a tied V × H matrix for one example is a + b with a = Σ_t g_t x_tᵀ from the head and b
    from the embedding, zero outside of the example's own tokens. (a + b)² = a² + b(2a + b), so of g (T × V)
    only the columns of those tokens are kept.

    Attributes:
        parameter: the model's name of the matrix.
        left: per embedding use (by its index), (B, T, T') columns of g at its ids.
        right: (B, T, H) inputs of the head.
    """

    parameter: str
    left: dict[int, torch.Tensor]
    right: torch.Tensor


class Group:
    """The modules that share parameters with one another.

    A batch is `begin()`, `expect()` for every call in the forward pass, `seal()`, and then for every backward
    pass `arrive()` in any order and `finish()`.

    Args:
        sums: by the model's parameter name, added to.
    """

    def __init__(self, sums: dict[str, torch.Tensor], workspace: Workspace) -> None:
        self._sums = sums
        self._workspace = workspace
        self._rows: list[torch.Tensor | None] = []  # of every expected use, Rule.touched_rows
        self._sealed = 0
        self._pending: list[tuple[Use, torch.Tensor]] = []
        self._head: TiedHead | None = None
        self._complete = False  # squares were taken of all the uses that were known

    def begin(self) -> None:
        """Forget the last batch."""
        self._rows, self._sealed = [], 0
        self._clear()

    def expect(self, rule: Rule, names: dict[str, str], x: torch.Tensor) -> Use:
        """Note a call of one of the modules."""
        use = Use(len(self._rows), rule, names, x, x._version)
        self._rows.append(rule.touched_rows(x))
        return use

    def seal(self) -> None:
        """The forward pass is over; calls noted from here on are recomputations within a backward pass."""
        self._sealed = len(self._rows)

    def arrive(self, use: Use, g: torch.Tensor) -> None:
        """The gradient at the output of `use` is there."""
        use.check_input()
        if self._complete:
            raise self._arrived_in_parts(use)
        if len(self._rows) == 1:
            self._square([(use, g)])
            self._complete = True
        elif not self._keep_as_head(use, g):
            self._pending.append((use, g))

    def finish(self) -> None:
        """The backward pass is over: square what was waiting for other uses."""
        if self._head is not None:
            self._add_embedding(self._head)
        elif self._pending:
            self._square(self._pending)
        self._clear()
        del self._rows[self._sealed :]

    def _clear(self) -> None:
        self._pending, self._head, self._complete = [], None, False

    def _square(self, uses: Sequence[tuple[Use, torch.Tensor]]) -> None:
        """Add the squares of the uses' summed gradients, as many examples at a time as memory allows."""
        step = self._workspace.examples(sum(use.rule.block_bytes(use.x, g) for use, g in uses))
        for start in range(0, len(uses[0][1]), step):
            some = slice(start, start + step)
            found: dict[str, list[ExampleGradients]] = {}
            for use, g in uses:
                for local, gradient in use.rule.gradients(use.x[some], g[some]).items():
                    found.setdefault(use.names[local], []).append(gradient)
            for name, gradients in found.items():
                combine(gradients).add_squares(self._sums[name], self._workspace)

    def _keep_as_head(self, use: Use, g: torch.Tensor) -> bool:
        """Square `use` now and keep little of it, if it is the group's only use that touches all rows."""
        if any((rows is None) != (index == use.index) for index, rows in enumerate(self._rows)):
            return False
        gradients = use.rule.gradients(use.x, g)
        matrices = [local for local, gradient in gradients.items() if isinstance(gradient, Outer)]
        if len(matrices) != 1:
            return False
        for local, gradient in gradients.items():
            gradient.add_squares(self._sums[use.names[local]], self._workspace)
        matrix = gradients[matrices[0]]
        assert isinstance(matrix, Outer)
        left = {
            index: matrix.left.gather(2, rows.unsqueeze(1).expand(-1, matrix.left.shape[1], -1))
            for index, rows in enumerate(self._rows)
            if rows is not None
        }
        self._head = TiedHead(use.names[matrices[0]], left, matrix.right)
        return True

    def _add_embedding(self, head: TiedHead) -> None:
        """Add b(2a + b) for the embedding uses, whose rows are b."""
        if not self._pending:
            return
        found: list[ExampleGradients] = []
        for use, g in self._pending:
            if use.index not in head.left:
                raise self._arrived_in_parts(use)
            found.extend(use.rule.gradients(use.x, g).values())
        rows = combine(found)
        if not isinstance(rows, Rows):
            raise TypeError(f"a rule with touched_rows gave {type(rows).__name__}")
        left = torch.cat([head.left[use.index] for use, _ in self._pending], dim=2)
        total = self._sums[head.parameter]
        step = self._workspace.examples(4 * (3 * rows.values[0].numel() + left[0].numel()))
        for start in range(0, rows.count(), step):
            some = slice(start, start + step)
            b = Rows(rows.ids[some], rows.values[some]).distinct()
            columns = b.positions.unsqueeze(1).expand(-1, left.shape[1], -1)
            a = left[some].gather(2, columns).float().transpose(1, 2) @ head.right[some].float()
            ids = b.ids.flatten()
            total.index_add_(0, ids, a.mul_(2).add_(b.sums).mul_(b.sums).flatten(0, 1))
            # where b ≈ −a the sum is zero up to rounding, on either side of it
            total[ids] = total[ids].clamp_min_(0)

    def _arrived_in_parts(self, use: Use) -> EstimationError:
        name = next(iter(use.names.values()))
        return EstimationError(
            f"the gradient of {name} arrived in parts, so its square is not known",
            hint="turn gradient checkpointing off, or use it with use_reentrant=False",
            parameter=name,
        )
