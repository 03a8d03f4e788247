"""Integer execution: a simulated model becomes one whose layers multiply integers."""

from fastforward._lazy import lazy_names

_NAMES = {
    "convert": "conversion",
    "convert_shards": "sharded",
    "explain": "explaining",
    "supported": "explaining",
    "export": "exporting",
    "check_inputs": "finite",
    "IntegerLinear": "linear",
    "IntegerConv1d": "conv",
    "IntegerConv2d": "conv",
    "IntegerConv3d": "conv",
    "IntegerConvTranspose1d": "transposed",
    "IntegerConvTranspose2d": "transposed",
    "IntegerConvTranspose3d": "transposed",
    "IntegerEmbedding": "embedding",
    "IntegerEmbeddingBag": "embedding",
    "IntegerLSTM": "recurrent",
    "IntegerGRU": "recurrent",
    "IntegerRNN": "recurrent",
    "IntegerDynamicLinear": "dynamic",
    "WeightOnlyLinear": "weight_only",
    "PackedLinear": "packed_linear",
    "Float8Linear": "float8",
}

__getattr__, __dir__, __all__ = lazy_names(__name__, _NAMES)
