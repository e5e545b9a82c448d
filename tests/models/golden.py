"""Comparing with numbers that the published implementations made."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


class Golden:
    """One fixture: its inputs and expected outputs; prints the largest difference of each."""

    def __init__(self, folder: Path, outputs: str = "outputs.safetensors") -> None:
        self.folder = folder
        self.inputs = load_file(folder / "inputs.safetensors")
        self.outputs = load_file(folder / outputs)

    def same(self, name: str, found: Tensor, atol: float, rtol: float = 0.0) -> None:
        expected = self.outputs[name]
        difference = (found - expected).abs().max().item()
        print(f"golden/{self.folder.name} {name}: largest difference {difference:.2g}")
        assert found.shape == expected.shape, name
        assert torch.allclose(found, expected, atol=atol, rtol=rtol), (name, difference)

    def json(self, name: str):  # type: ignore[no-untyped-def]
        return json.loads((self.folder / name).read_text())

    def words(self) -> list[str]:
        return (self.folder / "vocab.txt").read_text().splitlines()


def shapes(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in tensors.items()}


def meta_tensors(keys: dict[str, list[object]]) -> dict[str, Tensor]:
    """Tensors of the real files' shapes, without storage."""
    return {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for key, (shape, dtype) in keys.items()
    }
