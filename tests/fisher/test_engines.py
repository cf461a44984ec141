"""bigmerge.fisher.engines against float64 autograd, one unpadded example and one column at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models as tiny
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bigmerge.errors import EstimationError, UsageError
from bigmerge.fisher.batch import Batch, Scores
from bigmerge.fisher.engines.base import ENGINES
from bigmerge.fisher.engines.choice import choose_engine
from bigmerge.fisher.engines.hooks import HooksEngine
from bigmerge.fisher.engines.loop import LoopEngine
from bigmerge.fisher.engines.uses import Group
from bigmerge.fisher.labels.base import LABELS
from bigmerge.fisher.rules.base import rule_for
from bigmerge.fisher.rules.gradients import Workspace

MEMORY = 1 << 20
BOTH = pytest.mark.parametrize("engine", ["hooks", "loop"])
WORKED = {
    example["id"]: example
    for example in json.loads((Path(__file__).parents[1] / "worked_examples.json").read_text())["examples"]
}


def labels(name, draws=1, seed=3):
    return LABELS.get(name)(seed=seed, draws=draws)


def estimate(engine, model, source, score, *batches, memory=MEMORY):
    built = ENGINES.get(engine)(model, source, score, memory=memory)
    try:
        for batch in batches:
            built.add(batch)
    finally:
        built.close()
    return built.sums


def check(engine, model, source, score, *batches, bound=1e-5, memory=MEMORY):
    sums = estimate(engine, model, source, score, *batches, memory=memory)
    reference = None
    for batch in batches:
        more = tiny.reference_squares(model, source, score, batch)
        reference = more if reference is None else {name: reference[name] + more[name] for name in more}
    assert sums.keys() == dict(model.named_parameters()).keys()
    errors = tiny.relative_errors(sums, reference)
    assert len(errors) > len(sums) / 2
    bad = {name: error for name, error in errors.items() if not error <= bound}
    assert not bad
    return sums


def vectors(x, first_id=0, targets=None):
    """Plain inputs (B, ..., features) as a batch for hand-made modules."""
    targets = torch.zeros(len(x), 1, dtype=torch.int64) if targets is None else targets
    return Batch(tuple(range(first_id, first_id + len(x))), {"x": x}, targets)


def score_vectors(model, batch):
    """Logits (B, S, K) of a hand-made module, all scored."""
    logits = model(batch.inputs["x"])
    logits = logits.unsqueeze(1) if logits.dim() == 2 else logits
    scored = torch.ones(logits.shape[:2], dtype=torch.bool)
    return Scores(logits, scored, batch.targets.expand(logits.shape[:2]))


# transformers models


@BOTH
@pytest.mark.parametrize("source", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize(
    ("model", "side"),
    # encoders read the first position, which must not be padding
    [("bert", "right"), ("albert", "right"), ("llama_classifier", "right"), ("llama_classifier", "left")],
)
def test_classifiers(model, side, source, engine):
    batch = tiny.token_batch(side)
    check(engine, getattr(tiny, model)(), labels(source, draws=2), tiny.classify, batch)


@BOTH
@pytest.mark.parametrize("source", ["sampled", "empirical"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("model", ["gpt2", "llama", "llama_tied", "qwen3", "gemma3"])
def test_language_models(model, side, source, engine):
    batch = tiny.token_batch(side)
    check(engine, getattr(tiny, model)(), labels(source, draws=2), tiny.predict_tokens, batch)


@BOTH
def test_exact_labels_of_a_sequence(engine):
    # (lengths − 1) × (V − 1) columns; small enough to do all
    batch = tiny.token_batch("right", lengths=(3, 2))
    check(engine, tiny.llama_tied(), labels("exact"), tiny.predict_tokens, batch)


def test_exact_is_the_expectation_over_labels_written_out():
    model = tiny.bert()
    batch = tiny.token_batch("right")
    sums = estimate("hooks", model, labels("exact"), tiny.classify, batch)
    parameters = dict(model.named_parameters())
    expected = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for index in range(len(batch)):
        scores = tiny.classify(model, tiny.alone_without_padding(batch, index))
        log_p = torch.log_softmax(scores.logits[0, 0], -1)
        for c in range(3):
            found = torch.autograd.grad(log_p[c], list(parameters.values()), retain_graph=True)
            for name, gradient in zip(parameters, found, strict=True):
                expected[name] += log_p[c].detach().exp() * gradient.square()
    expected = {name: value.detach().double() for name, value in expected.items()}
    assert max(tiny.relative_errors(sums, expected).values()) < 1e-5


@BOTH
def test_batches_of_different_lengths_and_one_example(engine):
    batches = [
        tiny.token_batch("right", (7, 4, 6), seed=0, first_id=0),
        tiny.token_batch("right", (2,), seed=1, first_id=3),
        tiny.token_batch("right", (3, 11), seed=2, first_id=4),
        tiny.token_batch("right", (1,), seed=3, first_id=6),
    ]
    check(engine, tiny.bert(), labels("exact"), tiny.classify, *batches)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_implementations(attention):
    model = tiny.llama()
    model.set_attn_implementation(attention)
    sums = estimate("hooks", model, labels("empirical"), tiny.predict_tokens, tiny.token_batch())
    plain = tiny.reference_squares(tiny.llama(), labels("empirical"), tiny.predict_tokens, tiny.token_batch())
    assert max(tiny.relative_errors(sums, plain).values()) < 1e-5


@BOTH
def test_little_memory_gives_the_same(engine):
    for model, score in ((tiny.llama_tied(), tiny.predict_tokens), (tiny.albert(), tiny.classify)):
        check(engine, model, labels("empirical"), score, tiny.token_batch(), memory=1)


@pytest.mark.parametrize("make", [tiny.mixtral, tiny.qwen3_moe])
def test_mixtures_of_experts_are_left_to_the_loop(make):
    model = make()
    problems = HooksEngine.unsupported(model)
    assert "model.layers.0.mlp.experts.gate_up_proj" in problems
    assert "MoE" in str(problems) or "Experts" in str(problems)
    batch = tiny.token_batch()
    with pytest.raises(EstimationError, match=r"experts\.gate_up_proj") as caught:
        HooksEngine(model, labels("sampled"), tiny.predict_tokens, memory=MEMORY)
    assert "loop" in caught.value.hint
    assert choose_engine("auto", model, 16, 8)[0] == "loop"
    check("loop", model, labels("sampled"), tiny.predict_tokens, batch)


@BOTH
def test_bfloat16_models_are_summed_in_float32(engine):
    model = tiny.bert().bfloat16()
    batch = tiny.token_batch()
    many = [batch] * 150
    sums = estimate(engine, model, labels("empirical"), tiny.classify, *many)
    once = estimate(engine, model, labels("empirical"), tiny.classify, batch)
    for name, total in sums.items():
        assert total.dtype == torch.float32
        # bfloat16 sums stop growing after some 128 equal terms
        torch.testing.assert_close(total, 150 * once[name], rtol=1e-4, atol=0)
    reference = tiny.reference_squares(model, labels("empirical"), tiny.classify, batch)
    reference = {name: value for name, value in reference.items() if not name.endswith("key.bias")}
    assert max(tiny.relative_errors(once, reference).values()) < 0.2


# what the numbers mean


@BOTH
def test_repeating_the_data_leaves_the_mean_unchanged(engine):
    model, batch = tiny.bert(), tiny.token_batch()
    twice = Batch(
        batch.ids * 2,
        {name: torch.cat((value, value)) for name, value in batch.inputs.items()},
        torch.cat((batch.targets, batch.targets)),
    )
    for source in ("exact", "sampled", "empirical"):
        once = estimate(engine, model, labels(source), tiny.classify, batch)
        double = estimate(engine, model, labels(source), tiny.classify, twice)
        for name, total in double.items():
            torch.testing.assert_close(total / 6, once[name] / 3, rtol=1e-4, atol=1e-9)


@BOTH
def test_batch_size_does_not_matter(engine):
    model, batch = tiny.llama_tied(), tiny.token_batch()
    whole = estimate(engine, model, labels("sampled"), tiny.predict_tokens, batch)
    single = [batch.select(index, index + 1) for index in (2, 0, 1)]
    apart = estimate(engine, model, labels("sampled"), tiny.predict_tokens, *single)
    for name, total in whole.items():
        torch.testing.assert_close(apart[name], total, rtol=1e-4, atol=1e-6)


@BOTH
def test_uniform_predictions_have_information(engine):
    # a squared sum over classes of √p ∇log p, another formula in use, is zero here
    model = nn.Linear(2, 3, bias=False)
    nn.init.zeros_(model.weight)
    sums = estimate(engine, model, labels("exact"), score_vectors, vectors(torch.tensor([[2.0, -1.0]])))
    x_squared = torch.tensor([4.0, 1.0])
    torch.testing.assert_close(sums["weight"], (2 / 9) * x_squared.expand(3, 2))


class Logistic(nn.Module):
    """p(y = 1 | x) = sigmoid(w·x), as two logits."""

    def __init__(self, w):
        super().__init__()
        self.linear = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([w]))

    def forward(self, x):
        z = self.linear(x)
        return torch.cat((torch.zeros_like(z), z), dim=-1)


@BOTH
def test_worked_example_of_logistic_regression(engine):
    example = WORKED["fisher.binary_logistic"]
    model = Logistic(example["inputs"]["w"])
    x = torch.tensor(example["inputs"]["X"])
    y = torch.tensor(example["inputs"]["y"]).long().unsqueeze(1)
    batch = vectors(x, targets=y)
    for source, key in (("exact", "exact"), ("empirical", "empirical")):
        mean = estimate(engine, model, labels(source), score_vectors, batch)["linear.weight"][0] / 3
        torch.testing.assert_close(mean, torch.tensor(example["expected"][key]), rtol=1e-5, atol=0)
    for row, expected in enumerate(example["expected"]["exact_per_example"]):
        one = estimate(engine, model, labels("exact"), score_vectors, batch.select(row, row + 1))
        torch.testing.assert_close(one["linear.weight"][0], torch.tensor(expected), rtol=1e-5, atol=0)


@BOTH
def test_worked_example_at_even_odds(engine):
    example = WORKED["fisher.sqrtp_trick_at_half"]
    model = Logistic(example["inputs"]["w"])
    batch = vectors(torch.tensor([example["inputs"]["x"]]))
    sums = estimate(engine, model, labels("exact"), score_vectors, batch)
    torch.testing.assert_close(sums["linear.weight"][0], torch.tensor(example["expected"]["exact"]))


@BOTH
def test_worked_example_of_three_classes(engine):
    example = WORKED["fisher.softmax3"]
    model = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor(example["inputs"]["W"]))
    x = torch.tensor([example["inputs"]["x"]])
    sums = estimate(engine, model, labels("exact"), score_vectors, vectors(x))
    torch.testing.assert_close(sums["weight"], torch.tensor(example["expected"]["exact"]), rtol=1e-5, atol=0)
    for label, expected in example["expected"]["given_label"].items():
        batch = vectors(x, targets=torch.tensor([[int(label)]]))
        sums = estimate(engine, model, labels("empirical"), score_vectors, batch)
        torch.testing.assert_close(sums["weight"], torch.tensor(expected), rtol=1e-5, atol=0)


@BOTH
def test_worked_example_of_a_sequence(engine):
    # at w = 0 the score of label 1 at input x is x/2; one example is the sequence of both tokens
    example = WORKED["fisher.sequence_scaling"]
    x = 2 * torch.tensor([[example["inputs"]["g1"], example["inputs"]["g2"]]])
    batch = vectors(x, targets=torch.ones(1, 1, dtype=torch.int64))
    sums = estimate(engine, Logistic([0.0, 0.0]), labels("empirical"), score_vectors, batch)
    expected = torch.tensor(example["expected"]["sequence_logprob_sum"])
    torch.testing.assert_close(sums["linear.weight"][0], expected)


@BOTH
def test_worked_example_of_labels_drawn_from_the_model(engine):
    example = WORKED["fisher.sampled_batch_identity"]
    model = Logistic(example["inputs"]["w"])
    batch = vectors(torch.tensor(example["inputs"]["X"]))
    expected = torch.tensor(example["expected"]["sum_of_exact_per_example"])
    exact = estimate(engine, model, labels("exact"), score_vectors, batch)["linear.weight"][0]
    torch.testing.assert_close(exact, expected, rtol=1e-5, atol=0)
    drawn = estimate(engine, model, labels("sampled", draws=2000), score_vectors, batch)["linear.weight"][0]
    assert float((drawn - expected).norm() / expected.norm()) < 0.1
    single = estimate(engine, model, labels("sampled"), score_vectors, batch)["linear.weight"][0]
    assert float((drawn - expected).norm()) < float((single - expected).norm())


# parameters with several uses


class Twice(nn.Module):
    """One linear layer and one norm called twice, a convolution as well, and an unused layer."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.rms = nn.RMSNorm(6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)
        self.unused = nn.Linear(6, 6)

    def forward(self, x):
        for _ in range(2):
            x = self.rms(x + torch.tanh(self.mix(self.norm(x))))
            x = x + torch.tanh(self.conv(x.transpose(1, 2))).transpose(1, 2)
        self.unused(x)  # its output goes nowhere
        return self.head(x)


