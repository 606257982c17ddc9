"""A large random checkpoint shaped as Llama 3, and a trained LoRA on all its linear layers, on disk.

    python tests/bench/big.py DIRECTORY [LAYERS]     # 16 layers: 9.1 GB in bfloat16, ten shards

Weights are pieces of one block of random numbers, so that making them takes no longer than writing them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

from peftc.frontend.trace import build_skeleton
from peftc.runtime.delta_dir import TENSORS
from peftc.store.safetensors_io import TensorSpec, as_bytes, dtype_code, read_header, read_tensor, write
from peftc.store.shards import Piece, resharded, write_shards

_BLOCK = 1 << 24


def config(layers: int) -> transformers.LlamaConfig:
    """Llama 3 of 8 B parameters, with fewer layers."""
    return transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def middling() -> transformers.LlamaConfig:
    """A Llama of 0.58 B parameters, 2.3 GB in float32."""
    return transformers.LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=10,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=2048, dtype="float32",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def make_base(
    directory: Path, layers: int = 16, shard: int = 10**9, settings: transformers.LlamaConfig | None = None
) -> Path:
    """Write the checkpoint, `layers` x 436 MB and 2.1 GB, or that of `settings`."""
    directory.mkdir(parents=True)
    settings = settings or config(layers)
    settings.save_pretrained(directory)
    model = build_skeleton(transformers.LlamaForCausalLM, settings).model
    noise = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02
    dtype = model.dtype
    block, ones = noise.to(dtype), torch.ones(settings.hidden_size, dtype=dtype)

    def produce(spec: TensorSpec) -> Iterator[memoryview]:
        count = spec.nbytes // dtype.itemsize
        source = ones if len(spec.shape) == 1 else block
        for start in range(0, count, len(source)):
            yield as_bytes(source[: min(len(source), count - start)])

    pieces = [Piece(TensorSpec(name, dtype_code(dtype), tuple(p.shape))) for name, p in model.named_parameters()]
    write_shards(directory, resharded(pieces, shard, {"format": "pt"}), produce)
    return directory


def make_delta(base: Path, directory: Path, rank: int = 16) -> Path:
    """LoRA on every linear layer of the blocks, with random numbers in both factors."""
    command = [sys.executable, "-m", "peftc", "apply", "lora_linear", str(base), "-o", str(directory), "-q"]
    subprocess.run([*command, "--set", f"r={rank}"], check=True)
    header = read_header(directory / TENSORS)
    values = {name: read_tensor(header, name) for name in header.tensors}
    generator = torch.Generator().manual_seed(1)
    filled = {name: 0.02 * torch.randn(value.shape, generator=generator) for name, value in values.items()}
    specs = [TensorSpec(info.name, info.dtype, info.shape) for info in header.tensors.values()]
    write(directory / TENSORS, specs, filled.__getitem__, header.metadata)
    return directory


if __name__ == "__main__":
    place = Path(sys.argv[1])
    make_base(place / "base", int(sys.argv[2]) if len(sys.argv) > 2 else 16)
    make_delta(place / "base", place / "delta")
