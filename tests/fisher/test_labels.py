"""bigmerge.fisher.labels: vectors at the logits."""

from __future__ import annotations

import pytest
import torch

from bigmerge.errors import UsageError
from bigmerge.fisher.batch import Scores
from bigmerge.fisher.labels.base import LABELS
from bigmerge.fisher.labels.empirical import EmpiricalLabels
from bigmerge.fisher.labels.exact import ExactLabels, multinomial_factor
from bigmerge.fisher.labels.sampled import SampledLabels, inverse_cdf, uniform_numbers


def scores_of(logits, scored=None, targets=None):
    shape = logits.shape[:2]
    return Scores(
        logits,
        torch.ones(shape, dtype=torch.bool) if scored is None else scored,
        torch.zeros(shape, dtype=torch.int64) if targets is None else targets,
    )


def covariance(p):
    return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)


def outer_sum(columns):
    """Σ v vᵀ per example over all (position, class) pairs."""
    flat = [v.flatten(1).double() for v in columns]
    return sum(v.unsqueeze(-1) * v.unsqueeze(-2) for v in flat)


def random_scores(dtype=torch.float32):
    torch.manual_seed(0)
    scored = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    return scores_of(torch.randn(3, 4, 5, dtype=dtype) * 2, scored, torch.randint(0, 5, (3, 4)))


def test_the_registry_knows_the_three_sources():
    assert {"exact", "sampled", "empirical"} <= set(LABELS.names())


@pytest.mark.parametrize("classes", [2, 3, 7, 100])
def test_factor_is_a_square_root_of_the_covariance(classes):
    torch.manual_seed(classes)
    p = torch.softmax(torch.randn(6, classes, dtype=torch.float64) * 3, -1)
    columns = list(multinomial_factor(p))
    assert len(columns) == classes - 1
    torch.testing.assert_close(outer_sum(columns), covariance(p), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "p",
    [
        [1.0, 0.0, 0.0],
        [0.0, 1.0, 0.0],
        [0.0, 0.0, 1.0],
        [0.5, 0.0, 0.5],
        [1.0 - 1e-300, 1e-300, 0.0],
        [1e-320, 1.0, 1e-320],
        [1e-200, 1e-200, 1.0],
        [1.0, 1e-200, 1e-200],
    ],
)
def test_factor_of_degenerate_distributions_is_finite_and_right(p):
    p = torch.tensor([p], dtype=torch.float64)
    columns = list(multinomial_factor(p))
    assert all(bool(column.isfinite().all()) for column in columns)
    others = (torch.ones(p.shape[1], p.shape[1]) - torch.eye(p.shape[1])).double()
    variance = p * (p @ others)  # p(1 − p) without the cancellation
    expected = torch.diag_embed(variance) - p.unsqueeze(-1) * p.unsqueeze(-2) * others
    torch.testing.assert_close(outer_sum(columns), expected, rtol=1e-12, atol=1e-212)


def test_tiny_probabilities_keep_their_relative_precision():
    # computed as 1 − Σ p, the tail would be 0 or −1e-16 here
    p = torch.tensor([[1.0, 3e-20, 1e-20]], dtype=torch.float64)
    variance = outer_sum(list(multinomial_factor(p)))[0].diagonal()
    torch.testing.assert_close(variance, torch.tensor([4e-20, 3e-20, 1e-20]).double(), rtol=1e-6, atol=0)


def test_exact_of_extreme_logits_is_finite():
    logits = torch.tensor([[[200.0, -200.0, 0.0]], [[-1e4, 1e4, 1e4]]])
    columns = list(ExactLabels().columns(scores_of(logits), (0, 1)))
    assert all(bool(column.isfinite().all()) for column in columns)
    half = covariance(torch.tensor([0.0, 0.5, 0.5]).double())
    torch.testing.assert_close(outer_sum(columns)[1], half)


