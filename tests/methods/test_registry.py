"""What every registered method must keep to, whoever wrote it."""

from __future__ import annotations

import inspect

import pytest
import torch

from bigmerge.errors import UsageError
from bigmerge.methods.base import METHODS, build_method, parameters_of
from tests.conftest import normal
from tests.methods.support import combine

COUNT = 1000


def fishers_for(method, models):
    return [normal(COUNT, 50 + n).square() for n in range(models)] if "fisher" in method.companions else ()


@pytest.fixture(params=METHODS.names())
def method(request):
    return METHODS.get(request.param)


def test_says_what_it_is(method):
    assert method.summary
    assert method.source
    assert inspect.getdoc(method)
    for parameter in parameters_of(method):
        assert parameter.help, f"{method.name}: parameter {parameter.name} has no help"


def test_merging_a_model_with_itself_returns_it(method):
    model = normal(COUNT, 0)
    merged = combine(method(), [model] * 3, fishers=fishers_for(method, 3), dtype=torch.float32)
    assert torch.equal(merged, model)


def test_blocks_can_be_cut_anywhere(method):
    models = [normal(COUNT, seed) for seed in range(3)]
    fishers = fishers_for(method, 3)
    whole = combine(method(), models, fishers=fishers)
    cut = [
        combine(method(), [m[part] for m in models], fishers=[f[part] for f in fishers], measured=fishers)
        for part in (slice(0, 333), slice(333, COUNT))
    ]
    torch.testing.assert_close(torch.cat(cut), whole, rtol=1e-13, atol=1e-15)


def test_is_finite_and_keeps_the_dtype(method):
    models = [normal(COUNT, seed) for seed in range(3)]
    merged = combine(method(), models, fishers=fishers_for(method, 3), dtype=torch.float32)
    assert merged.dtype == torch.float32
    assert torch.isfinite(merged).all()


@pytest.mark.parametrize("models", [2, 3, 7])
def test_uses_no_more_buffers_than_it_claims(method, models):
    # `combine` hands out exactly the claimed number and fails beyond it.
    combine(method(), [normal(COUNT, n) for n in range(models)], fishers=fishers_for(method, models))


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'fisher'"):
        METHODS.get("fischer")


def test_unknown_parameters_and_values_are_refused():
    with pytest.raises(UsageError, match="no parameter 'normalise'"):
        build_method("fisher", {"normalise": "model"})
    with pytest.raises(UsageError, match="'trace' is none of none, model, tensor, l2"):
        build_method("fisher", {"normalize": "trace"})
    with pytest.raises(UsageError, match="'maybe' is neither true nor false"):
        build_method("linear", {"normalize": "maybe"})
    with pytest.raises(UsageError, match="'much' is no float"):
        build_method("fisher", {"epsilon": "much"})


def test_text_becomes_the_parameters_type():
    assert build_method("fisher", {"epsilon": "1e-3"}).epsilon == 1e-3  # type: ignore[attr-defined]
    assert build_method("linear", {"normalize": "no"}).normalize is False  # type: ignore[attr-defined]
