"""Static quantization with observers: calibrate, fix the ranges, run integers.

The walk-through of torchao's static quantization tutorial, in int8 and in float8, with modules of our own, with plain
`nn.Linear`s whose weight is swapped, and beside it the same in one call. Takes about ten seconds on a CPU.
"""

# The tutorial's code stands as it was written there.
# ruff: noqa: ANN001, ANN201, ANN202, ANN204, ANN206, D205, E731

import argparse
import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import fastforward as ff
from fastforward.calibration.observers import AffineQuantizedMinMaxObserver
from fastforward.quantization import (
    MappingType,
    PerAxis,
    PerTensor,
    to_affine_quantized_floatx_static,
    to_affine_quantized_intx_static,
    to_linear_activation_quantized,
)
from fastforward.selection.module_configs import (
    AOBaseConfig,
    _replace_with_custom_fn_if_matches_filter,
    quantize_,
    register_quantize_module_handler,
)


class ToyLinearModel(torch.nn.Module):
    def __init__(self, m=64, n=32, k=64):
        super().__init__()
        self.linear1 = torch.nn.Linear(m, k, bias=False)
        self.linear2 = torch.nn.Linear(k, n, bias=False)

    def example_inputs(self, batch_size=1, dtype=torch.float32, device="cpu"):
        return (torch.randn(batch_size, self.linear1.in_features, dtype=dtype, device=device),)

    def forward(self, x):
        x = self.linear1(x)
        x = self.linear2(x)
        return x


