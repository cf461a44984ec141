"""Merges of real transformers models load with transformers, whole, and are what averaging modules gives."""

from __future__ import annotations

import json

import pytest
import torch

import bigmerge
from tests.conftest import read_checkpoint

transformers = pytest.importorskip("transformers")


def tiny(kind, **extra):
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    if kind == "bert":
        config = BertConfig(
            vocab_size=99,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            **extra,
        )
        return BertForSequenceClassification(config)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2, **extra))
    if kind == "t5":
        return T5ForConditionalGeneration(
            T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=2, **extra)
        )
    tied = kind == "llama-tied"
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        tie_word_embeddings=tied,
        **extra,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "llama-tied", "t5"])
def test_result_loads_whole_and_is_the_average(tmp_path, kind):
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(tiny(kind))
        models[-1].save_pretrained(tmp_path / f"m{seed}")
    bigmerge.merge([tmp_path / "m0", tmp_path / "m1"], tmp_path / "out", shard_size="20KB", merge_heads=True)
    loaded, info = type(models[0]).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    ours = dict(loaded.named_parameters())
    theirs = [dict(model.named_parameters()) for model in models]
    for name, parameter in ours.items():
        expected = (theirs[0][name] + theirs[1][name]) / 2
        torch.testing.assert_close(parameter, expected, msg=lambda m, n=name: f"{n}: {m}")


def test_tied_weights_that_were_written_twice_are_merged_and_written_once(tmp_path):
    from safetensors.torch import save_file

    for seed in range(2):
        torch.manual_seed(seed)
        model = tiny("llama-tied")
        model.save_pretrained(tmp_path / f"m{seed}")
        path = tmp_path / f"m{seed}" / "model.safetensors"
        tensors = read_checkpoint(path.parent)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, path, metadata={"format": "pt"})
    result = bigmerge.merge([tmp_path / "m0", tmp_path / "m1"], tmp_path / "out")
    assert result.dropped["lm_head.weight"] == "tied to model.embed_tokens.weight"
    assert "lm_head.weight" not in read_checkpoint(tmp_path / "out")
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()


def test_heads_of_different_tasks_stay_the_targets(tmp_path):
    for seed, labels in enumerate([["bad", "good"], ["ham", "spam"]]):
        torch.manual_seed(seed)
        tiny("bert", id2label=dict(enumerate(labels))).save_pretrained(tmp_path / f"m{seed}")
    for target in ("m0", "m1"):
        result = bigmerge.merge([tmp_path / "m0", tmp_path / "m1"], tmp_path / target / "out", target=target)
        out, own = read_checkpoint(result.out), read_checkpoint(tmp_path / target)
        assert set(result.kept) == {"classifier.weight", "classifier.bias"}
        assert torch.equal(out["classifier.weight"], own["classifier.weight"])
        config = json.loads((result.out / "config.json").read_text())
        assert config["id2label"] == json.loads((tmp_path / target / "config.json").read_text())["id2label"]


def test_dtype_is_written_into_the_config(tmp_path):
    for seed in range(2):
        torch.manual_seed(seed)
        tiny("llama").save_pretrained(tmp_path / f"m{seed}")
    bigmerge.merge([tmp_path / "m0", tmp_path / "m1"], tmp_path / "out", dtype="bfloat16")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
