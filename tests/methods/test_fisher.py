from __future__ import annotations

import math

import pytest
import torch

from bigmerge.errors import BigmergeError, UsageError
from bigmerge.methods.fisher import Fisher
from tests.conftest import normal
from tests.methods.support import combine


def merge(entry, lam=None, **parameters):
    inputs = entry["inputs"]
    return combine(
        "fisher",
        inputs["thetas"],
        fishers=inputs["fishers"],
        weights=lam or entry["params"]["lam"],
        **{"normalize": "none", **parameters},
    )


def close(merged, expected, tol=1e-12):
    torch.testing.assert_close(merged, torch.tensor(expected, dtype=torch.float64), rtol=tol, atol=tol)


def test_equation_4_with_either_policy_for_zeros(worked):
    entry = worked["fmerge.basic"]
    close(merge(entry), entry["expected"]["default_to_target"])
    close(merge(entry, zero="average"), entry["expected"]["default_to_coeff_average"])


def test_unequal_weights(worked):
    entry = worked["fmerge.lambda"]
    close(merge(entry), entry["expected"]["default_to_target"])


def test_three_models(worked):
    entry = worked["fmerge.three_models"]
    close(merge(entry), entry["expected"]["merged"])


def test_equal_l2_norms(worked):
    entry = worked["fmerge.l2_normalized"]
    close(merge(entry, normalize="l2"), entry["expected"]["merged_default_target"])


def test_the_reference_implementations_floor(worked):
    entry = worked["fmerge.reference_floor"]
    close(merge(entry, floor="reference-target"), entry["expected"]["favor_target"])
    close(
        merge(entry, floor="reference-target", normalize="l2"), entry["expected"]["favor_target_normalized"]
    )
    close(merge(entry, floor="reference-all"), entry["expected"]["floor_all"])


def test_where_the_reference_implementation_divides_by_zero_the_policy_decides(worked):
    entry = worked["fmerge.reference_nan"]
    close(merge(entry), entry["expected"]["ours_default_target"])
    close(merge(entry, floor="reference-target"), entry["expected"]["ours_default_target"])


def test_small_fishers_count_as_much_as_large_ones(worked):
    entry = worked["fmerge.floor_dominates"]
    close(merge(entry), entry["expected"]["exact"])
    close(merge(entry, floor="reference-target"), entry["expected"]["reference_favor_target"])
    close(merge(entry, floor="reference-all"), entry["expected"]["reference_floor_all"])


def test_agreeing_models_come_back_bit_for_bit(worked):
    entry = worked["fmerge.delta_form_is_idempotent"]
    thetas = [[value] for value in entry["inputs"]["thetas"]]
    fishers = [[value] for value in entry["inputs"]["lambda_times_fisher"]]
    assert (
        combine("fisher", thetas, fishers=fishers, normalize="none").item() == entry["expected"]["delta_form"]
    )


def test_fishers_stored_in_bfloat16_move_the_weights_by_less_than_the_bound(worked):
    entry = worked["fmerge.fisher_stored_as_bf16"]
    one, other = (torch.tensor(entry["inputs"][key]).bfloat16() for key in ("F1", "F2"))
    # With models 0 and 1 the merged value is the second model's weight.
    weight = 1 - combine("fisher", [[0.0] * 3, [1.0] * 3], fishers=[one, other], normalize="none")
    close(weight, entry["expected"]["weight_from_bf16"], tol=1e-7)
    exact = torch.tensor(entry["expected"]["weight_exact"], dtype=torch.float64)
    assert (weight - exact).abs().max() <= entry["expected"]["bound"]


def test_constant_fishers_give_the_weighted_average():
    models = [normal(300, seed) for seed in range(3)]
    weights = [0.2, 0.5, 0.3]
    ones = [torch.ones(300)] * 3
    expected = combine("linear", models, weights=weights)
    torch.testing.assert_close(combine("fisher", models, fishers=ones, weights=weights), expected)


