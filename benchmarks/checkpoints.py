"""Checkpoints for measurements: the shapes of a Llama, filled with seeded random numbers."""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigmerge.checkpoints.dtypes import torch_dtype
from bigmerge.checkpoints.layout import lay_out
from bigmerge.storage.writing import CheckpointWriter

_PIECE = 1 << 22  # elements generated at a time


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama; `layers` is what scales it."""

    layers: int
    hidden: int = 2048
    intermediate: int = 5632
    vocabulary: int = 32000
    heads: int = 32
    key_value_heads: int = 4

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor."""
        head = self.hidden // self.heads
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield prefix + "self_attn.k_proj.weight", (self.key_value_heads * head, self.hidden)
            yield prefix + "self_attn.v_proj.weight", (self.key_value_heads * head, self.hidden)
            yield prefix + "self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield prefix + "mlp.gate_proj.weight", (self.intermediate, self.hidden)
            yield prefix + "mlp.up_proj.weight", (self.intermediate, self.hidden)
            yield prefix + "mlp.down_proj.weight", (self.hidden, self.intermediate)
            yield prefix + "input_layernorm.weight", (self.hidden,)
            yield prefix + "post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    @property
    def parameters(self) -> int:
        return sum(int(math.prod(shape)) for _, shape in self.tensors())

    def config(self) -> dict[str, Any]:
        """config.json of such a model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }


def write_llama(
    directory: Path, shape: LlamaShape, *, seed: int, dtype: str = "BF16", fisher: bool = False
) -> Path:
    """Write a model (normal numbers around 0.02) or a Fisher (exponential, mean 1e-6); kept if already there.

    Args:
        dtype: safetensors name of the stored dtype.
    """
    done = directory / "config.json"
    if done.exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    layout = lay_out(
        {name: (dtype, sizes) for name, sizes in shape.tensors()}, 10**9, metadata={"format": "pt"}
    )
    import torch  # not above: what measures other processes is to stay small

    generator = torch.Generator().manual_seed(seed)
    with CheckpointWriter(directory, layout) as writer:
        writer.create()
        for name, (_, sizes) in layout.tensors.items():
            numel = int(math.prod(sizes))
            for first in range(0, numel, _PIECE):
                piece = torch.empty(min(_PIECE, numel - first))
                if fisher:
                    piece.exponential_(1e6, generator=generator)
                else:
                    piece.normal_(0.0, 0.02, generator=generator)
                stored = piece.to(torch_dtype(dtype))
                writer.write(name, first * stored.element_size(), stored.view(torch.uint8).numpy().data)
        writer.sync()
    done.write_text(json.dumps(shape.config()))
    return directory


def make_llama(
    directory: Path, shape: LlamaShape, *, seed: int, dtype: str = "BF16", fisher: bool = False
) -> Path:
    """`write_llama` in a process of its own.

    A process begins with the peak memory of the one that starts it, which therefore must stay small.

    Raises:
        RuntimeError: it failed.
    """
    process = multiprocessing.get_context("spawn").Process(
        target=write_llama, args=(directory, shape), kwargs={"seed": seed, "dtype": dtype, "fisher": fisher}
    )
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{directory}: could not be made (exit code {process.exitcode})")
    return directory
