"""Values, their sums and what is written."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bigmerge.checkpoints.checkpoint import open_checkpoint
from bigmerge.errors import EstimationError
from bigmerge.fisher import output
from bigmerge.verification import verify


class SameNames:
    def convert(self, values):
        return dict(values)


def test_sums_are_those_of_float64(monkeypatch):
    monkeypatch.setattr(output, "_BLOCK", 7)
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        value = (torch.rand(5, 11, generator=generator) ** 8 * 1e-9).to(dtype)
        value[0, :4] = 0
        sums = output.measure(value)
        exact = value.double().numpy().astype(np.longdouble)
        assert sums.total == pytest.approx(float(exact.sum()), rel=1e-15)
        assert sums.squares == pytest.approx(float((exact**2).sum()), rel=1e-15)
        assert sums.zeros == int((value == 0).sum()) >= 4
    assert output.measure(torch.zeros(0, 3)) == output.TensorSums(0.0, 0.0, 0)
    assert output.measure(torch.tensor(2.0)) == output.TensorSums(2.0, 4.0, 0)


def test_values_are_means_in_the_storage_dtype():
    sums = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor(6.0)}
    values = output.mean_values(sums, 3, SameNames(), torch.bfloat16)
    assert sums == {}  # their memory is given up
    assert values["a"].dtype == torch.bfloat16
    assert values["a"].tolist() == [1.0, float(torch.tensor(1 / 3).bfloat16())]
    with pytest.raises(EstimationError, match="not finite"):
        output.mean_values({"a": torch.tensor([1.0, float("inf")])}, 3, SameNames(), torch.float32)


def test_any_shape_is_written_and_leftovers_go(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "_BLOCK", 5)
    (tmp_path / "model-00001-of-00009.safetensors").write_text("from an earlier attempt")
    (tmp_path / "folder").mkdir()
    values = {
        "plain": torch.arange(12.0).view(3, 4),
        "turned": torch.arange(12.0).view(3, 4).t(),
        "part": torch.arange(24.0).view(2, 3, 4)[:, 1],
        "scalar": torch.tensor(4.0),
        "empty": torch.zeros(0, 4),
        "narrow": torch.arange(7.0).bfloat16(),
    }
    recorded = output.write_fisher(tmp_path, values, {"examples": 3}, shard_bytes=60)
    stored = {}
    for path in tmp_path.glob("*.safetensors"):
        stored |= load_file(path)
    assert set(stored) == set(values)
    for name, value in values.items():
        assert stored[name].dtype == value.dtype
        assert torch.equal(stored[name], value), name
    assert recorded["examples"] == 3
    assert recorded["elements"] == 12 + 12 + 8 + 1 + 7
    assert recorded["sum"] == float(sum(value.double().sum() for value in values.values()))
    assert json.loads((tmp_path / "fisher_info.json").read_text()) == recorded
    assert set(open_checkpoint(tmp_path).tensors) == set(values)
    assert not (tmp_path / "folder").exists()


def test_what_is_written_can_be_verified_later(tmp_path):
    output.write_fisher(tmp_path, {"a": torch.arange(100.0), "b": torch.ones(3)}, {}, shard_bytes=1 << 20)
    assert verify(tmp_path).ok
    assert verify(tmp_path).has_manifest
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert [line for line in verify(tmp_path).problems if "'b'" in line or "'a'" in line]
