"""Merges on disk against the same merge of whole tensors in memory in float64."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import bigmerge
from bigmerge.checkpoints.dtypes import FLOATS, torch_dtype
from bigmerge.errors import CheckpointError
from bigmerge.merging import grid
from tests.conftest import file_bytes, normal, read_checkpoint, write_checkpoint

SHAPES = {
    "model.embed.weight": (200, 30),
    "model.layers.0.weight": (64, 64),
    "model.layers.2.weight": (3, 5, 7),
    "model.layers.10.weight": (64, 64),
    "model.norm.weight": (30,),
    "model.scalar": (),
    "model.empty": (0, 4),
}


def model_tensors(seed, dtype=torch.float32):
    return {name: normal(shape, seed * 100 + n, dtype) for n, (name, shape) in enumerate(SHAPES.items())}


def fisher_tensors(seed, dtype=torch.float32):
    return {name: value.square() for name, value in model_tensors(seed + 50, dtype).items()}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks, windows and steps so small that the test tensors have many of them."""
    from bigmerge.merging import records
    from bigmerge.storage import digests

    monkeypatch.setattr(grid, "BLOCKS", (256,))
    monkeypatch.setattr(grid, "SUM_BLOCK", 256)
    monkeypatch.setattr(grid, "STEP", 1024)
    monkeypatch.setattr(digests, "PIECE", 1024)
    assert records.piece_count(1025) == 2


def reference_linear(models, weights):
    whole = sum(weights)
    return {
        name: sum(w * m[name].double() for w, m in zip(weights, models, strict=True)) / whole
        for name in models[0]
    }


def reference_fisher(models, fishers, weights):
    def mean(fisher):
        return sum(float(t.double().sum()) for t in fisher.values()) / sum(t.numel() for t in fisher.values())

    merged = {}
    for name in models[0]:
        parts = [w * f[name].double() / mean(f) for w, f in zip(weights, fishers, strict=True)]
        total = sum(part * m[name].double() for part, m in zip(parts, models, strict=True))
        merged[name] = total / sum(parts)
    return merged


