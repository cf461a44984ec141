"""What is known of finished steps: that they are stored, and the digests of what was read and written."""

from __future__ import annotations

import numpy as np

from bigmerge.merging.plan import Plan
from bigmerge.storage.digests import combine_pieces, piece_count
from bigmerge.storage.journal import Entry


class StepRecords:
    """Records of the steps of `plan`, in arrays: a checkpoint of 10^12 parameters has a million steps.

    Attributes:
        done: bool, one for each step.
    """

    def __init__(self, plan: Plan) -> None:
        most = max((len(plan.inputs(tensor)) for tensor in range(len(plan.tensors))), default=1)
        self._plan = plan
        self.done = np.zeros(plan.step_count, dtype=bool)
        self._outputs = np.zeros((plan.step_count, 16), dtype=np.uint8)
        self._inputs = np.zeros((plan.step_count, most, 8), dtype=np.uint8)

    def add(self, entry: Entry) -> None:
        """Record one finished step."""
        self.done[entry.number] = True
        self._outputs[entry.number] = np.frombuffer(entry.output, dtype=np.uint8)
        for position, digest in enumerate(entry.inputs):
            self._inputs[entry.number, position] = np.frombuffer(digest, dtype=np.uint8)

    def output_digest(self, tensor: int) -> str:
        """The digest of the output tensor number `tensor`; see `bigmerge.storage.digests`."""
        return combine_pieces(digest.tobytes() for digest in self._outputs[self._steps(tensor)])

    def input_digest(self, tensor: int, position: int) -> str:
        """The digest of what was read for it from input number `position` (see `Plan.inputs`)."""
        return combine_pieces(digest.tobytes() for digest in self._inputs[self._steps(tensor), position])

    def _steps(self, tensor: int) -> slice:
        end = self._plan.step_ends[tensor]
        return slice(end - piece_count(self._plan.numel(tensor)), end)
