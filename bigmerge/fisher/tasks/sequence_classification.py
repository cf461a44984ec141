"""Sequence classification: one categorical label for a text or a pair of texts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from bigmerge.errors import DatasetError, InputError
from bigmerge.fisher.batch import Batch, Scores
from bigmerge.fisher.tasks._text import IGNORED, TextTask, _text_config

#: up to this many classes the expectation over labels is computed exactly
_EXACT_CLASSES = 16


class SequenceClassification(TextTask):
    """Models of `AutoModelForSequenceClassification` with at least two classes."""

    name = "sequence-classification"
    auto_class = "AutoModelForSequenceClassification"
    pairs = True

    @classmethod
    def suits(cls, architectures: Sequence[str]) -> bool:
        return any(name.endswith("ForSequenceClassification") for name in architectures)

    def default_labels(self) -> str:
        return "exact" if self.config.num_labels <= _EXACT_CLASSES else "sampled"

    def check_model(self, model: torch.nn.Module) -> None:
        del model
        if self.config.num_labels < 2:
            raise InputError(
                "the model's head has a single output: it is a regression, which has no label distribution",
                hint="only classification heads with two or more classes are handled so far",
                num_labels=self.config.num_labels,
            )
        if self.config.problem_type == "multi_label_classification":
            raise InputError(
                "the model's head says yes or no to each label by itself (multi-label classification)",
                hint="only heads that choose one of several classes are handled so far",
                problem_type=self.config.problem_type,
            )

    def encode(self, row: Mapping[str, Any], example_id: int) -> dict[str, Any]:
        encoded: dict[str, Any] = dict(self._tokenize(row, example_id))
        encoded["target"] = self._label(row, example_id) if self.settings.needs_labels else IGNORED
        return encoded

    def positions(self, encoded: Mapping[str, Any]) -> int:
        return 1 if encoded["input_ids"] else 0

    def collate(self, examples: Sequence[tuple[int, Mapping[str, Any]]]) -> Batch:
        rows = [encoded for _, encoded in examples]
        return Batch(
            tuple(example_id for example_id, _ in examples),
            self._inputs(rows),
            torch.tensor([[row["target"]] for row in rows]),
        )

    def score(self, model: torch.nn.Module, batch: Batch) -> Scores:
        with _last_token_found(model, batch) as found:
            logits = self._logits(model, found)
        scored = torch.ones(len(batch), 1, dtype=torch.bool, device=logits.device)
        return Scores(logits.unsqueeze(1), scored, batch.targets)

    def _label(self, row: Mapping[str, Any], example_id: int) -> int:
        assert self._label_column is not None
        value = row[self._label_column]
        label = self._as_class(value)
        if label is None:
            raise DatasetError(
                f"row {example_id}: the label {value!r} is none of the model's classes",
                hint=f"the classes in the model's config are: {', '.join(map(str, self._classes()))}",
                row=example_id,
                label=value,
            )
        if not 0 <= label < self.config.num_labels:
            raise DatasetError(
                f"row {example_id}: the label {label} is outside the model's head, which has "
                f"{self.config.num_labels} classes (0 to {self.config.num_labels - 1})",
                row=example_id,
                label=label,
                num_labels=self.config.num_labels,
            )
        return label

    def _classes(self) -> list[str]:
        names = list(self.config.label2id or {})
        return [*names[:20], "…"] if len(names) > 20 else names

    def _as_class(self, value: Any) -> int | None:
        if isinstance(value, str):
            known = self.config.label2id or {}
            if value in known:
                return int(known[value])
            with contextlib.suppress(ValueError):
                return int(value)
            return None
        # A reader that meets an empty cell makes the whole column floating point.
        if isinstance(value, float) and value.is_integer():
            return int(value)
        return int(value) if isinstance(value, int) else None


@contextlib.contextmanager
def _last_token_found(model: torch.nn.Module, batch: Batch) -> Iterator[Batch]:
    """The batch, filled so that a model which classifies by its last token finds that token.

    Decoders score the rightmost token that is not `config.pad_token_id`. Where the config has none
    they score the last position, which padding would shift: so an id that no example ends with stands for
    padding while the batch runs. A config with a padding id is left alone: that is the model's own rule.
    """
    config = _text_config(model.config)
    mask = batch.inputs["attention_mask"]
    if config.pad_token_id is not None or (len(batch) == 1 and bool(mask.all())):
        yield batch
        return
    ids = batch.inputs["input_ids"]
    lengths = mask.sum(dim=1)
    ends = set(ids[torch.arange(len(batch), device=ids.device), lengths - 1].tolist())
    filler = next(number for number in range(len(batch) + 1) if number not in ends)
    inputs = {**batch.inputs, "input_ids": torch.where(mask.bool(), ids, filler)}
    config.pad_token_id = filler
    try:
        yield Batch(batch.ids, inputs, batch.targets)
    finally:
        config.pad_token_id = None
