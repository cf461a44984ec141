"""bigmerge.fisher.rules: per-example gradients of single modules."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from bigmerge.fisher.rules.base import RULES, own_parameters, rule_for
from bigmerge.fisher.rules.gradients import Dense, Mixed, Outer, Rows, Workspace, combine


def example_gradients(module, x, g):
    """Gradients of each own parameter for each example, by autograd, one example at a time."""
    parameters = own_parameters(module)
    found = []
    for n in range(len(x)):
        output = module(x[n : n + 1])
        found.append(torch.autograd.grad(output, list(parameters.values()), g[n : n + 1].to(output.dtype)))
    return {name: [each[i].float() for each in found] for i, name in enumerate(parameters)}


def check_module(module, x, rule_name, memory=1 << 20, tolerance=1e-5):
    torch.manual_seed(5)
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape) * 0.5 + 0.3)
    g = torch.randn(module(x).shape)
    rule = rule_for(module)
    assert rule is not None
    assert rule.name == rule_name
    expected = example_gradients(module, x, g)
    workspace = Workspace(memory)
    with torch.no_grad():
        gradients = rule.gradients(x, g)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient.count() == len(x)
        shape = expected[name][0].shape
        for n, dense in enumerate(expected[name]):
            out = torch.ones(shape)
            gradient.add_example(n, out)
            torch.testing.assert_close(out - 1, dense, rtol=tolerance, atol=tolerance)
        total = torch.full(shape, 2.0)
        gradient.add_squares(total, workspace)
        squares = sum(dense.square() for dense in expected[name])
        torch.testing.assert_close(total - 2, squares, rtol=10 * tolerance, atol=10 * tolerance)


def positions(*shape):
    torch.manual_seed(3)
    return torch.randn(*shape)


def ids(*shape):
    torch.manual_seed(4)
    return torch.randint(0, 5, shape)


@pytest.mark.parametrize("memory", [1, 1 << 20])
@pytest.mark.parametrize(
    "shape", [(4, 6), (4, 1, 6), (4, 2, 6), (4, 4, 6), (4, 5, 6), (1, 9, 6), (3, 2, 4, 6)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape, bias, memory):
    check_module(nn.Linear(6, 5, bias=bias), positions(*shape), "linear", memory)


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6), (4, 7, 6)])
def test_conv1d(shape):
    from transformers.pytorch_utils import Conv1D

    check_module(Conv1D(5, 6), positions(*shape), "conv1d")


@pytest.mark.parametrize("memory", [1, 1 << 20])
@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 8), (3, 2, 4)])
def test_embedding(shape, padding, memory):
    check_module(nn.Embedding(5, 4, padding_idx=padding), ids(*shape), "embedding", memory)


def test_embeddings_that_scale_their_rows():
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    check_module(Gemma3TextScaledWordEmbedding(5, 4, 0, embed_scale=2.5), ids(3, 8), "embedding")
    check_module(BartScaledWordEmbedding(5, 4, 1, embed_scale=4.0), ids(3, 8), "embedding")


def test_an_embedding_with_another_forward_is_not_taken_for_one():
    class Shifted(nn.Embedding):
        def forward(self, ids):
            return super().forward((ids + 1) % 5)

    class Squared(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) ** 2

    for kind in (Shifted, Squared):
        check_module(kind(5, 4), ids(3, 8), "generic")


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6), (2, 3, 4, 6)])
@pytest.mark.parametrize("options", [{}, {"bias": False}])
def test_layer_norm(shape, options):
    check_module(nn.LayerNorm(6, **options), positions(*shape), "layer_norm")


def test_layer_norm_over_two_dimensions():
    check_module(nn.LayerNorm((3, 6)), positions(4, 2, 3, 6), "layer_norm")


def rms_norms():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    return [
        nn.RMSNorm,
        LlamaRMSNorm,
        Qwen2RMSNorm,
        Qwen3RMSNorm,
        Qwen3NextRMSNorm,
        MistralRMSNorm,
        Olmo2RMSNorm,
        GemmaRMSNorm,
        Gemma2RMSNorm,
        Gemma3RMSNorm,
        T5LayerNorm,
    ]


@pytest.mark.parametrize("index", range(11))
def test_rms_norms_of_all_families(index):
    kind = rms_norms()[index]
    for shape in ((4, 6), (4, 3, 6), (2, 3, 4, 6)):
        check_module(kind(6), positions(*shape), "scaling")


def test_a_weight_that_is_not_a_scale_is_not_taken_for_one():
    class Softly(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self, x):
            return x * torch.nn.functional.softplus(self.weight)

    class Mixing(Softly):
        def forward(self, x):  # linear in the weight, but every output has all of it
            return x * self.weight.sum()

    class Rolled(Softly):
        def forward(self, x):
            return x * self.weight.roll(1)

    for kind in (Softly, Mixing, Rolled):
        check_module(kind(), positions(4, 3, 6), "generic")


@pytest.mark.parametrize("memory", [1, 1 << 20])
def test_generic_covers_other_leaves(memory):
    check_module(nn.Conv1d(6, 4, 3, padding=1), positions(3, 6, 5), "generic", memory)
    check_module(nn.Conv2d(2, 4, 2), positions(3, 2, 4, 4), "generic", memory)
    check_module(nn.GroupNorm(2, 6), positions(3, 6, 5), "generic", memory)
    check_module(nn.BatchNorm1d(6).eval(), positions(3, 6), "generic", memory)
    check_module(nn.PReLU(), positions(3, 6), "generic", memory)


def test_what_no_rule_is_exact_for():
    class Quantized(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)

    for module in (
        nn.MultiheadAttention(4, 2),
        nn.Embedding(5, 4, max_norm=1.0),
        nn.Embedding(5, 4, scale_grad_by_freq=True),
        Quantized(),
    ):
        assert rule_for(module) is None


def test_a_linear_subclass_with_its_own_forward_is_not_linear():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    check_module(Doubled(6, 5), positions(3, 4, 6), "generic")
    patched = nn.Linear(6, 5)
    patched.forward = lambda x: x
    assert not RULES.get("linear").suits(patched)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_squared_and_summed_in_float32(dtype):
    torch.manual_seed(0)
    for make, x in [
        (lambda: nn.Linear(64, 8), positions(40, 6, 64)),
        (lambda: nn.Linear(64, 8), positions(40, 64)),
        (lambda: nn.Linear(64, 8), positions(40, 3, 64)),
        (lambda: nn.Embedding(5, 8), ids(40, 6)),
        (lambda: nn.LayerNorm(64), positions(40, 6, 64)),
        (lambda: nn.RMSNorm(64), positions(40, 6, 64)),
    ]:
        module = make().to(dtype)
        x = x.to(dtype) if x.is_floating_point() else x
        g = torch.randn(module(x).shape).to(dtype)
        # the same numbers in float64: what is left is float32 rounding, not that of the dtype
        double = make().double()
        double.load_state_dict({name: value.double() for name, value in module.state_dict().items()})
        wide = x.double() if x.is_floating_point() else x
        for name, gradient in rule_for(module).gradients(x, g).items():
            total = torch.zeros(dict(module.named_parameters())[name].shape)
            gradient.add_squares(total, Workspace(1 << 20))
            squares = sum(
                torch.autograd.grad(double(wide[n : n + 1]), getattr(double, name), g[n : n + 1].double())[
                    0
                ].square()
                for n in range(len(x))
            )
            assert float((total - squares).norm() / squares.norm()) < 1e-5


def forms():
    """A gradient of each form for a (5, 4) parameter and 3 examples."""
    torch.manual_seed(8)
    return {
        "outer": Outer(torch.randn(3, 7, 5), torch.randn(3, 7, 4)),
        "short outer": Outer(torch.randn(3, 1, 5), torch.randn(3, 1, 4)),
        "rows": Rows(torch.randint(0, 5, (3, 6)), torch.randn(3, 6, 4)),
        "dense": Dense(torch.randn(3, 5, 4)),
    }


def dense_of(gradient):
    blocks = torch.zeros(gradient.count(), 5, 4)
    for n, block in enumerate(blocks):
        gradient.add_example(n, block)
    return blocks


@pytest.mark.parametrize("memory", [1, 100, 1 << 20])
@pytest.mark.parametrize("names", list(itertools.combinations_with_replacement(forms(), 3)))
def test_sums_of_uses_are_added_before_squaring(names, memory):
    parts = [forms()[name] for name in names]
    combined = combine(parts)
    expected = sum(dense_of(part) for part in parts)
    torch.testing.assert_close(dense_of(combined), expected)
    total = torch.ones(5, 4)
    combined.add_squares(total, Workspace(memory))
    torch.testing.assert_close(total - 1, expected.square().sum(0), rtol=1e-4, atol=1e-4)
    kinds = {type(part) for part in parts}
    assert isinstance(combined, Mixed) == (len(kinds) > 1)


def test_workspace_hands_out_one_buffer():
    workspace = Workspace(1 << 20)
    large = workspace.matrix(8, 8, torch.device("cpu"))
    small = workspace.matrix(2, 3, torch.device("cpu"))
    assert small.shape == (2, 3)
    assert small.data_ptr() == large.data_ptr()
    assert Workspace(10).examples(1000) == 1
    assert Workspace(1000).examples(10) == 100


def test_scratch_of_a_large_weight_stays_within_memory():
    torch.manual_seed(0)
    left, right = torch.randn(2, 6, 1000), torch.randn(2, 6, 50)
    workspace = Workspace(50 * 4 * 64)
    total = torch.zeros(1000, 50)
    Outer(left, right).add_squares(total, workspace)
    expected = (left.transpose(1, 2) @ right).square().sum(0)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)
    assert sum(buffer.numel() * 4 for buffer in workspace._buffers.values()) <= workspace.memory