class Convolved(nn.Module):
    """Layers that only the generic rule knows, each used once."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(6, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.gate, self.head = nn.PReLU(), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.gate(self.norm(self.conv(x.transpose(1, 2)))).transpose(1, 2))


class TwoPlaces(nn.Module):
    """One weight in two linear layers that have their own biases."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))).mean(1))


class Tied(nn.Module):
    """An embedding tied to the head (and a bias of the head), with `uses` of each."""

    def __init__(self, embeddings=1, heads=1, padding=None):
        super().__init__()
        self.embed = nn.Embedding(9, 6, padding_idx=padding)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 9)
        self.head.weight = self.embed.weight
        self.embeddings, self.heads = embeddings, heads

    def forward(self, x):
        h = self.embed(x)
        for shift in range(1, self.embeddings):
            h = h * self.embed(x.roll(shift, 1))
        h = torch.tanh(self.mix(h)).cumsum(1)
        logits = self.head(h)
        for _ in range(1, self.heads):
            logits = logits + self.head(torch.tanh(h))
        return logits


class TransposedTie(nn.Module):
    """Input and output of an autoencoder share one matrix through differently oriented layers."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.encode, self.decode = nn.Linear(6, 4), Conv1D(6, 4)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(torch.tanh(self.encode(x)))


@BOTH
@pytest.mark.parametrize("source", ["exact", "empirical"])
@pytest.mark.parametrize("make", [Twice, TwoPlaces, TransposedTie, Convolved])
def test_hand_made_models(make, source, engine):
    torch.manual_seed(0)
    model = tiny.shaken(make())
    for length in (1, 2, 5):
        check(engine, model, labels(source), score_vectors, vectors(torch.randn(4, length, 6)))


@BOTH
@pytest.mark.parametrize("memory", [1, MEMORY])
@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize(("embeddings", "heads"), [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_tied_embedding_and_head(embeddings, heads, padding, memory, engine):
    model = tiny.shaken(Tied(embeddings, heads, padding))
    ids = torch.randint(0, 4, (4, 7), generator=torch.Generator().manual_seed(2))
    check(engine, model, labels("sampled", draws=2), score_vectors, vectors(ids), memory=memory)


def test_a_tied_embedding_never_gives_negative_squares():
    # where the head's and the embedding's gradients cancel, Σ (a + b)² is rounding of either sign
    torch.manual_seed(0)
    model = Tied()
    sums = {"weight": torch.zeros(9, 6)}
    group = Group(sums, Workspace(MEMORY))
    ids = torch.arange(9).repeat(8, 1)
    x, g = torch.randn(8, 5, 6), torch.randn(8, 5, 9)
    group.begin()
    embedding = group.expect(rule_for(model.embed), {"weight": "weight"}, ids)
    head = group.expect(rule_for(nn.Linear(6, 9, bias=False)), {"weight": "weight"}, x)
    group.seal()
    group.arrive(head, g)
    assert float(sums["weight"].min()) > 1
    group.arrive(embedding, -(g.transpose(1, 2) @ x))
    group.finish()
    assert float(sums["weight"].min()) >= 0
    assert float(sums["weight"].max()) < 1e-4


class FromOnePosition(nn.Module):
    """Embeds positions once for the whole batch, as BERT and GPT-2 do, and then works in place."""

    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Embedding(9, 6), nn.Embedding(8, 6)
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.embed(x)
        h += self.mix(self.position(torch.arange(x.shape[1]).unsqueeze(0)))
        return self.head(torch.tanh(h).mean(1))


@BOTH
def test_positions_embedded_once_for_all_examples(engine):
    model = tiny.shaken(FromOnePosition())
    ids = torch.randint(0, 9, (4, 7), generator=torch.Generator().manual_seed(2))
    check(engine, model, labels("exact"), score_vectors, vectors(ids))


class Checkpointed(nn.Module):
    """Recomputes its layers; `again` runs the same layer in two recomputed segments."""

    def __init__(self, reentrant, again=False):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)
        self.reentrant, self.again = reentrant, again

    def forward(self, x):
        h = self.norm(x)
        for layer in (self.first, self.first if self.again else self.second):
            h = checkpoint(lambda h, layer=layer: torch.tanh(layer(h)), h, use_reentrant=self.reentrant)
        return self.head(h)


@BOTH
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, engine):
    torch.manual_seed(0)
    model = tiny.shaken(Checkpointed(reentrant))
    check(engine, model, labels("sampled", draws=2), score_vectors, vectors(torch.randn(4, 5, 6)))


@BOTH
def test_a_shared_layer_under_checkpointing_is_right_or_refused(engine):
    torch.manual_seed(0)
    batch = vectors(torch.randn(4, 5, 6))
    check(engine, tiny.shaken(Checkpointed(False, again=True)), labels("sampled"), score_vectors, batch)
    with pytest.raises(EstimationError, match=r"first\.weight arrived in parts|first\.bias arrived in parts"):
        estimate(engine, tiny.shaken(Checkpointed(True, again=True)), labels("sampled"), score_vectors, batch)


class HeadAgain(Tied):
    """Uses the tied head once plainly and once in a recomputed segment, `recomputed` first or second."""

    def __init__(self, recomputed):
        super().__init__()
        self.recomputed = recomputed

    def forward(self, x):
        h = torch.tanh(self.mix(self.embed(x)))
        logits = 0.0
        for turn in (1, 2):
            if turn == self.recomputed:
                logits += checkpoint(lambda h: self.head(torch.tanh(h)), h, use_reentrant=True)
            else:
                logits += self.head(h)
        return logits


@pytest.mark.parametrize("draws", [1, 2])
def test_a_tied_head_used_again_in_a_recomputed_segment_is_right_or_refused(draws):
    ids = torch.randint(0, 4, (4, 7), generator=torch.Generator().manual_seed(2))
    source = labels("sampled", draws)
    # the backward pass meets the second use first: either it is known of when the other one arrives ...
    check("hooks", tiny.shaken(HeadAgain(recomputed=2)), source, score_vectors, vectors(ids))
    # ... or the head has been squared alone by then
    with pytest.raises(EstimationError, match="arrived in parts"):
        estimate("hooks", tiny.shaken(HeadAgain(recomputed=1)), source, score_vectors, vectors(ids))


@BOTH
def test_transformers_checkpointing(engine):
    model = tiny.llama()
    # renamed in transformers 5
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    model.train()
    check(engine, model, labels("sampled"), tiny.predict_tokens, tiny.token_batch())
    assert model.training


# what hooks cannot do


class BareUse(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(nn.functional.linear(x, self.body.weight)))


class Flattened(nn.Module):
    """Puts the positions of all examples in one dimension, as routed experts do."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x.reshape(-1, 6))).reshape(x.shape))


