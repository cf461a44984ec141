"""Task heads: the tensors on top of the shared body whose meaning is one task's labels.

Averaging the heads of two tasks is meaningless even where their shapes agree, so the result has the target's
(section 2.4 of Matena & Raffel). A language model's output matrix is no task head: every model has the same
vocabulary.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from bigmerge.checkpoints.checkpoint import Checkpoint

_TASK_HEAD = re.compile(
    r"For\w*(Classification|QuestionAnswering|MultipleChoice|NextSentencePrediction|ObjectDetection|"
    r"Segmentation|CTC|XVector)$"
)
#: what heads are called beside the body, in transformers' models
_USUAL_HEADS = frozenset(
    ["classifier", "pre_classifier", "classification_head", "score", "qa_outputs", "logits_proj"]
)
_GENERIC_LABEL = re.compile(r"LABEL_\d+")


def architectures(checkpoint: Checkpoint) -> list[str]:
    """The class names in config.json; empty without one, or with something else in their place."""
    names = (checkpoint.config or {}).get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def head_tensors(checkpoint: Checkpoint) -> frozenset[str]:
    """Names of the tensors that belong to the task head, by config.json's architecture if there is one.

    In transformers' models the body has one attribute name (`bert.…`, `model.…`) and holds nearly all tensors;
    what lies beside it is the head.
    """
    if checkpoint.config is None:  # a bare weight file: only names can tell
        return frozenset(name for name in checkpoint.tensors if name.split(".", 1)[0] in _USUAL_HEADS)
    if not any(_TASK_HEAD.search(name) for name in architectures(checkpoint)):
        return frozenset()
    parts = Counter(name.split(".", 1)[0] for name in checkpoint.tensors)
    body = max(parts, key=lambda part: parts[part])
    return frozenset(name for name in checkpoint.tensors if name.split(".", 1)[0] != body)


def same_labels(checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether every config.json names the same labels, and by real names (not LABEL_0, LABEL_1, …)."""
    labels = [(checkpoint.config or {}).get("id2label") for checkpoint in checkpoints]
    first = labels[0]
    if not isinstance(first, dict) or any(other != first for other in labels[1:]):
        return False
    return not all(_GENERIC_LABEL.fullmatch(str(name)) for name in first.values())