def test_two_classes_need_one_backward_pass():
    logits = torch.tensor([[[0.3, -0.7]]])
    (column,) = ExactLabels().columns(scores_of(logits), (0,))
    p = torch.softmax(logits[0, 0], -1)
    torch.testing.assert_close(column[0, 0], (p[0] * p[1]).sqrt() * torch.tensor([1.0, -1.0]))
    assert ExactLabels().column_count(2) == 1


def test_exact_with_several_positions_is_block_diagonal_over_them():
    scores = random_scores(torch.float64)
    columns = list(ExactLabels().columns(scores, (0, 1, 2)))
    assert len(columns) == ExactLabels().column_count(5, positions=3) == 12
    p = torch.softmax(scores.logits, -1)
    for example in range(3):
        blocks = [covariance(q) * bool(s) for q, s in zip(p[example], scores.scored[example], strict=True)]
        torch.testing.assert_close(outer_sum(columns)[example], torch.block_diag(*blocks))


@pytest.mark.parametrize("name", ["exact", "sampled", "empirical"])
def test_columns_follow_the_contract(name):
    labels = LABELS.get(name)(seed=1, draws=2)
    for dtype, expected in [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ]:
        scores = random_scores(dtype)
        scores.logits.requires_grad_()
        for v in labels.columns(scores, (7, 8, 9)):
            assert v.shape == scores.logits.shape
            assert v.dtype == expected
            assert not v.requires_grad
            assert not v[~scores.scored].any()
            assert float(v.sum(-1).abs().max()) < 1e-6  # scores are orthogonal to a constant shift


@pytest.mark.parametrize("name", ["exact", "sampled", "empirical"])
def test_nan_where_nothing_is_scored_does_not_leak(name):
    scores = random_scores()
    clean = list(LABELS.get(name)(seed=1).columns(scores, (7, 8, 9)))
    scores.logits[~scores.scored] = float("nan")
    scores.targets[~scores.scored] = -100
    for v, before in zip(LABELS.get(name)(seed=1).columns(scores, (7, 8, 9)), clean, strict=True):
        torch.testing.assert_close(v, before)


def test_empirical_is_the_score_of_the_data():
    scores = random_scores(torch.float64)
    (v,) = EmpiricalLabels().columns(scores, (0, 1, 2))
    logits = scores.logits.clone().requires_grad_()
    log_p = torch.log_softmax(logits, -1).gather(2, scores.targets.unsqueeze(-1)).squeeze(-1)
    (expected,) = torch.autograd.grad(log_p[scores.scored].sum(), logits)
    torch.testing.assert_close(v, expected)


def drawn(v, scored):
    """The labels behind v = e_y − p: the only positive entry."""
    return v.argmax(-1)[scored].tolist()


def test_sampled_labels_follow_the_model():
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    labels = SampledLabels(seed=3, draws=4000)
    columns = labels.columns(scores_of(p.log().view(1, 1, 4)), (17,))
    counts = torch.bincount(
        torch.tensor([drawn(v, torch.ones(1, 1).bool())[0] for v in columns]), minlength=4
    )
    # four standard deviations
    assert float((counts / 4000 - p).abs().max()) < 4 * (0.25 / 4000) ** 0.5


def test_sampled_converges_to_exact():
    scores = random_scores()
    ids = (0, 1, 2)
    exact = outer_sum(list(ExactLabels().columns(scores, ids)))
    few = outer_sum(list(SampledLabels(seed=0, draws=50).columns(scores, ids)))
    many = outer_sum(list(SampledLabels(seed=0, draws=5000).columns(scores, ids)))
    assert float((many - exact).norm() / exact.norm()) < 0.05
    assert float((many - exact).norm()) < 0.3 * float((few - exact).norm())