class LengthFirst(Flattened):
    def forward(self, x):
        return self.head(torch.tanh(self.body(x.transpose(0, 1))).transpose(0, 1))


class Recurrent(Flattened):
    def __init__(self):
        super().__init__()
        self.body = nn.LSTM(6, 6, batch_first=True)

    def forward(self, x):
        return self.head(self.body(x)[0])


class TwoInputs(Flattened):
    def __init__(self):
        super().__init__()
        self.body = nn.Bilinear(6, 6, 6)

    def forward(self, x):
        return self.head(self.body(x, x.tanh()))


class Mean(nn.Module):
    """A leaf that mixes examples."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 6))

    def forward(self, x):
        return (x - x.mean(0, keepdim=True)) @ self.weight


class MixesExamples(Flattened):
    def __init__(self):
        super().__init__()
        self.body = Mean()

    def forward(self, x):
        return self.head(self.body(x))


class OwnParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(x * self.scale)


UNSUPPORTED = [
    (BareUse, "body.weight", "outside of its module"),
    (Flattened, "body.weight", "first dimension"),
    (LengthFirst, "body.bias", "first dimension"),
    (Recurrent, "body.weight_ih_l0", "one floating-point tensor"),
    (TwoInputs, "body.weight", "else than one tensor"),
    (MixesExamples, "body.weight", "independently"),
    (OwnParameter, "scale", "no rule"),
]


@pytest.mark.parametrize(("make", "name", "reason"), UNSUPPORTED)
def test_what_hooks_would_be_wrong_for_is_found(make, name, reason):
    torch.manual_seed(0)
    model = tiny.shaken(make())
    batch = vectors(torch.randn(5, 5, 6))
    problems = HooksEngine.unsupported(model, score_vectors, batch)
    assert reason in problems[name]
    assert not any(problem.startswith("head") for problem in problems)
    engine, why = choose_engine("auto", model, 5, 5, score_vectors, batch)
    assert engine == "loop"
    assert next(iter(problems)) in why
    with pytest.raises(UsageError, match=reason):
        choose_engine("hooks", model, 5, 5, score_vectors, batch)
    # also without asking first
    with pytest.raises(EstimationError, match=reason):
        estimate("hooks", model, labels("exact"), score_vectors, batch)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    if make is not MixesExamples:
        check("loop", model, labels("empirical"), score_vectors, batch)


def test_an_input_that_is_overwritten_is_noticed():
    class Overwrites(Flattened):
        def forward(self, x):
            h = x * 1
            y = torch.tanh(self.body(h))
            h += y
            return self.head(h)

    with pytest.raises(EstimationError, match="overwrites"):
        estimate(
            "hooks", tiny.shaken(Overwrites()), labels("exact"), score_vectors, vectors(torch.randn(3, 5, 6))
        )


def test_hooks_cover_the_common_architectures():
    for make, score in [
        (tiny.bert, tiny.classify),
        (tiny.albert, tiny.classify),
        (tiny.gpt2, tiny.predict_tokens),
        (tiny.llama_tied, tiny.predict_tokens),
        (tiny.qwen3, tiny.predict_tokens),
        (tiny.gemma3, tiny.predict_tokens),
    ]:
        assert HooksEngine.unsupported(make(), score, tiny.token_batch()) == {}


def test_choice_goes_by_length_and_batch():
    model = tiny.bert()
    assert choose_engine("auto", model, 64, 16)[0] == "hooks"
    assert choose_engine("auto", model, 512, 16)[0] == "loop"
    assert choose_engine("auto", model, 64, 1)[0] == "loop"
    assert choose_engine("loop", model, 64, 16) == ("loop", "as requested")
    assert choose_engine("hooks", model, 512, 1) == ("hooks", "as requested")
    with pytest.raises(UsageError, match="loops"):
        choose_engine("loops", model, 64, 16)


# the model and its numbers


@BOTH
def test_the_model_is_given_back_as_it_was(engine):
    model = tiny.bert()
    model.train()
    model.bert.encoder.eval()
    frozen = model.bert.embeddings.word_embeddings.weight
    frozen.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    built = ENGINES.get(engine)(model, labels("exact"), tiny.classify, memory=MEMORY)
    built.add(tiny.token_batch())
    assert not any(module.training for module in model.modules())
    assert built.sums["bert.embeddings.word_embeddings.weight"].any()
    built.close()
    built.close()
    assert model.training
    assert not model.bert.encoder.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        "bert.embeddings.word_embeddings.weight"
    ]
    assert all(parameter.grad is None for parameter in model.parameters())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    sums = {name: total.clone() for name, total in built.sums.items()}
    tiny.classify(model, tiny.token_batch()).logits.sum().backward()
    assert all(torch.equal(total, sums[name]) for name, total in built.sums.items())


@BOTH
def test_scored_positions_are_counted(engine):
    built = ENGINES.get(engine)(tiny.llama(), labels("sampled"), tiny.predict_tokens, memory=MEMORY)
    assert built.add(tiny.token_batch("right", (7, 4, 6))) == 6 + 3 + 5
    built.close()


class Diverges(nn.Module):
    """Its second layer's gradient is not finite for inputs that hold a 7."""

    def __init__(self, bad):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        self.bad = bad

    def forward(self, x):
        hidden = self.first(x)
        factor = torch.where((x == 7).any(-1, keepdim=True), self.bad, 1.0)
        return self.second(hidden) + (hidden * factor).sum(-1, keepdim=True) * torch.tensor([1.0, 0, 0])


