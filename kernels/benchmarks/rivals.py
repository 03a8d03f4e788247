"""Other ways to make a model fast on a CPU, each used only if it is installed.

A rival is a function from a float model and its inputs to a callable of the same inputs; it may raise, and is then
left out of the table with a line on stderr.
"""

import copy
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Run = Callable[[Any], Any]


def call(model: Any, inputs: Any) -> Any:
    """Call with a tuple of positional or a dict of keyword arguments."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def bf16(model: torch.nn.Module, inputs: Any) -> Run:
    """The model in bfloat16."""
    half = copy.deepcopy(model).to(torch.bfloat16)

    def cast(x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.bfloat16) if x.is_floating_point() else x

    def run(given: Any) -> Any:
        if isinstance(given, dict):
            return half(**{name: cast(x) for name, x in given.items()})
        return half(*(cast(x) for x in given))

    return run


def compiled(model: torch.nn.Module, inputs: Any) -> Run:
    """The float model under ``torch.compile``."""
    fast = torch.compile(copy.deepcopy(model))
    return lambda given: call(fast, given)


def fx(backend: str) -> Callable[[torch.nn.Module, Any], Run]:
    """torch.ao's FX graph mode with one of its back ends."""

    def prepare(model: torch.nn.Module, inputs: Any) -> Run:
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

        torch.backends.quantized.engine = backend
        example = tuple(inputs.values()) if isinstance(inputs, dict) else inputs
        prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(backend), example)
        call(prepared, inputs)
        integer = convert_fx(prepared)
        return lambda given: call(integer, given)

    return prepare


def pt2e(model: torch.nn.Module, inputs: Any) -> Run:
    """PyTorch 2 export quantization with the x86 quantizer, compiled by Inductor, once per batch size."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torch._inductor import config
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    made: dict[Any, Any] = {}

    def prepared(given: Any) -> Any:
        args, kwargs = ((), given) if isinstance(given, dict) else (given, {})
        # Not strict, modules that are called twice are one partition, which the quantizer refuses.
        exported = torch.export.export(copy.deepcopy(model), args, kwargs, strict=True).module()
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        observed = prepare_pt2e(exported, quantizer)
        call(observed, given)
        return torch.compile(convert_pt2e(observed))

    def run(given: Any) -> Any:
        first = next(iter(given.values())) if isinstance(given, dict) else given[0]
        if first.shape not in made:
            made[first.shape] = prepared(given)
        with config.patch(freezing=True):
            return call(made[first.shape], given)

    return run


def torchao_dynamic(model: torch.nn.Module, inputs: Any) -> Run:
    """torchao's dynamic int8 linear layers, compiled."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    integer = copy.deepcopy(model)
    quantize_(integer, Int8DynamicActivationInt8WeightConfig())
    fast = torch.compile(integer)
    return lambda given: call(fast, given)


def quanto(model: torch.nn.Module, inputs: Any) -> Run:
    """optimum-quanto: int8 weights and activations."""
    from optimum.quanto import Calibration, freeze, qint8, quantize

    integer = copy.deepcopy(model)
    quantize(integer, weights=qint8, activations=qint8)
    with Calibration():
        call(integer, inputs)
    freeze(integer)
    return lambda given: call(integer, given)


def onnxruntime_qdq(model: torch.nn.Module, inputs: Any) -> Run:
    """ONNX Runtime with static quantize-dequantize nodes."""
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    names = list(inputs) if isinstance(inputs, dict) else [f"input{i}" for i in range(len(inputs))]

    def feed(given: Any) -> dict[str, Any]:
        values = given.values() if isinstance(given, dict) else given
        return {name: value.numpy() for name, value in zip(names, values, strict=True)}

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [feed(inputs)]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    folder = Path(tempfile.mkdtemp())
    args = tuple(inputs.values()) if isinstance(inputs, dict) else inputs
    axes = {name: {0: "batch"} for name in names}
    torch.onnx.export(model, args, str(folder / "float.onnx"), input_names=names, dynamic_axes=axes, dynamo=False)
    quantize_static(folder / "float.onnx", folder / "int8.onnx", Reader(), QuantFormat.QDQ, per_channel=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(str(folder / "int8.onnx"), options)
    return lambda given: torch.from_numpy(session.run(None, feed(given))[0])


def openvino_int8(model: torch.nn.Module, inputs: Any) -> Run:
    """OpenVINO with NNCF's post-training quantization."""
    import nncf
    import openvino as ov

    example = dict(inputs) if isinstance(inputs, dict) else inputs
    float_model = ov.convert_model(model, example_input=example)
    data = nncf.Dataset([inputs if isinstance(inputs, dict) else tuple(x.numpy() for x in inputs)])
    kind = nncf.ModelType.TRANSFORMER if isinstance(inputs, dict) else None
    integer = nncf.quantize(float_model, data, model_type=kind)
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    fast = ov.Core().compile_model(integer, "CPU", options)

    def run(given: Any) -> torch.Tensor:
        values = (
            {name: x.numpy() for name, x in given.items()} if isinstance(given, dict) else [x.numpy() for x in given]
        )
        return torch.from_numpy(fast(values)[0])

    return run


RIVALS: dict[str, tuple[Callable[[torch.nn.Module, Any], Run], tuple[str, ...]]] = {
    "bf16": (bf16, ()),
    "float compiled": (compiled, ()),
    "torch.ao FX x86": (fx("x86"), ()),
    "torch.ao FX onednn": (fx("onednn"), ()),
    "PT2E, compiled": (pt2e, ("torchao",)),
    "torchao dynamic, compiled": (torchao_dynamic, ("torchao",)),
    "quanto": (quanto, ("optimum.quanto",)),
    "ONNX Runtime QDQ": (onnxruntime_qdq, ("onnxruntime", "onnx")),
    "OpenVINO / NNCF": (openvino_int8, ("openvino", "nncf")),
}


def installed(packages: tuple[str, ...]) -> bool:
    """Whether all packages can be imported."""
    try:
        return all(importlib.util.find_spec(package) is not None for package in packages)
    except ModuleNotFoundError:
        return False
