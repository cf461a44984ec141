"""What a task is: how its inputs are built, what the model's label distribution is, which positions count."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bigmerge.fisher.batch import Batch, Scores
from bigmerge.registry import Registry


@dataclass(frozen=True)
class TaskSettings:
    """How rows of a data set become inputs.

    Attributes:
        text_columns: columns that hold the text (two for a sentence pair); empty: the task guesses.
        label_column: column of the label; None: the task guesses or needs none.
        max_length: longest input in tokens; longer ones are truncated. None: the model has no limit.
        needs_labels: whether data labels are read; only the empirical Fisher asks for them.
    """

    text_columns: tuple[str, ...] = ()
    label_column: str | None = None
    max_length: int | None = None
    needs_labels: bool = False


class Task(ABC):
    """One kind of supervised problem, bound to a model's config and tokenizer.

    One module in `bigmerge.fisher.tasks` (or an entry point of the group `bigmerge.tasks`) adds a task.
    """

    name: ClassVar[str]
    #: name of the transformers Auto class that loads a model with the right head
    auto_class: ClassVar[str]
    #: what one example is, for the metadata: "sequence"
    unit: ClassVar[str]
    #: whether every token has a label, rather than the example as a whole
    scores_tokens: ClassVar[bool] = False

    def __init__(self, settings: TaskSettings, config: Any, tokenizer: Any) -> None:
        self.settings = settings
        self.config = config
        self.tokenizer = tokenizer

    def check_model(self, model: torch.nn.Module) -> None:  # noqa: B027 - nothing to refuse by default
        """Refuse a loaded model that has the head but that this task cannot handle.

        Raises:
            InputError: says why not.
        """

    @classmethod
    @abstractmethod
    def suits(cls, architectures: Sequence[str]) -> bool:
        """Whether a model whose config lists these `architectures` has this task's head."""

    @abstractmethod
    def default_labels(self) -> str:
        """Name of the label source to use when the user names none."""

    @abstractmethod
    def check_columns(self, columns: Sequence[str]) -> tuple[str, ...]:
        """The columns this task reads, found among `columns`.

        Raises:
            DatasetError: one is missing; the message lists those there are.
        """

    @abstractmethod
    def encode(self, row: Mapping[str, Any], example_id: int) -> dict[str, Any]:
        """One row as plain lists and ints: the tokenizer's outputs plus "target".

        Raises:
            DatasetError: the label is outside the head's range, the text is missing; names the row.
        """

    @abstractmethod
    def positions(self, encoded: Mapping[str, Any]) -> int:
        """How many positions of an encoded row are scored; a row with none is left out."""

    @abstractmethod
    def collate(self, examples: Sequence[tuple[int, Mapping[str, Any]]]) -> Batch:
        """(id, encoded) pairs padded into one batch."""

    @abstractmethod
    def score(self, model: torch.nn.Module, batch: Batch) -> Scores:
        """Run the model; the gradient flows from the returned logits."""


TASKS: Registry[Task] = Registry("task", "bigmerge.fisher.tasks", Task, "bigmerge.tasks")
