from __future__ import annotations

import pytest
import torch

from bigmerge.errors import UsageError
from tests.conftest import normal
from tests.methods.support import combine


@pytest.mark.parametrize("example", ["avg.uniform", "avg.weighted"])
def test_worked_examples(worked, example):
    entry = worked[example]
    merged = combine("linear", entry["inputs"]["models"], weights=entry["params"].get("weights"))
    torch.testing.assert_close(
        merged, torch.tensor(entry["expected"]["merged"], dtype=torch.float64), rtol=0, atol=entry["tol"]
    )


@pytest.mark.parametrize("normalize", [True, False])
def test_weights_are_normalised_unless_told_not_to(worked, normalize):
    entry = worked["avg.weighted_normalize"]
    expected = entry["expected"][f"normalize_{str(normalize).lower()}"]
    merged = combine(
        "linear", entry["inputs"]["models"], weights=entry["params"]["weights"], normalize=normalize
    )
    torch.testing.assert_close(merged, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=entry["tol"])


def test_wise_ft_is_a_weighted_average_with_the_pretrained_weight_first(worked):
    entry = worked["avg.wise_ft"]
    alpha = entry["params"]["alpha"]
    merged = combine(
        "linear", [entry["inputs"]["pretrained"], entry["inputs"]["finetuned"]], weights=[1 - alpha, alpha]
    )
    torch.testing.assert_close(merged.tolist(), entry["expected"]["merged"])


def test_free_lunch_snapshots_are_a_plain_average(worked):
    entry = worked["avg.checkpoint_runs"]
    snapshots = [snapshot for run in entry["inputs"]["runs"] for snapshot in run]
    torch.testing.assert_close(
        combine("linear", snapshots).tolist(), entry["expected"]["flat_equal_snapshots"]
    )


def test_accumulates_in_float32_and_rounds_once(worked):
    entry = worked["dtype.bf16_accumulate"]
    models = [torch.tensor([value], dtype=torch.bfloat16) for value in entry["inputs"]["values"]]
    merged = combine("linear", models, dtype=torch.float32).to(torch.bfloat16)
    assert merged.item() == entry["expected"]["accumulate_high_precision_cast_once"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_models_that_agree_come_back_bit_for_bit(dtype):
    model = normal(1000, 0).to(dtype)
    assert torch.equal(combine("linear", [model] * 5, weights=[0.1, 0.7, 0.3, 0.2, 0.9], dtype=dtype), model)


def test_the_order_of_models_does_not_matter_beyond_rounding():
    models = [normal(500, seed) for seed in range(4)]
    weights = [0.4, 0.1, 0.3, 0.2]
    there = combine("linear", models, weights=weights)
    back = combine("linear", models[::-1], weights=weights[::-1], target=1)
    torch.testing.assert_close(there, back, rtol=1e-12, atol=1e-14)


def test_weights_that_sum_to_zero_are_refused():
    with pytest.raises(UsageError, match="sum to zero"):
        combine("linear", [[1.0], [2.0]], weights=[1.0, -1.0])
