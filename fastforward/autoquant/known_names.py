"""Names whose results are known without looking: attributes and methods of tensors, builtins, functions of torch."""

import ast


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


INT_ATTRIBUTES = frozenset({"shape", "ndim", "itemsize", "nbytes", "training", "requires_grad", "is_cuda", "is_leaf"})
PLAIN_ATTRIBUTES = frozenset({"dtype", "device", "layout", "grad_fn", "names", "__name__", "__class__", "__dict__"})
INT_METHODS = _words(
    "size dim numel nelement ndimension stride storage_offset element_size get_device data_ptr is_contiguous "
    "is_floating_point is_complex startswith endswith isdigit"
)
PLAIN_METHODS = _words("item tolist format join lower upper strip")
DISCRETE_METHODS = _words(
    "long int short bool argmax argmin argsort nonzero eq ne lt le gt ge isnan isinf isfinite logical_not logical_and "
    "logical_or logical_xor any all bincount"
)
MOVES = _words(
    "view reshape permute transpose contiguous unsqueeze squeeze flatten expand expand_as repeat repeat_interleave "
    "clone detach gather index_select flip roll masked_fill chunk split unbind t"
)
BITWISE = (ast.BitAnd, ast.BitOr, ast.BitXor, ast.LShift, ast.RShift)
INT_CALLS = frozenset({"len", "int", "ord", "hash", "id", "isinstance", "issubclass", "hasattr", "callable", "range"})
PLAIN_CALLS = frozenset({"float", "str", "repr", "complex", "bytes", "format", "print", "chr"})
SAME_CALLS = frozenset({"abs", "max", "min", "sum", "round", "pow", "divmod"})
CONTAINER_CALLS = frozenset({"list", "tuple", "set", "frozenset", "sorted", "reversed", "iter", "zip", "enumerate"})
TORCH_INT = _words(
    "Size is_tensor is_grad_enabled is_floating_point is_complex is_autocast_enabled numel broadcast_shapes "
    "is_inference_mode_enabled is_compiling is_exporting is_scripting is_tracing equal allclose"
)
TORCH_PLAIN = _words("finfo iinfo device get_default_dtype promote_types result_type manual_seed")
TORCH_DISCRETE = _words(
    "argmax argmin argsort eq ne lt le gt ge isnan isinf isfinite logical_not logical_and logical_or logical_xor "
    "nonzero bincount randint randperm searchsorted bucketize multinomial"
)
TORCH_FACTORIES = _words("zeros ones full empty arange tensor as_tensor zeros_like ones_like full_like")
INT_MATH = frozenset({"ceil", "floor", "gcd", "lcm", "isqrt", "trunc", "comb", "perm", "factorial", "isnan", "isinf"})