def test_sampled_labels_do_not_depend_on_batch_order_or_padding():
    scores = random_scores()
    scores = Scores(scores.logits, torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]).bool(), None)
    ids = (40, 41, 42)
    source = SampledLabels(seed=5, draws=3)
    together = [[drawn(v[row], scores.scored[row]) for row in range(3)] for v in source.columns(scores, ids)]

    order = [2, 0, 1]
    shuffled = Scores(scores.logits[order], scores.scored[order], None)
    for draw, v in enumerate(source.columns(shuffled, [ids[row] for row in order])):
        assert [drawn(v[place], shuffled.scored[place]) for place in range(3)] == [
            together[draw][row] for row in order
        ]
    for row in range(3):
        alone = Scores(scores.logits[row : row + 1], scores.scored[row : row + 1], None)
        for draw, v in enumerate(source.columns(alone, ids[row : row + 1])):
            assert drawn(v[0], alone.scored[0]) == together[draw][row]
        # the same scored positions, moved to the right and with gaps between them
        spread = torch.zeros(1, 9, 5)
        scored = torch.zeros(1, 9, dtype=torch.bool)
        places = [1, 4, 5, 8][: int(scores.scored[row].sum())]
        spread[0, places] = scores.logits[row][scores.scored[row]]
        scored[0, places] = True
        for draw, v in enumerate(source.columns(Scores(spread, scored, None), ids[row : row + 1])):
            assert drawn(v[0], scored[0]) == together[draw][row]


def test_uniform_numbers_are_keyed_by_seed_id_and_draw():
    base = uniform_numbers(0, (5, 6), 0, 8)
    assert base.dtype == torch.float64
    assert torch.equal(base, uniform_numbers(0, (5, 6), 0, 8))
    assert torch.equal(base[:, :3], uniform_numbers(0, (5, 6), 0, 3))
    assert torch.equal(base[1:], uniform_numbers(0, (6,), 0, 8))
    for other in (
        uniform_numbers(1, (5, 6), 0, 8),
        uniform_numbers(0, (7, 8), 0, 8),
        uniform_numbers(0, (5, 6), 1, 8),
    ):
        assert not (base == other).any()
    # streams of different draws may not overlap when shifted either
    long = set(uniform_numbers(0, (5,), 0, 4000)[0].tolist())
    assert not long & set(uniform_numbers(0, (5,), 1, 4000)[0].tolist())
    assert abs(sum(long) / 4000 - 0.5) < 0.03


PINNED = [0.4757619558679482, 0.24425777308270757]


def test_uniform_numbers_are_pinned():
    # a saved state is resumed with the same labels, so these may never change
    first = uniform_numbers(7, (123,), 2, 2)[0]
    torch.testing.assert_close(first, torch.tensor(PINNED, dtype=torch.float64), rtol=0, atol=0)


def test_inverse_cdf_never_gives_an_impossible_label():
    p = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0])
    numbers = torch.tensor([0.0, 0.3 - 1e-7, 0.31, 1 - 2.0**-53], dtype=torch.float64)
    assert inverse_cdf(p.expand(4, 5), numbers).tolist() == [1, 1, 3, 3]
    for third in (0.1, 1 / 3, 0.7):  # sums that are not exactly one
        odd = torch.tensor([third, 1 - third, 0.0]) * 0.9999999
        assert inverse_cdf(odd, torch.tensor(1 - 2.0**-53, dtype=torch.float64)).item() == 1


def test_inverse_cdf_works_in_blocks(monkeypatch):
    torch.manual_seed(0)
    p = torch.softmax(torch.randn(4, 6, 10), -1)
    numbers = torch.rand(4, 6, dtype=torch.float64)
    whole = inverse_cdf(p, numbers)
    monkeypatch.setattr("bigmerge.fisher.labels.sampled._CDF_ENTRIES", 25)
    assert torch.equal(inverse_cdf(p, numbers), whole)
    brute = (p.double().cumsum(-1) > numbers.unsqueeze(-1)).float().argmax(-1)
    assert torch.equal(whole, brute)


@pytest.mark.parametrize("draws", [0, -1])
def test_no_draws_are_refused(draws):
    with pytest.raises(UsageError, match="draws"):
        SampledLabels(draws=draws)
