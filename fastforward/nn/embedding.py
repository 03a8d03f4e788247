"""Quantized embeddings: the table is quantized, indices are not."""

import torch

from fastforward.nn.module import QuantizedModule
from fastforward.nn.operands import add_operand_stubs
from fastforward.nn.quantizer import Quantizer
from fastforward.nn.simulated_weight import SimulatedWeight


class _QuantizedTable(QuantizedModule, include_in_module_map=False):
    weight: torch.Tensor
    max_norm: float | None
    norm_type: float
    weight_quantizer: Quantizer
    output_quantizer: Quantizer
    _operator = ""
    call_paths = True

    def __init_quantization__(self) -> None:
        super().__init_quantization__()
        add_operand_stubs(self, self._operator, ("weight", "output"))
        self._simulated_weight = SimulatedWeight()

    def _quantized_table(self, indices: torch.Tensor) -> torch.Tensor:
        if self.max_norm is not None:
            # The float layer renormalizes rows of the parameter itself before it looks them up; so does this one.
            with torch.no_grad():
                torch.embedding_renorm_(self.weight.detach(), indices.contiguous(), self.max_norm, self.norm_type)
        return self._simulated_weight.get(self.weight_quantizer, self.weight)


class QuantizedEmbedding(_QuantizedTable, torch.nn.Embedding):
    """``torch.nn.Embedding`` with ``weight_quantizer`` and ``output_quantizer``."""

    _operator = "embedding"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Look up integer indices ``[*]``; returns ``[*, embedding_dim]``."""
        if self._float_only:
            return super().forward(input)
        here, weight = self.at_call(), self._quantized_table(input)
        y = torch.nn.functional.embedding(
            input, weight, self.padding_idx, None, self.norm_type, self.scale_grad_by_freq, self.sparse
        )
        output: torch.Tensor = here.output_quantizer(y)
        return output


class QuantizedEmbeddingBag(_QuantizedTable, torch.nn.EmbeddingBag):
    """``torch.nn.EmbeddingBag`` with ``weight_quantizer`` and ``output_quantizer``."""

    _operator = "embedding_bag"

    def forward(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum, average or maximum of the rows of each bag; returns ``[bags, embedding_dim]``."""
        if self._float_only:
            return super().forward(input, offsets, per_sample_weights)
        here, weight = self.at_call(), self._quantized_table(input)
        y = torch.nn.functional.embedding_bag(
            input,
            weight,
            offsets,
            None,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )
        output: torch.Tensor = here.output_quantizer(y)
        return output