def test_a_model_with_the_only_fisher_wins():
    models = [normal(300, seed) for seed in range(3)]
    fishers = [torch.zeros(300), normal(300, 5).square() + 1e-3, torch.zeros(300)]
    torch.testing.assert_close(combine("fisher", models, fishers=fishers), models[1].double())


@pytest.mark.parametrize("normalize", ["none", "model", "tensor", "l2"])
def test_one_factor_on_all_fishers_or_all_weights_changes_nothing(normalize):
    models = [normal(200, seed) for seed in range(3)]
    fishers = [normal(200, seed + 10).square() for seed in range(3)]
    plain = combine("fisher", models, fishers=fishers, weights=[1, 2, 3], normalize=normalize)
    scaled = combine(
        "fisher", models, fishers=[f * 1e-7 for f in fishers], weights=[1, 2, 3], normalize=normalize
    )
    heavier = combine("fisher", models, fishers=fishers, weights=[10, 20, 30], normalize=normalize)
    torch.testing.assert_close(scaled, plain, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(heavier, plain, rtol=1e-12, atol=1e-14)


def test_equal_traces_undo_a_factor_on_one_fisher():
    models = [normal(200, seed) for seed in range(2)]
    fishers = [normal(200, seed + 10).square() for seed in range(2)]
    plain = combine("fisher", models, fishers=fishers)
    scaled = combine("fisher", models, fishers=[fishers[0] * 2.0**20, fishers[1]])
    torch.testing.assert_close(scaled, plain)
    raw = combine("fisher", models, fishers=[fishers[0] * 2.0**20, fishers[1]], normalize="none")
    assert (raw - models[0]).abs().median() < 1e-4, "raw, the larger Fisher takes nearly all"


def test_the_result_lies_between_the_models():
    models = torch.stack([normal(1000, seed) for seed in range(4)]).double()
    fishers = [normal(1000, seed + 10).square() for seed in range(4)]
    merged = combine("fisher", list(models), fishers=fishers)
    assert (merged >= models.amin(0) - 1e-12).all()
    assert (merged <= models.amax(0) + 1e-12).all()


def test_epsilon_is_relative_to_the_mean_fisher():
    models = [[0.0, 0.0], [1.0, 1.0]]
    for scale in (1.0, 1e-12):
        fishers = [[1e-9 * scale, 2.0 * scale], [3e-9 * scale, 2.0 * scale]]
        near_zero = combine("fisher", models, fishers=fishers, epsilon=1e-6)
        close(near_zero, [0.0, 0.5], tol=1e-6)
        exact = combine("fisher", models, fishers=fishers, normalize="none")
        close(exact, [0.75, 0.5], tol=1e-6)


def test_the_error_policy_names_the_tensor():
    with pytest.raises(BigmergeError, match=r"'tensor'.*no Fisher mass"):
        combine("fisher", [[1.0], [2.0]], fishers=[[0.0], [0.0]], zero="error")


def test_the_average_policy_keeps_to_the_weights_where_fishers_vanish():
    merged = combine(
        "fisher", [[1.0, 1.0], [5.0, 5.0]], fishers=[[0.0, 1.0], [0.0, 1.0]], weights=[1, 3], zero="average"
    )
    close(merged, [4.0, 4.0])


@pytest.mark.parametrize("weights", [[-1.0, 2.0], [0.0, 0.0]])
def test_weights_without_meaning_are_refused(weights):
    with pytest.raises(UsageError, match="weights that are not negative"):
        combine("fisher", [[1.0], [2.0]], fishers=[[1.0], [1.0]], weights=weights)


@pytest.mark.parametrize("epsilon", [-1.0, math.nan, math.inf])
def test_epsilon_must_be_a_number_from_zero_upwards(epsilon):
    with pytest.raises(UsageError, match="epsilon"):
        Fisher(epsilon=epsilon)