def assert_close_in_dtype(found, expected):
    """Equal up to a last digit of the stored dtype."""
    for name, tensor in found.items():
        resolution = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0
        torch.testing.assert_close(
            tensor.double(),
            expected[name],
            rtol=1.1 * resolution + 1e-6,
            atol=1e-6,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", sorted(FLOATS))
def test_linear_in_every_dtype(tmp_path, dtype):
    kind = torch_dtype(dtype)
    models = [model_tensors(seed, kind) for seed in range(3)]
    paths = [write_checkpoint(tmp_path / f"m{n}", model) for n, model in enumerate(models)]
    bigmerge.merge(paths, tmp_path / "out", weights=[1, 2, 3.5])
    out = read_checkpoint(tmp_path / "out")
    expected = reference_linear(models, [1, 2, 3.5])
    assert set(out) == set(SHAPES)
    assert {tensor.dtype for tensor in out.values()} == {kind}
    if kind.itemsize == 1:
        for name, tensor in out.items():
            # One rounding from the exact value: a neighbour on the coarse grid at most.
            exact = expected[name].to(kind).double()
            step = 2 * torch.finfo(kind).eps
            torch.testing.assert_close(tensor.double(), exact, rtol=step, atol=2**-6)
            assert (tensor.double() != exact).float().mean() < 0.01 or tensor.numel() < 100
    else:
        assert_close_in_dtype(out, expected)


def test_float64_is_computed_in_float64(tmp_path):
    models = [{"a.weight": normal(5000, seed).double() * (1 + 1e-12)} for seed in range(3)]
    paths = [write_checkpoint(tmp_path / f"m{n}", model) for n, model in enumerate(models)]
    bigmerge.merge(paths, tmp_path / "out")
    expected = reference_linear(models, [1, 1, 1])["a.weight"]
    torch.testing.assert_close(
        read_checkpoint(tmp_path / "out")["a.weight"], expected, rtol=1e-14, atol=1e-15
    )


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("fisher_dtype", [torch.float32, torch.bfloat16])
def test_fisher(tmp_path, fisher_dtype):
    models = [model_tensors(seed, torch.bfloat16) for seed in range(3)]
    fishers = [
        {name: value * 10.0**-seed for name, value in fisher_tensors(seed, fisher_dtype).items()}
        for seed in range(3)
    ]
    for n, (model, fisher) in enumerate(zip(models, fishers, strict=True)):
        write_checkpoint(tmp_path / "shards" / f"m{n}", model)
        write_checkpoint(tmp_path / "shards" / f"m{n}-fisher", fisher)
    result = bigmerge.merge(sorted((tmp_path / "shards").iterdir()), tmp_path / "out", weights=[1, 1, 2])
    assert result.recipe["method"] == "fisher"
    assert_close_in_dtype(read_checkpoint(tmp_path / "out"), reference_fisher(models, fishers, [1, 1, 2]))


def test_recorded_sums_save_the_measuring_pass(tmp_path):
    models = [model_tensors(seed) for seed in range(2)]
    fishers = [fisher_tensors(seed) for seed in range(2)]
    for n in range(2):
        sums = {
            name: [float(f.double().sum()), float(f.double().square().sum())]
            for name, f in fishers[n].items()
        }
        facts = {"bigmerge.fisher": "{}", "bigmerge.sums": json.dumps(sums)}
        write_checkpoint(tmp_path / f"m{n}", models[n])
        write_checkpoint(tmp_path / f"m{n}-fisher", fishers[n])
        write_checkpoint(tmp_path / "recorded" / f"m{n}-fisher", fishers[n], metadata=facts)
    plain = [tmp_path / name for name in ("m0", "m1", "m0-fisher", "m1-fisher")]
    recorded = [*plain[:2], *(tmp_path / "recorded").iterdir()]
    assert bigmerge.plan_merge(plain, tmp_path / "out").measure == ("fisher",)
    assert bigmerge.plan_merge(recorded, tmp_path / "out").measure == ()
    bigmerge.merge(plain, tmp_path / "measured")
    bigmerge.merge(recorded, tmp_path / "trusted")
    one, other = read_checkpoint(tmp_path / "measured"), read_checkpoint(tmp_path / "trusted")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("method", ["linear", "fisher"])
def test_scaled_move_from_a_base(tmp_path, method):
    models, base = [model_tensors(seed) for seed in range(2)], model_tensors(9)
    fishers = [fisher_tensors(seed) for seed in range(2)]
    for n in range(2):
        write_checkpoint(tmp_path / "s" / f"m{n}", models[n])
        write_checkpoint(tmp_path / "s" / f"m{n}-fisher", fishers[n])
    write_checkpoint(tmp_path / "base", base)
    bigmerge.merge(
        sorted((tmp_path / "s").iterdir()), tmp_path / "out", method=method, base=tmp_path / "base", scale=1.6
    )
    merged = (
        reference_linear(models, [1, 1]) if method == "linear" else reference_fisher(models, fishers, [1, 1])
    )
    expected = {name: base[name].double() + 1.6 * (merged[name] - base[name].double()) for name in base}
    out = read_checkpoint(tmp_path / "out")
    for name in out:
        torch.testing.assert_close(out[name].double(), expected[name], rtol=1e-5, atol=2e-6)


def test_output_dtype_can_be_chosen(tmp_path):
    models = [model_tensors(seed) | {"model.ids": torch.arange(4)} for seed in range(2)]
    paths = [write_checkpoint(tmp_path / f"m{n}", model) for n, model in enumerate(models)]
    bigmerge.merge(paths, tmp_path / "out", dtype="bfloat16", exclude=["model.norm.*"])
    out = read_checkpoint(tmp_path / "out")
    assert out["model.ids"].dtype == torch.int64
    assert torch.equal(out["model.norm.weight"], models[0]["model.norm.weight"].bfloat16())
    assert out["model.embed.weight"].dtype == torch.bfloat16


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("method", ["linear", "fisher"])
def test_bytes_depend_on_recipe_and_inputs_alone(tmp_path, method):
    """The same for any memory, number of workers and sharding of the inputs."""
    outs = []
    for number, (shards, memory, workers) in enumerate(
        [(1, "256MiB", 1), (3, "256MiB", 4), (2, "48MiB", 1), (1, "256MiB", 2)]
    ):
        inputs = tmp_path / f"inputs{number}"
        for n in range(3):
            tensors = model_tensors(n, torch.bfloat16)
            if number == 3:  # another order in the file
                tensors = dict(reversed(tensors.items()))
            write_checkpoint(inputs / f"m{n}", tensors, shards=shards, config={"hidden_size": 30})
            write_checkpoint(inputs / f"m{n}-fisher", fisher_tensors(n), shards=shards)
        out = tmp_path / f"out{number}"
        bigmerge.merge(
            sorted(inputs.iterdir()), out, method=method, memory=memory, workers=workers, shard_size=9000
        )
        outs.append(file_bytes(out))
    assert len([name for name in outs[0] if name.endswith(".safetensors")]) > 1
    for other in outs[1:]:
        assert other == outs[0]


def test_several_workers_agree_on_tensors_of_many_steps(tmp_path):
    """At the real grid: 2.5 M elements are ten blocks in three steps, the last of them ragged."""
    for n in range(2):
        write_checkpoint(tmp_path / f"m{n}", {"w": normal(2_500_001, n, torch.bfloat16)})
    paths = [tmp_path / "m0", tmp_path / "m1"]
    bigmerge.merge(paths, tmp_path / "one", workers=1, memory="64MiB")
    bigmerge.merge(paths, tmp_path / "four", workers=4)
    assert file_bytes(tmp_path / "one") == file_bytes(tmp_path / "four")
    expected = reference_linear([read_checkpoint(path) for path in paths], [1, 1])
    assert_close_in_dtype(read_checkpoint(tmp_path / "one"), expected)


def test_one_model_with_all_the_weight_comes_back(tmp_path):
    models = [model_tensors(seed, torch.bfloat16) for seed in range(2)]
    paths = [write_checkpoint(tmp_path / f"m{n}", model) for n, model in enumerate(models)]
    bigmerge.merge(paths, tmp_path / "out", weights=[0, 1])
    out = read_checkpoint(tmp_path / "out")
    assert all(torch.equal(out[name], models[1][name]) for name in out)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(tmp_path, value):
    models = [model_tensors(seed) for seed in range(2)]
    models[1]["model.layers.0.weight"][3, 4] = value
    paths = [write_checkpoint(tmp_path / f"m{n}", model) for n, model in enumerate(models)]
    with pytest.raises(CheckpointError, match=r"m1.*'model.layers.0.weight' holds (nan|inf) at element 196"):
        bigmerge.merge(paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
def test_overflow_of_the_output_dtype_is_named(tmp_path, dtype):
    for exclude in ([], ["a"]):
        models = {"a": torch.full((10,), 1e6), "b": torch.zeros(3)}
        paths = [write_checkpoint(tmp_path / f"m{n}", models) for n in range(2)]
        with pytest.raises(CheckpointError, match=r"'a'.*1e\+06 does not fit into float"):
            bigmerge.merge(paths, tmp_path / f"out{len(exclude)}", dtype=dtype, exclude=exclude)


def test_a_negative_fisher_is_refused(tmp_path):
    for n in range(2):
        write_checkpoint(tmp_path / f"m{n}", model_tensors(n))
    fishers = fisher_tensors(0)
    write_checkpoint(tmp_path / "m0-fisher", fishers)
    write_checkpoint(tmp_path / "m1-fisher", {name: -value for name, value in fishers.items()})
    with pytest.raises(CheckpointError, match=r"m1-fisher.*negative"):
        bigmerge.merge(sorted(tmp_path.iterdir()), tmp_path / "out")


def test_a_header_that_was_not_padded(tmp_path):
    """Old writers did not align the data; the bytes are then read through an aligned copy."""
    import struct

    models = [{"a": normal(1001, n), "b": normal(7, n, torch.bfloat16)} for n in range(2)]
    paths = []
    for n, model in enumerate(models):
        path = tmp_path / f"m{n}.safetensors"
        save_file(model, path)
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = raw[8 : 8 + length].rstrip() + b" " * (3 - n)
        path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])
        paths.append(path)
    bigmerge.merge(paths, tmp_path / "out")
    assert_close_in_dtype(read_checkpoint(tmp_path / "out"), reference_linear(models, [1, 1]))


