"""bigmerge.checkpoints.pickled: real torch.save files; what is more than tensors never runs."""

from __future__ import annotations

import contextlib
import os
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bigmerge.checkpoints.checkpoint import TensorSpec, open_checkpoint
from bigmerge.checkpoints.dtypes import torch_dtype
from bigmerge.checkpoints.pickled import read_pickled
from bigmerge.errors import CheckpointError
from tests.conftest import normal


def value(spec: TensorSpec) -> torch.Tensor:
    """The tensor as it lies in the file."""
    raw = bytearray(spec.path.read_bytes()[spec.start : spec.start + spec.nbytes])
    if not raw:
        return torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
    return torch.frombuffer(raw, dtype=torch.uint8).view(torch_dtype(spec.dtype)).reshape(spec.shape)


def check(path: Path, expected: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    specs = {spec.name: spec for spec in read_pickled(path)}
    assert set(specs) == set(expected)
    for name, tensor in expected.items():
        found = value(specs[name])
        assert found.dtype == tensor.dtype, name
        assert found.shape == tensor.shape, name
        same = found.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(same, tensor.detach().contiguous().reshape(-1).view(torch.uint8)), name
    return specs


def rezip(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        content = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content:
            archive.writestr(name, change(name, data))


def test_values_at_their_offsets(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
    kinds += [torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    tensors = {f"kind.{kind}": normal((5, 7), number).to(kind) for number, kind in enumerate(kinds)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3)}
    tensors |= {"parameter": torch.nn.Parameter(normal(9, 1)), "buffer": torch.nn.Buffer(normal(9, 2))}
    torch.save(OrderedDict(tensors), path)
    check(path, tensors)


def test_a_real_modules_state_dict(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    path = tmp_path / "pytorch_model.bin"
    torch.save(module.state_dict(), path)
    check(path, dict(module.state_dict()))
    names = list(open_checkpoint(tmp_path).tensors)
    assert names[:2] == ["0.bias", "0.weight"]
    assert "1.num_batches_tracked" in names


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_nested_state_dicts(tmp_path: Path, key: str) -> None:
    path = tmp_path / "w.pt"
    tensors = {"a": normal(3, 0), "b": normal((2, 2), 1)}
    torch.save({"epoch": 3, key: tensors, "optimizer": {"lr": 0.1}}, path)
    check(path, tensors)


def test_slices_and_shared_storages(tmp_path: Path) -> None:
    whole = normal((10, 6), 0)
    tensors = {"whole": whole, "same": whole, "rows": whole[3:7], "last": whole[9], "one": whole[2, 5]}
    path = tmp_path / "w.pt"
    torch.save(tensors, path)
    specs = check(path, tensors)
    assert specs["same"].start == specs["whole"].start
    assert specs["rows"].start == specs["whole"].start + 3 * 6 * 4
    assert path.stat().st_size < 2 * whole.nbytes + 4096, "the storage is there once"


def test_views_of_size_one_are_contiguous(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    tensors = {"w": normal((1, 5), 0).t(), "v": normal((4, 1, 3), 1).transpose(0, 1)}
    torch.save(tensors, path)
    check(path, tensors)


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(torch.ones(3, 4).t(), id="transposed"),
        pytest.param(torch.ones(3, 4)[:, 1], id="column"),
        pytest.param(torch.ones(1).expand(4), id="expanded"),
        pytest.param(torch._neg_view(torch.ones(3)), id="negated"),
        pytest.param(torch.ones(3, 4).to_sparse(), id="sparse"),
    ],
)
def test_what_is_not_stored_as_it_reads_is_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    path = tmp_path / "w.pt"
    torch.save({"fine": torch.ones(2), "odd": tensor}, path)
    with pytest.raises(CheckpointError, match=r"tensor 'odd' is stored sparse, transposed") as caught:
        read_pickled(path)
    assert str(path) in caught.value.message
    assert ".contiguous()" in str(caught.value)


class Malicious:
    """Pickled, it asks for a file to be made."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.victim}'",)


def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    path = tmp_path / "w.bin"
    torch.save({"w": torch.ones(2), "x": Malicious(victim)}, path)
    for legacy in (False, True):
        torch.save({"x": Malicious(victim)}, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(CheckpointError):
            read_pickled(path)
        assert not victim.exists()
    torch.load(path, weights_only=False)
    assert victim.exists(), "the pickle does what it was made for"


def whole_module(path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), path)


def array(path: Path) -> None:
    torch.save({"w": torch.ones(2).numpy()}, path)


def legacy(path: Path) -> None:
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)


def script(path: Path) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))


def compressed(path: Path) -> None:
    torch.save({"w": torch.zeros(1000)}, path)
    rezip(path, lambda name, data: data, zipfile.ZIP_DEFLATED)


def big_endian(path: Path) -> None:
    torch.save({"w": torch.ones(3)}, path)
    rezip(path, lambda name, data: b"big" if name.endswith("byteorder") else data)


def short_record(path: Path) -> None:
    torch.save({"w": torch.ones(30)}, path)
    rezip(path, lambda name, data: data[:8] if "/data/" in name else data)


def long_storage(path: Path) -> None:
    torch.save({"w": torch.zeros(3)}, path)
    rezip(path, lambda name, data: data.replace(b"K\x03", b"J\xff\xff\xff\x7f") if "pkl" in name else data)


def truncated(path: Path) -> None:
    torch.save({"w": torch.ones(300)}, path)
    path.write_bytes(path.read_bytes()[:-100])


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("document.xml", "<a/>")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (whole_module, "something other than tensors, which is never loaded"),
        (array, "something other than tensors, which is never loaded"),
        (legacy, "no zip-format PyTorch file"),
        (script, "is a TorchScript program"),
        (compressed, "is compressed, so it cannot be memory-mapped"),
        (big_endian, "was written on a big-endian machine"),
        (short_record, "bytes of tensor 'w' cannot be located"),
        (long_storage, "cannot be read as a PyTorch file|cannot be located"),
        (truncated, "no zip-format PyTorch file, or a damaged one"),
        (other_zip, "cannot be read as a PyTorch file"),
        (lambda path: path.write_bytes(b""), "no zip-format PyTorch file"),
        (lambda path: path.mkdir(), "cannot be read"),
        (lambda path: None, "cannot be read"),
        (lambda path: torch.save({"w": torch.ones(2), "epoch": 3}, path), "entry 'epoch' of its state dict is no"),
        (lambda path: torch.save({"w": torch.ones(2), 1: torch.ones(2)}, path), "entry 1 .* not named by text"),
        (lambda path: torch.save([torch.ones(2)], path), "holds no state dict"),
        (lambda path: torch.save(torch.ones(2), path), "holds no state dict"),
        (lambda path: torch.save({}, path), "holds no state dict"),
        (lambda path: torch.save({"w": torch.empty(3, device="meta")}, path), "cannot be located"),
        (lambda path: torch.save({"w": torch.ones(2, dtype=torch.complex64)}, path), "complex64, which safetensors"),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "w.pt"
    make(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_pickled(path)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


def test_damaged_files_raise_only_checkpoint_errors(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"w": normal((4, 6), 0), "v": torch.ones(3)}, path)
    whole = path.read_bytes()
    chance = random.Random(0)
    for _ in range(80):
        damaged = bytearray(whole)
        for _ in range(chance.choice([1, 2, 8])):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        if chance.random() < 0.2:
            del damaged[chance.randrange(len(damaged)) :]
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            for spec in read_pickled(path):
                assert spec.start + spec.nbytes <= len(damaged)
