"""Comparing what two runs of a model left behind, to the last bit."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def tensors(value: Any, path: str = "out", seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor inside ``value``, with the path that leads to it: containers, dataclasses and plain objects."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield path, value
        return
    if (
        value is None
        or isinstance(value, (str, bytes, int, float, complex, torch.nn.Module, type))
        or id(value) in seen
    ):
        return
    seen.add(id(value))
    for name, item in _items(value):
        yield from tensors(item, f"{path}.{name}", seen)


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    if callable(value):
        return []
    return list(getattr(value, "__dict__", {}).items())


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits (so NaN equals NaN and 0 differs from -0)."""
    if left.dtype != right.dtype or left.shape != right.shape or left.layout != right.layout:
        return False
    if left.layout != torch.strided:
        return torch.equal(left.to_dense(), right.to_dense())
    return torch.equal(_bytes(left), _bytes(right))


def same_values(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same type, shape and values (NaN equals NaN, and 0 equals -0)."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return same_bits(left, right) or bool(torch.isclose(left, right, rtol=0, atol=0, equal_nan=True).all())


def _bytes(tensor: Tensor) -> Tensor:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return plain if plain.dtype == torch.bool else plain.view(torch.uint8)


def differences(
    left: Any, right: Any, what: str = "out", same: Callable[[Tensor, Tensor], bool] = same_bits
) -> list[str]:
    """Paths at which ``right`` differs from ``left``, in words."""
    mine, theirs = dict(tensors(left, what)), dict(tensors(right, what))
    found = [f"{path}: only on one side" for path in sorted(mine.keys() ^ theirs.keys())]
    for path in sorted(mine.keys() & theirs.keys()):
        if not same(mine[path], theirs[path]):
            found.append(f"{path}: {_distance(mine[path], theirs[path])}")
    return found


def _distance(left: Tensor, right: Tensor) -> str:
    if left.shape != right.shape or left.dtype != right.dtype:
        return f"{tuple(left.shape)} {left.dtype} against {tuple(right.shape)} {right.dtype}"
    gap = (left.detach().double() - right.detach().double()).abs().max()
    return f"differs by up to {float(gap):.3g}"