def test_pytorch_files(tmp_path):
    models = [model_tensors(n, torch.float16) for n in range(2)]
    for n, model in enumerate(models):
        torch.save(model, tmp_path / f"m{n}.bin")
    bigmerge.merge([tmp_path / "m0.bin", tmp_path / "m1.bin"], tmp_path / "out")
    assert_close_in_dtype(read_checkpoint(tmp_path / "out"), reference_linear(models, [1, 1]))


@pytest.mark.slow
def test_a_tensor_over_two_gigabytes(tmp_path):
    """One read or write call moves at most 2^31 bytes on Linux; offsets beyond must come out right too."""
    import struct

    from bigmerge.checkpoints.header import build_header

    count = 1_200_000_000  # 2.4 GB in bfloat16
    edges = [0, 1, (1 << 30) - 1, 1 << 30, (1 << 30) + 12345, count - 1]
    for n in range(2):
        (tmp_path / f"m{n}").mkdir()
        header = build_header({"big": ("BF16", (count // 1000, 1000))}, {})
        with (tmp_path / f"m{n}" / "model.safetensors").open("wb") as file:
            file.write(header)
            file.truncate(len(header) + 2 * count)  # sparse: all other elements are zero
            for place in edges:
                file.seek(len(header) + 2 * place)
                file.write(
                    torch.tensor([place % 251 + n], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
                )
    result = bigmerge.merge([tmp_path / "m0", tmp_path / "m1"], tmp_path / "out")
    assert result.bytes_written > 1 << 31
    path = tmp_path / "out" / "model.safetensors"
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        for place in edges:
            file.seek(8 + length + 2 * place)
            found = torch.frombuffer(bytearray(file.read(2)), dtype=torch.bfloat16)
            assert found.item() == torch.tensor(place % 251 + 0.5).bfloat16().item(), place
    for n in range(2):
        (tmp_path / f"m{n}" / "model.safetensors").unlink()
    path.unlink()  # gigabytes need not wait for pytest to tidy up


@pytest.mark.parametrize("method", ["linear", "fisher"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_neither_blocks_nor_ways_of_reading_nor_processes_show_in_the_bytes(
    tmp_path, monkeypatch, method, dtype
):
    """Tensors whose ends lie at every distance from a vector's end."""
    shapes = {f"t{n}": ((1 << 12) * 3 + n,) for n in (0, 1, 7, 15, 16, 17, 31, 63, 64, 100, 127, 4095)}
    for n in range(3):
        tensors = {name: normal(shape, n * 100 + k, dtype) for k, (name, shape) in enumerate(shapes.items())}
        write_checkpoint(tmp_path / f"m{n}", tensors)
        write_checkpoint(tmp_path / f"m{n}-fisher", {k: v.float().square() for k, v in tensors.items()})
    sources = sorted(tmp_path.iterdir())
    outs = []
    for block, options in (
        (1 << 16, {}),
        (1 << 12, {"io": "pread", "workers": 1}),
        (1 << 10, {"io": "direct", "workers": 3}),
        (1 << 9, {"io": "direct", "workers": 2, "memory": "40MiB"}),
        (1 << 8, {"io": "mmap", "processes": 2}),
    ):
        monkeypatch.setattr(grid, "BLOCKS", (block,))
        monkeypatch.setattr(grid, "DIRECT_WINDOWS", (max(block, 1 << 11),))
        out = tmp_path / f"out{block}"
        bigmerge.merge(sources, out, method=method, **options)
        outs.append(file_bytes(out))
    assert all(other == outs[0] for other in outs[1:])
