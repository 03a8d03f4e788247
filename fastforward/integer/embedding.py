"""IntegerEmbedding: a table of int8 rows."""

import torch

from fastforward.integer.linear import become
from fastforward.integer.weights import integer_weight
from fastforward.nn.embedding import QuantizedEmbedding
from fastforward.nn.quantizer import Quantizer


class IntegerEmbedding(torch.nn.Embedding):
    """Looks up int8 rows and scales what it found; the table takes a quarter of the memory.

    Buffers ``weight_int8`` (``[num_embeddings, embedding_dim]``) and ``weight_scale`` (``[num_embeddings]``, float32)
    replace the float table.
    """

    weight_int8: torch.Tensor
    weight_scale: torch.Tensor
    output_quantizer: Quantizer | None
    output_dtype: torch.dtype

    @classmethod
    def swap(cls, layer: QuantizedEmbedding, *, keep_float: bool = False) -> "IntegerEmbedding":
        """Turn a calibrated embedding into an integer one, in place."""
        integers, scale = integer_weight(layer.weight_quantizer, layer.weight)
        output_quantizer, dtype = layer.output_quantizer, layer.weight.dtype
        become(layer, cls, keep_float)
        self: IntegerEmbedding = layer  # type: ignore[assignment]
        self.register_buffer("weight_int8", integers)
        self.register_buffer("weight_scale", scale)
        self.output_quantizer = None if output_quantizer.is_stub() else output_quantizer
        self.output_dtype = dtype
        return self

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Look up integer indices ``[*]``; returns ``[*, embedding_dim]``."""
        rows = torch.nn.functional.embedding(input, self.weight_int8)
        scale = torch.nn.functional.embedding(input, self.weight_scale[:, None])
        y = (rows * scale).to(self.output_dtype)
        return y if self.output_quantizer is None else self.output_quantizer(y)

    @property
    def weight(self) -> torch.Tensor:
        """The float table that the integers stand for, computed now; the original one if it was kept."""
        if "weight" in self._parameters:
            return self._parameters["weight"]  # type: ignore[return-value]
        return (self.weight_int8 * self.weight_scale[:, None]).to(self.output_dtype)
