"""IntegerEmbedding and IntegerEmbeddingBag: tables of int8 rows."""

from typing import Any

import torch

from fastforward.integer.layer import become, output_from_json, output_to_json, require_shape, successor
from fastforward.integer.weights import integer_weight, keeping_scales
from fastforward.nn.embedding import QuantizedEmbedding, QuantizedEmbeddingBag
from fastforward.nn.quantizer import Quantizer


class IntegerTable(torch.nn.Module):
    """What integer embeddings share: the table takes a quarter of the memory.

    Buffers ``weight_int8`` (``[num_embeddings, embedding_dim]``) and ``weight_scale`` (``[num_embeddings]``, float32)
    replace the float table.
    """

    holds_integers = True
    _operator = ""
    num_embeddings: int
    embedding_dim: int
    weight_int8: torch.Tensor
    weight_scale: torch.Tensor
    output_quantizer: Quantizer | None
    output_dtype: torch.dtype

    @classmethod
    def swap(cls, layer: QuantizedEmbedding | QuantizedEmbeddingBag, *, keep_float: bool = False) -> "IntegerTable":
        """Turn a calibrated embedding into an integer one, in place."""
        integers, scale = integer_weight(layer.weight_quantizer, layer.weight)
        output_quantizer, dtype = layer.output_quantizer, layer.weight.dtype
        become(layer, cls, keep_float)
        self: IntegerTable = layer  # type: ignore[assignment]
        self.install(integers, scale, dtype, None if output_quantizer.is_stub() else output_quantizer)
        return self

    def install(
        self, integers: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, output_quantizer: Quantizer | None
    ) -> None:
        """Take the integer form of a table whose float form has been removed; ``dtype`` is that of the result."""
        self.register_buffer("weight_int8", integers)
        self.register_buffer("weight_scale", scale)
        self.output_dtype, self.output_quantizer = dtype, output_quantizer

    def chain_link(self) -> tuple[str, str, str, str]:
        """Operator, type of the input, type of the result and kernel, for a report."""
        return self._operator, "int64", str(self.output_dtype).removeprefix("torch."), "int8 rows"

    def quantization_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors by name, and JSON data: all that it takes to build the layer again."""
        data = {"dtype": str(self.output_dtype).removeprefix("torch."), "output": output_to_json(self.output_quantizer)}
        return {"weight_int8": self.weight_int8, "weight_scale": self.weight_scale}, data

    @classmethod
    def from_quantization_state(
        cls, module: torch.nn.Module, tensors: dict[str, torch.Tensor], data: dict[str, Any]
    ) -> torch.nn.Module:
        """The integer layer for the place of ``module``, which stays as it is.

        Raises:
            StateError: The state belongs to a layer of another kind or shape.
        """
        new: IntegerTable = successor(module, cls)
        require_shape(tensors["weight_int8"], (new.num_embeddings, new.embedding_dim), "table")
        dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[data["dtype"]]
        new.install(tensors["weight_int8"], tensors["weight_scale"], dtype, output_from_json(data["output"]))
        return new

    def _looked_up(self, input: torch.Tensor) -> torch.Tensor:
        """The rows that integer indices ``[*]`` name, as floats ``[*, embedding_dim]``."""
        rows = torch.nn.functional.embedding(input, self.weight_int8)
        scale = torch.nn.functional.embedding(input, self.weight_scale[:, None])
        # Converting first is one pass more and takes two thirds of the time of a product of mixed types.
        return rows.float().mul_(scale).to(self.output_dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "IntegerTable":
        """Move with the model; the result takes the model's dtype, scales stay float32."""
        device = self.weight_scale.device
        with keeping_scales(self):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.output_dtype = fn(torch.empty(0, dtype=self.output_dtype, device=device)).dtype
        return self

    @property
    def weight(self) -> torch.Tensor:
        """The float table that the integers stand for, computed now; the original one if it was kept."""
        if "weight" in self._parameters:
            return self._parameters["weight"]  # type: ignore[return-value]
        return (self.weight_int8 * self.weight_scale[:, None]).to(self.output_dtype)


class IntegerEmbedding(IntegerTable, torch.nn.Embedding):  # type: ignore[override]
    """``torch.nn.Embedding`` that looks up int8 rows and scales what it found."""

    _operator = "embedding"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Look up integer indices ``[*]``; returns ``[*, embedding_dim]``."""
        y = self._looked_up(input)
        return y if self.output_quantizer is None else self.output_quantizer(y)


class IntegerEmbeddingBag(IntegerTable, torch.nn.EmbeddingBag):  # type: ignore[override]
    """``torch.nn.EmbeddingBag`` that looks up int8 rows, scales what it found and reduces each bag."""

    _operator = "embedding_bag"

    def forward(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum, average or maximum of the rows of each bag; returns ``[bags, embedding_dim]``."""
        rows = self._looked_up(input.flatten())
        # The rows found are the table of a float bag, in the order of the bags.
        places = torch.arange(input.numel(), device=input.device).view(input.shape)
        padding = None
        if self.padding_idx is not None:
            padding = rows.shape[0]
            rows = torch.cat((rows, rows.new_zeros(1, self.embedding_dim)))
            places = places.masked_fill(input == self.padding_idx, padding)
        y = torch.nn.functional.embedding_bag(
            places,
            rows,
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding,
        )
        return y if self.output_quantizer is None else self.output_quantizer(y)
