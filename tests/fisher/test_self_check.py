"""bigmerge.fisher.self_check: engines that are wrong are caught, right ones are not."""

from __future__ import annotations

import pytest
import tiny_models as tiny
import torch
from torch import nn

from bigmerge.errors import EstimationError
from bigmerge.fisher.batch import Batch, Scores
from bigmerge.fisher.engines.hooks import HooksEngine
from bigmerge.fisher.engines.loop import LoopEngine
from bigmerge.fisher.labels.base import LABELS
from bigmerge.fisher.rules.gradients import Outer
from bigmerge.fisher.self_check import TOLERANCES, self_check

BOTH = pytest.mark.parametrize("engine", [HooksEngine, LoopEngine])
MEMORY = 1 << 20


def check(engine, model, score, labels="empirical", batch=None, **options):
    source = LABELS.get(labels)(seed=2, draws=2)
    batch = tiny.token_batch("right", (7, 4)) if batch is None else batch
    return self_check(engine, model, source, score, batch, **{"memory": MEMORY, **options})


@BOTH
@pytest.mark.parametrize("labels", ["exact", "sampled", "empirical"])
def test_right_engines_pass(labels, engine):
    checked = check(engine, tiny.bert(), tiny.classify, labels)
    assert checked.worst_error < 1e-5
    assert checked.worst_parameter in dict(tiny.bert().named_parameters())
    assert checked.tolerance == 1e-4
    # analytically zero: a shift of all keys does not change attention
    assert set(checked.noise) == {f"bert.encoder.layer.{i}.attention.self.key.bias" for i in (0, 1)}
    assert checked.compared == len(dict(tiny.bert().named_parameters())) - 2


@BOTH
@pytest.mark.parametrize("make", ["bert", "gpt2", "llama_tied"])
def test_bfloat16_models_pass(make, engine):
    # labels drawn from slightly different logits must not be taken for a disagreement
    model = getattr(tiny, make)().bfloat16()
    score = tiny.classify if make == "bert" else tiny.predict_tokens
    for seed in range(4):
        batch = tiny.token_batch("right", (12, 9), seed=seed)
        checked = check(engine, model, score, "sampled", batch)
        assert checked.tolerance == TOLERANCES[torch.bfloat16]
        assert checked.worst_error < 0.05
        assert len(checked.noise) <= 3


@BOTH
def test_both_sides_pull_back_the_same_vectors(engine):
    # as with labels that are drawn from logits which differ by rounding
    class Unrepeatable(LABELS.get("sampled")):
        calls = 0

        def columns(self, scores, ids):
            Unrepeatable.calls += 1
            self.seed = Unrepeatable.calls
            return super().columns(scores, ids)

    batch = tiny.token_batch("right", (7, 4))
    checked = self_check(
        engine, tiny.gpt2(), Unrepeatable(draws=2), tiny.predict_tokens, batch, memory=MEMORY
    )
    assert checked.worst_error < 1e-5


def test_memory_bounds_how_many_gradients_there_are_at_a_time(monkeypatch):
    asked = []
    original = torch.autograd.grad

    def spy(outputs, inputs, *args, **kwargs):
        asked.append(sum(value.numel() for value in inputs))
        return original(outputs, inputs, *args, **kwargs)

    model = tiny.llama()
    largest = max(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(torch.autograd, "grad", spy)
    checked = check(LoopEngine, model, tiny.predict_tokens, memory=12 * largest)
    assert max(asked) <= largest
    assert sum(asked) == 2 * sum(parameter.numel() for parameter in model.parameters())
    assert checked.compared == len(list(model.parameters()))


def broken_linear(self, total, workspace):
    """Positions as examples, a frequent mistake."""
    total.addmm_(self.left.flatten(0, 1).square().t(), self.right.flatten(0, 1).square())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_rule_is_caught(monkeypatch, dtype):
    monkeypatch.setattr(Outer, "add_squares", broken_linear)
    model = tiny.llama().to(dtype)
    if dtype == torch.bfloat16:
        monkeypatch.setattr(
            Outer,
            "add_squares",
            lambda self, total, workspace: broken_linear(
                Outer(self.left.float(), self.right.float()), total, workspace
            ),
        )
    with pytest.raises(EstimationError, match="differ from plain autograd") as caught:
        check(HooksEngine, model, tiny.predict_tokens)
    error = caught.value
    assert "--per-example loop" in error.hint
    assert error.data["engine"] == "hooks"
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name.removesuffix(".weight") for name in error.data["errors"]} <= linear
    first = next(iter(error.data["errors"]))
    assert first in str(error)
    assert error.data["errors"][first] == max(error.data["errors"].values())


def test_squaring_uses_apart_is_caught(monkeypatch):
    from bigmerge.fisher.engines.uses import Group

    def apart(self, use, g):
        self._square([(use, g)])

    monkeypatch.setattr(Group, "arrive", apart)
    with pytest.raises(EstimationError) as caught:
        check(HooksEngine, tiny.llama_tied(), tiny.predict_tokens)
    assert list(caught.value.data["errors"]) == ["model.embed_tokens.weight"]
    with pytest.raises(EstimationError, match="albert_layers"):
        check(HooksEngine, tiny.albert(), tiny.classify)


def test_a_parameter_that_is_forgotten_is_caught(monkeypatch):
    from bigmerge.fisher.rules.layer_norm import LayerNormRule

    original = LayerNormRule.gradients
    monkeypatch.setattr(LayerNormRule, "gradients", lambda self, x, g: {"bias": original(self, x, g)["bias"]})
    with pytest.raises(EstimationError) as caught:
        check(HooksEngine, tiny.bert(), tiny.classify)
    assert all(name.endswith("LayerNorm.weight") for name in caught.value.data["errors"])
    assert caught.value.data["errors"]["bert.embeddings.LayerNorm.weight"] == pytest.approx(1)


def test_the_tolerance_can_be_set():
    with pytest.raises(EstimationError, match="more than 1e-12"):
        check(HooksEngine, tiny.bert(), tiny.classify, tolerance=1e-12)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(x + torch.randn_like(x))


def test_a_model_that_is_random_is_caught_with_a_fitting_hint():
    def score(model, batch):
        logits = model(batch.inputs["x"]).unsqueeze(1)
        return Scores(logits, torch.ones(len(batch), 1, dtype=torch.bool), batch.targets)

    batch = Batch((0, 1), {"x": torch.randn(2, 4)}, torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(EstimationError) as caught:
        check(LoopEngine, Noisy(), score, batch=batch)
    assert "random" in caught.value.hint


@BOTH
def test_the_model_and_other_engines_are_left_alone(engine):
    model = tiny.bert()
    model.train()
    model.classifier.bias.requires_grad_(False)
    check(engine, model, tiny.classify)
    assert model.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["classifier.bias"]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())

    main = engine(model, LABELS.get("exact")(), tiny.classify, memory=MEMORY)
    check(engine, model, tiny.classify)
    assert not any(total.any() for total in main.sums.values())
    main.add(tiny.token_batch())
    assert main.sums["classifier.bias"].any()
    main.close()
