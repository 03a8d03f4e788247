"""Importable models for the tests of companions."""

import torch
from torch import nn


def mix(x: torch.Tensor, y: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
    """A helper with two sites."""
    return x * scale + y


class Net(nn.Module):
    """A layer, a parameter of its own and a helper."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.lin(x))
        return mix(y @ self.weight, x)


class Slotted(Net):
    """A class with slots beside the dictionary."""

    __slots__ = ("extra",)

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "extra", 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2.0


class Counting(type):
    """A metaclass that counts the classes it makes."""

    made: list[str] = []  # noqa: RUF012

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, object], **keywords: object) -> type:
        mcs.made.append(name)
        return super().__new__(mcs, name, bases, namespace, **keywords)


class Meta(nn.Module, metaclass=Counting):
    """A class with a metaclass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) - 1


class Shared(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = Net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))