@BOTH
@pytest.mark.parametrize("bad", [float("nan"), 1e30])
def test_a_gradient_that_is_not_finite_names_example_and_parameter(bad, engine):
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    x[3, 1] = 7
    model = tiny.shaken(Diverges(bad))

    class Half(LABELS.get("exact")):
        """Keeps v alive where softmax is saturated, so that 1e30 is squared."""

        def columns(self, scores, ids):
            yield torch.ones_like(scores.logits)

    built = ENGINES.get(engine)(model, Half(), score_vectors, memory=MEMORY)
    built.add(vectors(x[:3], first_id=50))
    with pytest.raises(EstimationError, match=r"example 53 .*first\.weight") as caught:
        built.add(vectors(x, first_id=50))
    assert caught.value.data["example"] == 53
    assert set(caught.value.data["parameters"]) == {"first.weight", "first.bias"}
    built.close()


@BOTH
def test_integer_parameters_are_refused(engine):
    model = nn.Linear(4, 3)
    model.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(EstimationError, match="codes"):
        ENGINES.get(engine)(model, labels("exact"), score_vectors, memory=MEMORY)


@BOTH
def test_float64_models(engine):
    torch.manual_seed(0)
    model = tiny.shaken(Twice()).double()
    check(engine, model, labels("exact"), score_vectors, vectors(torch.randn(4, 5, 6).double()))


def test_loop_lets_another_engine_use_the_model():
    model, batch = tiny.bert(), tiny.token_batch()
    outer = LoopEngine(model, labels("exact"), tiny.classify, memory=MEMORY)
    inner = estimate("loop", model, labels("exact"), tiny.classify, batch)
    assert not any(total.any() for total in outer.sums.values())
    outer.add(batch)
    outer.close()
    for name, total in outer.sums.items():
        torch.testing.assert_close(total, inner[name])


def test_hooks_keep_little_memory_for_a_tied_head(monkeypatch):
    """Of the head's gradient only the columns of the example's own tokens are kept until the end."""
    from bigmerge.fisher.engines import uses

    kept = []
    original = uses.Group._add_embedding

    def spy(self, head):
        kept.append({index: left.shape for index, left in head.left.items()})
        assert not any(g.shape[-1] == 9 for _, g in self._pending)
        original(self, head)

    monkeypatch.setattr(uses.Group, "_add_embedding", spy)
    ids = torch.randint(0, 9, (4, 3), generator=torch.Generator().manual_seed(2))
    check("hooks", tiny.shaken(Tied()), labels("sampled"), score_vectors, vectors(ids))
    assert kept == [{0: (4, 3, 3)}]
