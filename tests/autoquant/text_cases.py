"""Modules whose text form is executed: one construct of Python each, with an input to run it on."""

import contextlib
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.autoquant import text_helpers
from tests.autoquant.text_helpers import scale as imported_scale

FACTOR = 0.5
LOG: list[str] = []


def logged(name, value):
    LOG.append(name)
    return value


def scale(x, by=FACTOR):
    return x * by + OFFSET


OFFSET = 0.25


def fact(x, n: int):
    if n <= 1:
        return x
    return fact(x * 0.75, n - 1) + x


def pairs(x):
    for part in x.unbind(0):
        yield part + 1


def variadic(*xs, **named):
    return sum(x * 2 for x in xs) + named["extra"] * 3


@contextlib.contextmanager
def doubled(x):
    yield x * 2


def repeated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs) + 0.125

    return wrapper


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
        self.bias = nn.Parameter(torch.linspace(0, 1, 3))
        self.__secret = 0.3

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) * self.__secret


class Super(Base):
    def forward(self, x):
        return super().forward(x) + super().forward(x * 2)


class Inherited(Super):
    pass


class Methods(Base):
    def forward(self, x):
        return self.part(x) - self.part(x * 2) + self.other(x)

    def part(self, x, *, power=2):
        return self.inner(x) ** power

    def inner(self, x):
        return F.linear(x, self.weight) + 1

    def other(self, x):
        return torch.tanh(F.linear(x, self.weight))


class Property(Base):
    @property
    def scaled(self):
        return self.weight * 0.5

    def forward(self, x):
        return F.linear(x, self.scaled)


class Closure(Base):
    def forward(self, x):
        y = x * 2

        def inner(z, by=3):
            return (z + y) * by

        return inner(x) + (lambda v: v * y)(x)


class Comprehension(nn.Module):
    def forward(self, x):
        parts = [part * 2 for part in x.unbind(0)]
        table = {i: part + i for i, part in enumerate(parts)}
        return torch.stack([value - 1 for value in table.values()]) + sum(part.sum() for part in parts)


class Control(nn.Module):
    def forward(self, x):
        total = x * 0
        for i, part in enumerate(x):
            if i == 1:
                continue
            total = total + part
        else:
            total = total * 2
        n = 0
        while n < 2:
            total = total + x
            n += 1
        try:
            total = total / 3
            raise ValueError
        except ValueError as error:
            total = total - len(error.args)
        finally:
            total = total + 1
        return total if total.sum() > 0 else -total


class Match(nn.Module):
    def forward(self, x):
        match x.shape:
            case [rows, 4]:
                return x * rows
            case _:
                return x


class With(nn.Module):
    def forward(self, x):
        with doubled(x) as y, torch.no_grad():
            return y + x


class InPlace(nn.Module):
    def forward(self, x):
        y = x.clone()
        view = y[0]
        view.add_(1)
        y += x
        y[1] = x[0] * 2
        z = y.relu_() + view
        return z * y


class Walrus(nn.Module):
    def forward(self, x):
        return (y := x * 2) + y


class Chained(nn.Module):
    def forward(self, x):
        return x * 1 if 0 < x.shape[0] < 9 and x.numel() > 1 else x * 2


class Order(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(4) * 0.3)

    @property
    def read(self):
        return logged("read", self.w)

    def forward(self, x):
        LOG.clear()
        y = logged("a", x) + logged("b", x) * logged("c", x)
        z = F.linear(logged("d", y), self.read[None], logged("e", None))
        return z + (logged("f", 1) if logged("g", True) else logged("h", 2)) * scale(logged("i", x)).sum()


def traced(name, x):
    LOG.append(name)
    return x * 2


class Unreached(nn.Module):
    """Calls that must not move in front of the statement: not evaluated, evaluated later, or evaluated often."""

    def forward(self, x):
        LOG.clear()
        y = traced("not taken", x) + 1 if x.sum() > 1e9 else traced("taken", x) + 1
        short = x.sum() > 1e9 and traced("skipped", x) + 1
        parts = [traced("each", part) + 1 for part in x]
        late = x[logged("first", 0)] + traced("second", x)
        return y + parts[0] + late + int(short)


class Plain(nn.Module):
    def prepare(self, x):
        return x


class SuperStays(Plain):
    """`super()` reaches a method without operators, so the call is written as it is, in a class with other bases."""

    def prepare(self, x):
        return None

    def forward(self, x):
        return super().prepare(x) * 2


class Helpers(nn.Module):
    def forward(self, x):
        return scale(scale(x)) + imported_scale(x) + text_helpers.shifted(x, FACTOR) + math.pi


class Recursion(nn.Module):
    def forward(self, x):
        return fact(x, 3)


class Generator(nn.Module):
    def forward(self, x):
        return torch.stack(list(pairs(x))) + x


class Variadic(nn.Module):
    def forward(self, x):
        return variadic(x, x * 2, extra=x)


class Decorated(Base):
    @repeated
    @torch.no_grad()
    def forward(self, x):
        return F.linear(x, self.weight, bias=self.bias)


class Lists(nn.Module):
    def forward(self, x):
        outputs = []
        for _ in range(2):
            x = x * 0.5
            outputs.append(x)
        first, *rest = outputs
        return torch.cat([first, rest[0]]), {"all": outputs}


def joined(parts):
    return torch.cat(parts)


class ListArgument(nn.Module):
    def forward(self, x):
        return joined([x, x * 2]) + joined((x, x * 3))


class TensorMethods(nn.Module):
    def forward(self, x):
        return x.matmul(x.transpose(0, 1)).softmax(-1, torch.float32).sum(0, keepdim=True).exp()


class Functionals(nn.Module):
    def forward(self, x):
        y = F.relu(x, inplace=False) + torch.softmax(x, -1) + torch.nn.functional.gelu(x, approximate="tanh")
        return F.layer_norm(y, (4,)).clamp(min=-1) @ x.t() // 0.3 % 2


class LocalImport(nn.Module):
    def forward(self, x):
        from .text_helpers import shifted

        return shifted(x, by=2.0)


class Outer:
    class Nested(nn.Module):
        def forward(self, x):
            return x * 3


class Parent(nn.Module):
    """Two classes called Scale."""

    def __init__(self):
        super().__init__()
        self.one, self.two = Scale(), text_helpers.Scale()

    def forward(self, x):
        return self.one(x) + self.two(x)


class Scale(nn.Module):
    def forward(self, x):
        return x * 0.7


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 5)
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x):
        y, _ = self.rnn(x)
        z, _ = self.attention(x, x, x)
        return y.sum() + z


class Static(nn.Module):
    @staticmethod
    def shifted(x, by):
        return x.abs() - by

    def forward(self, x):
        return self.shifted(x, 0.5) * self.shifted(x + 1, by=0.25)


CASES = [
    Base, Super, Inherited, Methods, Property, Closure, Comprehension, Control, Match, With, InPlace, Walrus, Chained,
    Order, Unreached, SuperStays, Helpers, Recursion, Generator, Variadic, Decorated, Lists, ListArgument, TensorMethods, Functionals, LocalImport,
    Outer.Nested, Parent, Recurrent, Static,
]  # fmt: skip
