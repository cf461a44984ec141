"""Batches: everything once, longest first, within the limits."""

from __future__ import annotations

import random
from types import SimpleNamespace

import torch

from bigmerge.fisher.batching import BatchLimits, batch_limits, make_batches


def test_batches_cover_everything_once_within_limits():
    chooser = random.Random(0)
    for _ in range(50):
        lengths = {i: chooser.randint(1, 40) for i in chooser.sample(range(1000), chooser.randint(1, 60))}
        limits = BatchLimits(chooser.randint(1, 8), chooser.randint(1, 120))
        batches = make_batches(lengths, limits)
        assert sorted(i for batch in batches for i in batch) == sorted(lengths)
        longest = [max(lengths[i] for i in batch) for batch in batches]
        assert longest == sorted(longest, reverse=True)
        for batch, longest_here in zip(batches, longest, strict=True):
            assert len(batch) <= limits.examples
            assert len(batch) == 1 or len(batch) * longest_here <= limits.tokens


def test_batches_do_not_depend_on_the_order_of_the_lengths():
    lengths = {3: 5, 1: 5, 2: 9, 0: 5}
    backwards = dict(reversed(lengths.items()))
    limits = BatchLimits(2, 100)
    assert make_batches(lengths, limits) == make_batches(backwards, limits) == [(2, 0), (1, 3)]
    assert make_batches({}, limits) == []


def limits_of(*, batch_size=None, memory=1 << 30, tokens=False, device="cpu", **config):
    model = torch.nn.Linear(1, 1)
    model.config = SimpleNamespace(**config)
    return batch_limits(
        model,
        task_scores_tokens=tokens,
        batch_size=batch_size,
        memory=memory,
        device=torch.device(device),
    )


def test_memory_bounds_the_tokens_of_a_batch():
    large = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "vocab_size": 128_000}
    few = limits_of(**large, tokens=True)
    assert 1 <= few.tokens < limits_of(**large).tokens  # logits of every token take room
    assert limits_of(**large, memory=1 << 31).tokens > limits_of(**large).tokens
    assert limits_of(**large, memory=1).tokens == 1
    assert limits_of(hidden_size=8, num_hidden_layers=1, intermediate_size=8).tokens == 4096
    assert limits_of(hidden_size=8, num_hidden_layers=1, device="cuda").tokens == 32_768


def test_a_batch_size_that_was_asked_for_is_taken():
    assert limits_of(batch_size=7, memory=1).examples == 7
    lengths = dict.fromkeys(range(14), 1000)
    assert [len(batch) for batch in make_batches(lengths, limits_of(batch_size=7))] == [7, 7]
