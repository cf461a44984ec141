"""What tasks on tokenized text have in common: finding columns, tokenizing, padding."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bigmerge.errors import DatasetError, InputError
from bigmerge.fisher.batch import Batch
from bigmerge.fisher.tasks.base import Task, TaskSettings

#: target of a position where nothing is predicted
IGNORED = -100
_SINGLE = ("text", "sentence", "content", "document", "review", "tweet", "query", "question")
_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "context"),
    ("query", "passage"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("sentence_A", "sentence_B"),
)
_LABELS = ("label", "labels")
#: columns that number the rows rather than say something
_NUMBERS = ("id", "idx", "index", "__index_level_0__")


class TextTask(Task):
    """Shared by the tasks whose input is one text or a pair of texts."""

    unit = "sequence"
    #: whether two text columns (a sentence pair) mean something for this task
    pairs: bool = False

    def __init__(self, settings: TaskSettings, config: Any, tokenizer: Any) -> None:
        super().__init__(settings, config, tokenizer)
        self._text_columns = settings.text_columns
        self._label_column: str | None = settings.label_column

    # -- columns -----------------------------------------------------------------------------------------

    def check_columns(self, columns: Sequence[str]) -> tuple[str, ...]:
        present = ", ".join(columns)
        for column in (*self.settings.text_columns, self.settings.label_column):
            if column is not None and column not in columns:
                raise DatasetError(
                    f"the data set has no column {column!r}",
                    hint=f"its columns are: {present}",
                    column=column,
                    columns=list(columns),
                )
        limit = 2 if self.pairs else 1
        if len(self.settings.text_columns) > limit:
            raise DatasetError(
                f"{len(self.settings.text_columns)} text columns were named; {self.name} takes "
                + ("one, or two for a sentence pair" if self.pairs else "one"),
                columns=list(self.settings.text_columns),
            )
        self._text_columns = self.settings.text_columns or self._guess_text(columns)
        if not self._text_columns:
            raise DatasetError(
                "the data set has no column that is clearly the text",
                hint=f"name it with --text-column; its columns are: {present}",
                columns=list(columns),
            )
        if not self.settings.needs_labels:
            return self._text_columns
        if self._label_column is None:
            self._label_column = next((column for column in _LABELS if column in columns), None)
        return self._text_columns + self._check_label_column(columns)

    def _guess_text(self, columns: Sequence[str]) -> tuple[str, ...]:
        if self.pairs:
            for pair in _PAIRS:
                if all(column in columns for column in pair):
                    return pair
        for column in _SINGLE:
            if column in columns:
                return (column,)
        others = [
            column for column in columns if column not in (*_LABELS, *_NUMBERS, self.settings.label_column)
        ]
        return (others[0],) if len(others) == 1 else ()

    def _check_label_column(self, columns: Sequence[str]) -> tuple[str, ...]:
        """The label column as a tuple; empty where the task's labels are the text itself."""
        if self._label_column is None:
            raise DatasetError(
                "the data set has no label column, and empirical labels are those of the data",
                hint="name it with --label-column, or estimate with --labels exact or sampled, which need "
                f"none; its columns are: {', '.join(columns)}",
                columns=list(columns),
            )
        return (self._label_column,)

    # -- rows --------------------------------------------------------------------------------------------

    def _tokenize(self, row: Mapping[str, Any], example_id: int) -> dict[str, list[int]]:
        texts = [self._text(row, column, example_id) for column in self._text_columns]
        limit = self.settings.max_length
        encoded = self.tokenizer(
            *texts, truncation=limit is not None, max_length=limit, return_attention_mask=False
        )
        result = {"input_ids": list(encoded["input_ids"])}
        if "token_type_ids" in encoded:
            result["token_type_ids"] = list(encoded["token_type_ids"])
        return result

    def _text(self, row: Mapping[str, Any], column: str, example_id: int) -> str:
        value = row[column]
        if isinstance(value, str):
            return value
        if isinstance(value, (int, float)) and value == value:  # a text of digits that a reader made a number
            return str(value)
        raise DatasetError(
            f"row {example_id}: column {column!r} holds {'nothing' if value is None else repr(value)[:60]} "
            "where a text is expected",
            row=example_id,
            column=column,
        )

    # -- batches -----------------------------------------------------------------------------------------

    def _pad_id(self) -> int:
        """What fills the end of shorter inputs. Any id would do, since the attention mask hides it."""
        for value in (
            _text_config(self.config).pad_token_id,
            self.tokenizer.pad_token_id,
            self.tokenizer.eos_token_id,
        ):
            if isinstance(value, list):
                value = value[0] if value else None
            if value is not None and value >= 0:
                return int(value)
        return 0

    def _pads_left(self) -> bool:
        # Padding goes to the right whatever the tokenizer's habit: positions then need no correction, and a
        # causal model never sees it. Only a model that reads its summary off the last position needs it left.
        return getattr(self.config, "summary_type", None) == "last"

    def _inputs(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask and, where the tokenizer gives them, token_type_ids; int64 (B, T)."""
        width = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self._pad_id(), "token_type_ids": int(self.tokenizer.pad_token_type_id)}
        inputs: dict[str, torch.Tensor] = {}
        for name, filler in fill.items():
            if name in rows[0]:
                inputs[name] = torch.tensor([self._pad(row[name], width, filler) for row in rows])
        inputs["attention_mask"] = torch.tensor(
            [self._pad([1] * len(row["input_ids"]), width, 0) for row in rows]
        )
        return inputs

    def _pad(self, values: Sequence[int], width: int, filler: int) -> list[int]:
        padding = [filler] * (width - len(values))
        return [*padding, *values] if self._pads_left() else [*values, *padding]

    def _logits(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """The model's logits for a batch, without a cache and without any loss."""
        parameters = inspect.signature(model.forward).parameters
        inputs = {name: value for name, value in batch.inputs.items() if name in parameters}
        if "use_cache" in parameters:
            inputs["use_cache"] = False  # type: ignore[assignment]
        if "attention_mask" not in inputs:
            raise InputError(
                f"{type(model).__name__} takes no attention mask, so padded batches would be wrong",
                model=type(model).__name__,
            )
        logits = model(**inputs).logits
        assert isinstance(logits, torch.Tensor)
        return logits


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config