class ObservedLinear(torch.nn.Linear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        act_obs: torch.nn.Module,
        weight_obs: torch.nn.Module,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.act_obs = act_obs
        self.weight_obs = weight_obs

    def forward(self, input: torch.Tensor):
        observed_input = self.act_obs(input)
        observed_weight = self.weight_obs(self.weight)
        return F.linear(observed_input, observed_weight, self.bias)

    @classmethod
    def from_float(cls, float_linear, act_obs, weight_obs):
        observed_linear = cls(
            float_linear.in_features,
            float_linear.out_features,
            act_obs,
            weight_obs,
            False,
            device=float_linear.weight.device,
            dtype=float_linear.weight.dtype,
        )
        observed_linear.weight = float_linear.weight
        observed_linear.bias = float_linear.bias
        return observed_linear


def insert_observers_(model, act_obs, weight_obs):
    _is_linear = lambda m, fqn: isinstance(m, torch.nn.Linear)

    def replacement_fn(m):
        copied_act_obs = copy.deepcopy(act_obs)
        copied_weight_obs = copy.deepcopy(weight_obs)
        return ObservedLinear.from_float(m, copied_act_obs, copied_weight_obs)

    _replace_with_custom_fn_if_matches_filter(model, replacement_fn, _is_linear)


class QuantizedLinear(torch.nn.Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        act_obs: torch.nn.Module,
        weight_obs: torch.nn.Module,
        weight: torch.Tensor,
        bias: torch.Tensor,
        target_dtype: torch.dtype,
    ):
        super().__init__()
        self.act_scale, self.act_zero_point = act_obs.calculate_qparams()
        weight_scale, weight_zero_point = weight_obs.calculate_qparams()
        assert weight.dim() == 2
        block_size = (1, weight.shape[1])
        self.target_dtype = target_dtype
        self.bias = bias
        if target_dtype.is_floating_point:
            self.qweight = to_affine_quantized_floatx_static(weight, weight_scale, block_size, target_dtype)
        else:
            self.qweight = to_affine_quantized_intx_static(
                weight, weight_scale, weight_zero_point, block_size, self.target_dtype
            )

    def forward(self, input: torch.Tensor):
        block_size = input.shape
        if self.target_dtype.is_floating_point:
            qinput = to_affine_quantized_floatx_static(input, self.act_scale, block_size, self.target_dtype)
        else:
            qinput = to_affine_quantized_intx_static(
                input,
                self.act_scale,
                self.act_zero_point,
                block_size,
                self.target_dtype,
            )
        return F.linear(qinput, self.qweight, self.bias)

    @classmethod
    def from_observed(cls, observed_linear, target_dtype):
        quantized_linear = cls(
            observed_linear.in_features,
            observed_linear.out_features,
            observed_linear.act_obs,
            observed_linear.weight_obs,
            observed_linear.weight,
            observed_linear.bias,
            target_dtype,
        )
        return quantized_linear


@dataclass
class StaticQuantConfig(AOBaseConfig):
    target_dtype: torch.dtype


@register_quantize_module_handler(StaticQuantConfig)
def _apply_static_quant(
    module: torch.nn.Module,
    config: StaticQuantConfig,
):
    """Define a transformation associated with `StaticQuantConfig`.
    This is called by `quantize_`, not by the user directly.
    """
    return QuantizedLinear.from_observed(module, config.target_dtype)


# alternative for converting observed linear modules to quantized modules: keep nn.Linear, swap its weight
@dataclass
class StaticQuantWeightConfig(AOBaseConfig):
    target_dtype: torch.dtype


def input_quant_func(input, scale, zero_point, target_dtype):
    """Quantize the input of a linear layer with a fixed scale."""
    if target_dtype.is_floating_point:
        return to_affine_quantized_floatx_static(input, scale, input.shape, target_dtype)
    return to_affine_quantized_intx_static(input, scale, zero_point, input.shape, target_dtype)


@register_quantize_module_handler(StaticQuantWeightConfig)
def _apply_static_weight_quant(
    module: torch.nn.Module,
    config: StaticQuantWeightConfig,
):
    act_scale, act_zero_point = module.act_obs.calculate_qparams()
    weight_scale, weight_zero_point = module.weight_obs.calculate_qparams()
    block_size = (1, module.weight.shape[1])
    target_dtype = config.target_dtype
    if target_dtype.is_floating_point:
        weight = to_affine_quantized_floatx_static(module.weight, weight_scale, block_size, target_dtype)
    else:
        weight = to_affine_quantized_intx_static(
            module.weight, weight_scale, weight_zero_point, block_size, target_dtype
        )
    linear = torch.nn.Linear(module.in_features, module.out_features, False, device="meta")
    linear.weight = torch.nn.Parameter(
        to_linear_activation_quantized(
            weight, input_quant_func, {"scale": act_scale, "zero_point": act_zero_point, "target_dtype": target_dtype}
        ),
        requires_grad=False,
    )
    linear.bias = module.bias
    return linear


is_observed_linear = lambda m, fqn: isinstance(m, ObservedLinear)


def make_observers(target_dtype):
    """Observers of a target type: per tensor for activations, per channel for weights."""
    mapping_type = MappingType.SYMMETRIC if target_dtype.is_floating_point else MappingType.ASYMMETRIC
    # per tensor input activation quantization
    act_obs = AffineQuantizedMinMaxObserver(
        mapping_type,
        target_dtype,
        granularity=PerTensor(),
        eps=torch.finfo(torch.float32).eps,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.float32,
    )
    # per channel weight quantization
    weight_obs = AffineQuantizedMinMaxObserver(
        mapping_type,
        target_dtype,
        granularity=PerAxis(axis=0),
        eps=torch.finfo(torch.float32).eps,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.float32,
    )
    return act_obs, weight_obs


def run(
    dtype,
    target_dtype,
    config_type=StaticQuantConfig,
    compile_mode=None,
    seed=0,
    calibration_rows=26,
    rows=256,
    device="cpu",
):
    """Run the whole flow; return the model and its signal-to-quantization-noise ratio over `rows` rows, in dB.

    `compile_mode` compiles the model before observers are inserted, as the tutorial does. The tutorial's own ten passes
    have one row each (`calibration_rows=1`): their ranges clip a quarter of all other rows, which limits the ratio to
    25 to 35 dB whatever the number format.
    """
    torch.manual_seed(seed)
    m = ToyLinearModel().eval().to(dtype).to(device)
    m_float = copy.deepcopy(m)
    if compile_mode is not None:
        m = torch.compile(m, mode=compile_mode)
    insert_observers_(m, *make_observers(target_dtype))
    torch.manual_seed(seed)  # inserting draws numbers too; all ways are to see the same data
    for _ in range(10):
        example_inputs = m.example_inputs(calibration_rows, dtype=dtype, device=device)
        m(*example_inputs)
    quantize_(m, config_type(target_dtype), is_observed_linear)
    (x,) = m_float.example_inputs(batch_size=rows, dtype=dtype, device=device)
    with torch.no_grad():
        return m, sqnr(m_float(x), m(x))


def sqnr(reference, other):
    """Signal-to-quantization-noise ratio in dB."""
    reference, other = reference.to(torch.float32), other.to(torch.float32)
    return 20 * torch.log10(reference.norm() / (reference - other).norm()).item()


def run_in_one_call(dtype, seed=0, calibration_rows=26, rows=256, device="cpu"):
    """The same in one call: observers, ranges and integers are the library's business."""
    torch.manual_seed(seed)
    m = ToyLinearModel().eval().to(dtype).to(device)
    m_float = copy.deepcopy(m)
    torch.manual_seed(seed)
    data = [m.example_inputs(calibration_rows, dtype=dtype, device=device) for _ in range(10)]
    ff.quantize(m, data, scheme="w8a8", convert=True, progress=False)
    (x,) = m_float.example_inputs(batch_size=rows, dtype=dtype, device=device)
    with torch.no_grad():
        return m, sqnr(m_float(x), m(x))


def main():
    """Print the quantized model of the tutorial, then a table of accuracies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true", help="compile with mode='max-autotune' first")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    mode = "max-autotune" if arguments.compile else None

    m, _ = run(torch.bfloat16, torch.uint8, compile_mode=mode, device=arguments.device)
    print(m)
    print(m.linear1.act_scale)
    print(m.linear1.qweight)
    for dtype in (torch.float32, torch.bfloat16):
        for target_dtype in (torch.uint8, torch.float8_e4m3fn):
            for config_type in (StaticQuantConfig, StaticQuantWeightConfig):
                _, db = run(dtype, target_dtype, config_type, mode, device=arguments.device)
                print(f"{str(dtype):15} {str(target_dtype):20} {config_type.__name__:25} SQNR {db:.1f} dB")
        _, db = run_in_one_call(dtype, device=arguments.device)
        print(f"{str(dtype):15} {'int8':20} {'ff.quantize(...)':25} SQNR {db:.1f} dB")


if __name__ == "__main__":
    main()
