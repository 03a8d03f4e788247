"""With stubs only a model does what it did: outputs, gradients, buffers, random numbers."""

import copy
import random
from dataclasses import dataclass
from typing import Any

import numpy
import torch

import fastforward as ff
from tests.zoo.entry import Entry
from tests.zoo.values import differences, tensors


@dataclass
class Run:
    """What one call of a model left behind."""

    outputs: Any
    gradients: dict[str, torch.Tensor | None]
    buffers: dict[str, torch.Tensor]
    random_state: tuple[Any, ...]

    def differences(self, other: "Run") -> list[str]:
        """Where ``other`` is not the same to the last bit."""
        found = differences(self.outputs, other.outputs, "output")
        found += differences(self.gradients, other.gradients, "gradient")
        found += differences(self.buffers, other.buffers, "buffer")
        if self.random_state != other.random_state:
            found.append("random state differs")
        return found


def run(model: torch.nn.Module, arguments: Any, training: bool = False, seed: int = 2) -> Run:
    """Call ``model`` on a copy of ``arguments``; in training mode with a backward pass through every floating output."""
    args, kwargs = copy.deepcopy(arguments)
    model.train(training)
    model.zero_grad(set_to_none=True)
    _seed(seed)
    if not training:
        with torch.no_grad():
            outputs = model(*args, **kwargs)
    else:
        outputs = model(*args, **kwargs)
        loss = sum(t.float().square().mean() for _, t in tensors(outputs) if t.requires_grad and t.is_floating_point())
        if isinstance(loss, torch.Tensor):
            loss.backward()
    state = _random_state()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return Run(outputs, gradients, buffers, state)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    numpy.random.seed(seed)
    random.seed(seed)


def _random_state() -> tuple[Any, ...]:
    """Where the generators of torch, numpy and Python stand, as numbers drawn from copies of them."""
    python, numpys = random.getstate(), numpy.random.get_state()
    drawn = random.random(), float(numpy.random.rand())
    random.setstate(python)
    numpy.random.set_state(numpys)
    return drawn, torch.get_rng_state().tolist()


def check(entry: Entry, training: bool) -> list[str]:
    """Differences between the float model and the same model with stubs."""
    arguments = entry.arguments(training)
    expected = run(entry.make(), arguments, training)
    model = ff.quantize_model(entry.make())
    return expected.differences(run(model, arguments, training))
