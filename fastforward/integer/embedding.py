"""IntegerEmbedding: a table of int8 rows."""

from typing import Any

import torch

from fastforward.exceptions import StateError
from fastforward.integer.layer import become, output_from_json, output_to_json, successor
from fastforward.integer.weights import integer_weight
from fastforward.nn.embedding import QuantizedEmbedding
from fastforward.nn.quantizer import Quantizer


class IntegerEmbedding(torch.nn.Embedding):
    """Looks up int8 rows and scales what it found; the table takes a quarter of the memory.

    Buffers ``weight_int8`` (``[num_embeddings, embedding_dim]``) and ``weight_scale`` (``[num_embeddings]``, float32)
    replace the float table.
    """

    holds_integers = True
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
        self.install(integers, scale, dtype, None if output_quantizer.is_stub() else output_quantizer)
        return self

    def install(
        self, integers: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, output_quantizer: Quantizer | None
    ) -> None:
        """Take the integer form of a table whose float form has been removed; ``dtype`` is that of the result."""
        self.register_buffer("weight_int8", integers)
        self.register_buffer("weight_scale", scale)
        self.output_dtype, self.output_quantizer = dtype, output_quantizer

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Look up integer indices ``[*]``; returns ``[*, embedding_dim]``."""
        rows = torch.nn.functional.embedding(input, self.weight_int8)
        scale = torch.nn.functional.embedding(input, self.weight_scale[:, None])
        y = (rows * scale).to(self.output_dtype)
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def chain_link(self) -> tuple[str, str, str, str]:
        """Operator, type of the input, type of the result and kernel, for a report."""
        return "embedding", "int64", "float32", "int8 rows"

    def quantization_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors by name, and JSON data: all that it takes to build the layer again."""
        data = {"dtype": str(self.output_dtype).removeprefix("torch."), "output": output_to_json(self.output_quantizer)}
        return {"weight_int8": self.weight_int8, "weight_scale": self.weight_scale}, data

    @classmethod
    def from_quantization_state(
        cls, module: torch.nn.Module, tensors: dict[str, torch.Tensor], data: dict[str, Any]
    ) -> torch.nn.Module:
        """The integer embedding for the place of ``module``, which stays as it is.

        Raises:
            StateError: The state belongs to a layer of another kind or shape.
        """
        new: IntegerEmbedding = successor(module, cls)
        expected = (new.num_embeddings, new.embedding_dim)
        if tuple(tensors["weight_int8"].shape) != expected or tensors["weight_int8"].dtype != torch.int8:
            msg = f"it has a table of shape {tuple(tensors['weight_int8'].shape)}, the model one of shape {expected}"
            raise StateError(msg)
        dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[data["dtype"]]
        new.install(tensors["weight_int8"], tensors["weight_scale"], dtype, output_from_json(data["output"]))
        return new

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The float table that the integers stand for, computed now; the original one if it was kept."""
        if "weight" in self._parameters:
            return self._parameters["weight"]  # type: ignore[return-value]
        return (self.weight_int8 * self.weight_scale[:, None]).to(self.output_dtype)
