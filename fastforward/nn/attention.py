"""QuantizedMultiheadAttention: made from torch's source, like the companion of any class.

Its products are quantized where ``torch.nn.functional.multi_head_attention_forward`` computes them, and torch's fused
fast path is taken only while no quantizer is attached.
"""

import torch

from fastforward.nn.conversion import companion_for

QuantizedMultiheadAttention = companion_for(torch.nn.MultiheadAttention)
