"""Causal language modelling: every token of a text is predicted from those before it (teacher forcing).

The log-likelihood of an example is the sum over its predicted tokens, so one example is one sequence. Prefixes
come from the data; which token follows is what a label source is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bigmerge.errors import InputError
from bigmerge.fisher.batch import Batch, Scores
from bigmerge.fisher.tasks._text import IGNORED, TextTask


class CausalLM(TextTask):
    """Models of `AutoModelForCausalLM`."""

    name = "causal-lm"
    auto_class = "AutoModelForCausalLM"
    scores_tokens = True

    @classmethod
    def suits(cls, architectures: Sequence[str]) -> bool:
        return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)

    def default_labels(self) -> str:
        return "sampled"

    def check_model(self, model: torch.nn.Module) -> None:
        # An encoder can be loaded under this head too; it would see the tokens that it is to predict.
        ids = torch.arange(8, device=next(model.parameters()).device).unsqueeze(0)
        other = ids.clone()
        other[0, -1] = 0
        with torch.no_grad():
            outputs = [
                self._logits(model, Batch((0,), {"input_ids": x, "attention_mask": torch.ones_like(x)}, x))
                for x in (ids, other)
            ]
        before, after = (output[:, :-1].float() for output in outputs)
        rounding = max(1e-5, 8 * torch.finfo(outputs[0].dtype).eps)
        if not torch.allclose(before, after, rtol=0, atol=rounding * float(before.abs().max())):
            raise InputError(
                f"{type(model).__name__} sees later tokens when it predicts one: it is no causal model",
                hint='an encoder needs "is_decoder": true in its config to be a language model',
                model=type(model).__name__,
            )

    def encode(self, row: Mapping[str, Any], example_id: int) -> dict[str, Any]:
        return dict(self._tokenize(row, example_id))

    def positions(self, encoded: Mapping[str, Any]) -> int:
        return max(0, len(encoded["input_ids"]) - 1)

    def collate(self, examples: Sequence[tuple[int, Mapping[str, Any]]]) -> Batch:
        inputs = self._inputs([encoded for _, encoded in examples])
        targets = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
        return Batch(tuple(example_id for example_id, _ in examples), inputs, targets)

    def score(self, model: torch.nn.Module, batch: Batch) -> Scores:
        logits = self._logits(model, batch)[:, :-1]
        mask = batch.inputs["attention_mask"].bool()
        return Scores(logits, mask[:, 1:] & mask[:, :-1], batch.targets[:, 1:])

    def _check_label_column(self, columns: Sequence[str]) -> tuple[str, ...]:
        del columns  # the labels are the tokens
        return ()

    def _pads_left(self) -> bool:
        return False
