"""Models with quantizers whose ranges are set by hand, for the tests of integer execution."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

import fastforward as ff
import fastforward.nn.layers  # noqa: F401  (registers the hand-written layers)
from fastforward.nn.module import quantized_module_map

nn = torch.nn
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
QUANTIZED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Embedding, nn.EmbeddingBag)


def activation_quantizer(low: float, high: float, num_bits: int = 8, symmetric: bool = False) -> Any:
    quantizer = ff.nn.LinearQuantizer(num_bits, symmetric=symmetric)
    quantizer.quantization_range = (low, high)
    return quantizer


def weight_quantizer(weight: torch.Tensor, num_bits: int = 8, dim: int = 0) -> Any:
    quantizer = ff.nn.LinearQuantizer(num_bits, symmetric=True, allow_one_sided=False, granularity=ff.PerChannel(dim))
    rows = weight.detach().movedim(dim, 0).flatten(1)
    quantizer.quantization_range = (rows.amin(1), rows.amax(1))
    return quantizer


def simulated(model: nn.Module, *inputs: Any, num_bits: int = 8, symmetric: bool = False, **kwargs: Any) -> nn.Module:
    """Swap matmul-class layers to their hand-written classes and set ranges to what one run shows."""
    ranges: dict[nn.Module, tuple[float, float]] = {}

    def observe(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        low, high = ranges.get(layer, (0.0, 0.0))
        ranges[layer] = (min(low, float(args[0].min())), max(high, float(args[0].max())))

    layers = [module for module in model.modules() if type(module) in QUANTIZED]
    handles = [layer.register_forward_pre_hook(observe) for layer in layers]
    with torch.no_grad():
        model(*inputs, **kwargs)
    for handle in handles:
        handle.remove()
    for layer in layers:
        layer.__class__ = quantized_module_map()[type(layer)]
        layer.__init_quantization__()
        if hasattr(layer, "input_quantizer"):
            layer.input_quantizer = activation_quantizer(*ranges[layer], num_bits, symmetric)
        layer.weight_quantizer = weight_quantizer(layer.weight, dim=int(isinstance(layer, _TRANSPOSED)))
    return model.eval()


def outputs(model: nn.Module, *inputs: Any, runs: int = 1) -> torch.Tensor:
    with torch.no_grad():
        for _ in range(runs):
            y = model(*inputs)
    return y + 0


def close(simulation: torch.Tensor, integers: torch.Tensor) -> bool:
    """Equal within float rounding of a sum of products."""
    return bool(torch.allclose(simulation, integers, rtol=1e-4, atol=2e-5 * float(simulation.abs().max())))


def compiled_operators(model: nn.Module, *inputs: Any) -> Counter[str]:
    """The operators of the program that a compiler is given, by name."""
    found: Counter[str] = Counter()

    def backend(program: torch.fx.GraphModule, _: Any) -> Any:
        found.update(
            getattr(node.target, "__name__", str(node.target)).partition(".")[0] for node in program.graph.nodes
        )
        return program

    torch._dynamo.reset()
    outputs(torch.compile(model, fullgraph=True, backend=backend), *inputs)
    return found


class Net(nn.Module):
    """A module made of a function, for short tests."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)
