"""bigmerge.merging.finishing (with companions and card): what lies beside the merged weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import bigmerge
from bigmerge.checkpoints.checkpoint import open_checkpoint
from bigmerge.storage.digests import digest_file, digest_stored_tensor
from bigmerge.storage.manifest import MANIFEST
from tests.building import fill_cache, turn_hub_off, write_fisher
from tests.conftest import normal, write_checkpoint

COPIED = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "vocab.txt", "merges.txt", "vocab.json", "tokenizer.model", "chat_template.jinja", "modeling_custom.py",
    "preprocessor_config.json", "LICENSE", "LICENSE.md", "NOTICE", "USE_POLICY.md", "added_tokens.json", "x.tiktoken",
]  # fmt: skip
LEFT = [
    "README.md", "bigmerge.json", "fisher_info.json", "trainer_state.json", "training_args.bin", "all_results.json",
    "optimizer.pt", "pytorch_model.bin.index.json", "model.safetensors.index.json.bak", ".gitattributes",
    ".hidden.json", "requirements.txt", "events.out.tfevents", "picture.png",
]  # fmt: skip


def tensors(seed: int) -> dict[str, torch.Tensor]:
    return {"enc.w": normal((4, 5), seed), "enc.b": normal(4, seed + 50), "extra": normal(seed + 1, 0)}


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    root = tmp_path / "in"
    for number, name in enumerate("ab"):
        config = {"architectures": ["X"], "torch_dtype": "float32", "name": name}
        directory = write_checkpoint(root / name, tensors(number), config=config)
        for file in COPIED + LEFT:
            if file != "config.json":
                (directory / file).write_text(f"{file} of {name}")
        (directory / "additional_chat_templates").mkdir()
        (directory / "additional_chat_templates" / "tool.jinja").write_text(f"template of {name}")
        (directory / "additional_chat_templates" / "other.txt").write_text("x")
        (directory / "checkpoint-100").mkdir()
    return root


def result_files(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("target", ["a", "b"])
def test_companions_come_from_the_target(inputs: Path, tmp_path: Path, target: str) -> None:
    out = tmp_path / "out"
    bigmerge.merge([inputs / "a", inputs / "b"], out, target=target)
    written = {"model.safetensors", "README.md", MANIFEST}
    assert result_files(out) == {*COPIED, "additional_chat_templates/tool.jinja", *written}
    for file in COPIED:
        assert (out / file).read_bytes() == (inputs / target / file).read_bytes()
    template = out / "additional_chat_templates" / "tool.jinja"
    assert template.read_text() == f"template of {target}"
    assert "Merged model" in (out / "README.md").read_text()


@pytest.mark.parametrize(("before", "key"), [({"torch_dtype": "float32"}, "torch_dtype"), ({}, "dtype"),
                                             ({"dtype": "float32", "torch_dtype": "x"}, "dtype")])  # fmt: skip
def test_the_output_dtype_is_in_the_config(inputs: Path, tmp_path: Path, before: Any, key: str) -> None:
    (inputs / "a" / "config.json").write_text(json.dumps({"architectures": ["X"], "ü": 1, **before}))
    bigmerge.merge([inputs / "a", inputs / "b"], tmp_path / "out", dtype="bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config == {"architectures": ["X"], "ü": 1, **before, key: "bfloat16"}


def test_links_of_the_hub_cache_become_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turn_hub_off(monkeypatch, tmp_path / "hub")
    fill_cache(tmp_path / "hub", "owner/one", tensors(0))
    fill_cache(tmp_path / "hub", "owner/two", tensors(1))
    bigmerge.merge(["owner/one", "owner/two@main"], tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "x"}
    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert front["base_model"] == ["owner/one", "owner/two"]
    assert front["library_name"] == "transformers"


def test_single_files_have_no_companions(tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        torch.save(tensors(number), tmp_path / f"{name}.pt")
    (tmp_path / "notes.txt").write_text("private")
    bigmerge.merge([tmp_path / "a.pt", tmp_path / "b.pt"], tmp_path / "out")
    assert result_files(tmp_path / "out") == {"model.safetensors", "README.md", MANIFEST}
    assert "library_name" not in (tmp_path / "out" / "README.md").read_text()


def test_the_card_tells_how_it_was_made(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bigmerge.merge(
        [inputs / "a", inputs / "b"],
        out,
        weights=[0.25, 0.75],
        exclude=["enc.b"],
        base=inputs / "b",
        scale=0.5,
    )
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"tags": ["merge", "bigmerge"], "library_name": "transformers"}
    manifest = json.loads((out / MANIFEST).read_text())
    for part in (
        f"bigmerge {bigmerge.__version__}",
        "`linear`",
        "| a | 0.25 | `" + manifest["sources"][0]["content"],
        "| b | 0.75 | `" + manifest["sources"][1]["content"],
        "1 tensors were merged",
        "excluded by 'enc.b': enc.b",
        "shape [1] differs in b [2]: extra",
    ):
        assert part in card
    recipe = json.loads(card.split("```json\n")[1].split("```")[0])
    assert recipe == manifest["recipe"]
    assert recipe["scale"] == 0.5
    assert recipe["base"]["name"] == "b"


def test_models_of_the_same_name_are_not_taken_for_hub_names(inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(inputs / "b", tmp_path / "other" / "a")
    result = bigmerge.merge([inputs / "a", tmp_path / "other" / "a"], tmp_path / "out")
    assert [model["name"] for model in result.recipe["models"]] == ["in/a", "other/a"]
    assert "base_model" not in yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])


def test_the_manifest_says_what_every_byte_should_be(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fishers = []
    for name in "ab":
        values = {key: tensor.square() for key, tensor in tensors(ord(name)).items() if key != "extra"}
        fishers.append(write_fisher(inputs / f"{name}-fisher", values, model=inputs / name))
    result = bigmerge.merge([inputs / "a", inputs / "b", *fishers], out, dtype="float16")
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["format"] == 1
    assert manifest["kind"] == "merge"
    assert manifest["bigmerge_version"] == bigmerge.__version__
    assert manifest["recipe"] == json.loads(json.dumps(result.recipe))
    assert manifest["warnings"] == []
    tensors_there = open_checkpoint(out).tensors
    assert set(manifest["tensors"]) == set(tensors_there)
    for name, spec in tensors_there.items():
        entry = manifest["tensors"][name]
        assert entry["digest"] == digest_stored_tensor(spec.path, spec.start, spec.dtype, spec.numel)
        assert (entry["dtype"], entry["shape"]) == (spec.dtype, list(spec.shape)) == ("F16", entry["shape"])
    assert manifest["tensors"]["enc.w"]["origin"] == "merged"
    assert manifest["tensors"]["extra"]["origin"] == "target: shape [1] differs in b [2]"
    files = result_files(out) - {MANIFEST, "model.safetensors"}
    assert manifest["files"] == {name: digest_file(out / name) for name in files}
    for source, name in zip(manifest["sources"], "ab", strict=True):
        assert source["name"] == name
        assert source["fingerprint"] == open_checkpoint(inputs / name).fingerprint()
        assert len(source["content"]) == len(source["fisher"]["content"]) == 32


def test_content_digests_tell_sources_apart_and_not_their_sharding(inputs: Path, tmp_path: Path) -> None:
    def contents(*models: Path) -> list[str]:
        out = tmp_path / "out"
        bigmerge.merge(models, out, overwrite=True)
        return [source["content"] for source in json.loads((out / MANIFEST).read_text())["sources"]]

    a, b = contents(inputs / "a", inputs / "b")
    assert a != b
    assert contents(inputs / "b", inputs / "a") == [b, a]
    resharded = write_checkpoint(tmp_path / "resharded", tensors(0), shards=3)
    assert contents(resharded, inputs / "b") == [a, b]
    changed = tensors(0)
    changed["enc.w"][2, 3] += 1
    assert contents(write_checkpoint(tmp_path / "changed", changed), inputs / "b")[0] != a
