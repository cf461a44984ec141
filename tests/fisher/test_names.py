"""Parameters traced back to the checkpoint's own names and shapes, whatever loading did to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bigmerge.checkpoints.checkpoint import open_checkpoint
from bigmerge.errors import CheckpointError
from bigmerge.fisher.names import CheckpointNames


def small(config_class, **more):
    settings = {
        "vocab_size": 20,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 12,
        "max_position_embeddings": 16,
    }
    return config_class(**settings, **more)


def saved(model, directory: Path, rename=None, drop=(), add=None) -> Path:
    """`model` on disk, its tensors renamed by hand as older or other tools name them."""
    model.save_pretrained(directory)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors = {
        (rename(name) if rename else name): value for name, value in tensors.items() if name not in drop
    }
    save_file(tensors | (add(tensors) if add else {}), path, metadata={"format": "pt"})
    return directory


def trace(auto_class, directory: Path):
    """The names for a model loaded from `directory`, and its parameters taken back through them."""
    import transformers

    model = getattr(transformers, auto_class).from_pretrained(directory, dtype="auto")
    names = CheckpointNames(model, open_checkpoint(directory))
    return model, names, names.convert({name: value.detach() for name, value in model.named_parameters()})


def check(auto_class, directory: Path, *, missing=()) -> None:
    """Taking the parameters themselves back must give the tensors on disk."""
    _, names, back = trace(auto_class, directory)
    stored = load_file(directory / "model.safetensors")
    assert set(back) == set(stored) - set(missing)
    assert names.shapes == {name: tuple(value.shape) for name, value in back.items()}
    for name, value in back.items():
        assert torch.equal(value, stored[name]), name


def llama(**more):
    import transformers

    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(small(transformers.LlamaConfig, **more))


def gpt2():
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def test_plain_names(tmp_path):
    check("AutoModelForCausalLM", saved(llama(tie_word_embeddings=False), tmp_path))


def test_tied_embeddings_once_under_the_name_stored(tmp_path):
    check("AutoModelForCausalLM", saved(llama(tie_word_embeddings=True), tmp_path / "embedding"))
    head = saved(
        llama(tie_word_embeddings=True),
        tmp_path / "head",
        rename=lambda name: "lm_head.weight" if name == "model.embed_tokens.weight" else name,
    )
    assert "model.embed_tokens.weight" not in load_file(head / "model.safetensors")
    check("AutoModelForCausalLM", head)


def test_tied_embeddings_that_the_file_repeats_get_the_same_values_twice(tmp_path):
    directory = saved(
        llama(tie_word_embeddings=True),
        tmp_path,
        add=lambda tensors: {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
    )
    check("AutoModelForCausalLM", directory)


def test_a_checkpoint_without_the_backbones_prefix(tmp_path):
    directory = saved(gpt2(), tmp_path, rename=lambda name: name.removeprefix("transformer."))
    assert "wte.weight" in load_file(directory / "model.safetensors")
    check("AutoModelForCausalLM", directory)


def test_tensors_that_are_no_parameters_get_nothing(tmp_path):
    directory = saved(
        gpt2(), tmp_path, add=lambda tensors: {"transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16)}
    )
    check("AutoModelForCausalLM", directory, missing={"transformer.h.0.attn.bias"})


def test_old_names_of_normalization(tmp_path):
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
    )

    def old(name):
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    directory = saved(transformers.BertForSequenceClassification(config), tmp_path, rename=old)
    assert any(name.endswith("LayerNorm.gamma") for name in load_file(directory / "model.safetensors"))
    check("AutoModelForSequenceClassification", directory)


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_experts_that_loading_fuses_are_taken_apart(tmp_path, kind):
    """One tensor per expert on disk, one per layer in the model."""
    import transformers

    torch.manual_seed(0)
    more = (
        {"num_local_experts": 4}
        if kind == "Mixtral"
        else {"num_experts": 4, "moe_intermediate_size": 12, "num_experts_per_tok": 2, "head_dim": 4}
    )
    config = small(getattr(transformers, f"{kind}Config"), **more)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    directory = saved(model, tmp_path)
    stored = load_file(directory / "model.safetensors")
    assert sum(".experts.3." in name for name in stored) == 2 * 3  # layers × matrices
    assert not any(".experts.3." in name for name, _ in model.named_parameters())
    check("AutoModelForCausalLM", directory)


def test_a_parameter_that_cannot_be_traced_is_an_error(tmp_path):
    import transformers

    directory = saved(llama(tie_word_embeddings=False), tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    model.model.layers[0].register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(CheckpointError, match="no tensor of the checkpoint belongs") as caught:
        CheckpointNames(model, open_checkpoint(directory))
    assert caught.value.data["parameters"] == ["model.layers.0.extra"]


def test_a_shape_that_differs_is_an_error(tmp_path):
    import transformers

    directory = saved(llama(tie_word_embeddings=False), tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    model.resize_token_embeddings(24)
    with pytest.raises(CheckpointError, match="do not have the checkpoint's shapes") as caught:
        CheckpointNames(model, open_checkpoint(directory))
    assert len(caught.value.data["tensors"]) == 2
