from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from benchmarks.demo import evaluate, finetune, models
from benchmarks.demo.settings import Task, Training
from bigmerge.errors import CheckpointError

TASK = Task(
    name="t", title="t", labels=("even", "odd"), test=1, validation=1, train=64, max_length=8, epochs=6
)


def tiny(seed: int, labels: int = 2) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=20,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            num_labels=labels,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def some_data(count: int) -> models.Encoded:
    """Texts of 2 to 6 tokens whose label is the first token's parity."""
    rng = random.Random(0)
    ids = tuple(tuple(rng.randrange(1, 20) for _ in range(rng.randint(2, 6))) for _ in range(count))
    return models.Encoded(ids, tuple(row[0] % 2 for row in ids))


@pytest.mark.parametrize("count", [1, 7, 64, 65])
@pytest.mark.parametrize("shuffled", [False, True])
def test_batches_cover_every_text_once(count: int, shuffled: bool) -> None:
    found = list(models.batches(some_data(count), 4, random.Random(1) if shuffled else None))
    assert sorted(index for group in found for index in group) == list(range(count))
    assert max(map(len, found)) <= 4
    assert len(found) == -(-count // 4)


def test_shuffled_batches_hold_texts_of_similar_length_in_random_order() -> None:
    data = some_data(512)
    groups = list(models.batches(data, 4, random.Random(1)))
    spread = [max(len(data.ids[i]) for i in group) - min(len(data.ids[i]) for i in group) for group in groups]
    assert sum(spread) / len(spread) < 1
    means = [sum(len(data.ids[i]) for i in group) / 4 for group in groups]
    assert means != sorted(means)
    assert groups != list(models.batches(data, 4, random.Random(2)))


def test_collate_pads_on_the_right() -> None:
    data = models.Encoded(((5, 6, 7), (8,)), (1, 0))
    inputs, labels = models.collate(data, [1, 0], pad=9)
    assert inputs["input_ids"].tolist() == [[8, 9, 9], [5, 6, 7]]
    assert inputs["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert labels.tolist() == [0, 1]


def test_correct_agrees_with_one_text_at_a_time() -> None:
    model, data = tiny(0).eval(), some_data(37)
    with torch.no_grad():
        wanted = [
            int(model(input_ids=torch.tensor([row])).logits.argmax()) == label
            for row, label in zip(data.ids, data.labels, strict=True)
        ]
    assert models.correct(model, data, size=8).tolist() == wanted
    assert 0 < sum(wanted) < 37


def test_training_learns_and_repeats_exactly() -> None:
    data = some_data(64)
    training = Training(batch_size=8, body_lr=1e-2, head_lr=1e-2, frozen=())
    first, second = tiny(0), tiny(0)
    losses = finetune._train(first, data, TASK, training)
    assert len(losses) == 48
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert finetune._train(second, data, TASK, training) == losses
    for (name, ours), theirs in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert finetune._train(tiny(0), data, TASK, Training(seed=1, batch_size=8)) != losses


def test_every_weight_but_the_frozen_is_trained() -> None:
    model, fresh = tiny(0), dict(tiny(0).named_parameters())
    finetune._train(model, some_data(64), TASK, Training(batch_size=8, frozen=("pooler",)))
    still = {name for name, weight in model.named_parameters() if torch.equal(weight, fresh[name])}
    assert still == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}


def test_a_parent_is_reused_for_its_own_key_only(tmp_path: Path) -> None:
    assert finetune.reusable(tmp_path, "k") is None
    (tmp_path / finetune.RECORD).write_text('{"key": "k", "seconds": 1.0}')
    assert finetune.reusable(tmp_path, "k") == {"key": "k", "seconds": 1.0}
    assert finetune.reusable(tmp_path, "other") is None


def test_keys_follow_settings_and_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "version", lambda name: "1")
    keys = {
        finetune.key(TASK, training, texts)
        for training in (Training(), Training(seed=1), Training(body_lr=1e-4))
        for texts in ([("a", 0)], [("a", 1)], [("b", 0)])
    }
    assert len(keys) == 9
    monkeypatch.setattr(finetune, "version", lambda name: "2")
    assert finetune.key(TASK, Training(), [("a", 0)]) not in keys


def test_a_body_is_scored_with_the_head_of_the_task(tmp_path: Path) -> None:
    tiny(1, labels=2).save_pretrained(tmp_path / "two")
    tiny(2, labels=5).save_pretrained(tmp_path / "five")
    mixed = evaluate.with_body_of(
        evaluate.load_whole(tmp_path / "five"), evaluate.load_whole(tmp_path / "two")
    ).state_dict()
    two, five = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "five"))
    for name, weight in mixed.items():
        assert torch.equal(weight, (five if name.startswith("classifier") else two)[name]), name


def test_a_model_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    tiny(0).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["bert.pooler.dense.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"bert\.pooler\.dense\.bias"):
        evaluate.load_whole(tmp_path)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path) is not None
