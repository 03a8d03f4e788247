"""What every operator owes the rest of torch: opcheck, compile, export, and working without Triton."""

import subprocess
import sys

import fastforward_kernels as ffk
import fastforward_kernels.ops_chain  # noqa: F401  (operators of compiled programs, defined with the integer layers)
import pytest
import torch
from fastforward_kernels.library import NAMESPACE

OPS = getattr(torch.ops, NAMESPACE)
SCALE, ZERO = torch.tensor(0.1), torch.tensor(3, dtype=torch.int32)
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
Q = torch.randint(-128, 128, (4, 8), dtype=torch.int8)
U = (Q ^ -128).view(torch.uint8)
STEPS = (SCALE, SCALE.reciprocal(), ZERO)
W = torch.randint(-128, 128, (6, 8), dtype=torch.int8)
PACKED = ffk.pack_linear_weight(W, torch.rand(6))
CONV = ffk.pack_conv_weight(torch.randint(-128, 128, (6, 8, 3, 3), dtype=torch.int8), torch.rand(6))
IMAGE = torch.randint(-128, 128, (2, 8, 5, 5), dtype=torch.int8)
KERNEL = torch.randint(-127, 128, (6, 8, 3, 3), dtype=torch.int8)
ADDEND = torch.randint(0, 256, (2, 6, 5, 5), dtype=torch.uint8)
GRID = (SCALE, ZERO, -8, 7)
NO_OUT = (torch.float32, None, None)
OUT = (torch.int8, SCALE, ZERO)
F8 = torch.float8_e4m3fn


def leaf():
    return X.clone().requires_grad_()


def calls():
    """One call or more of every operator: name -> list of argument tuples."""
    four = ffk.pack_weight_only(W.clamp(-8, 7), torch.rand(6, 2), bits=4, group_size=4)
    return {
        "fake_quantize": [
            (leaf(), *GRID, []),
            (leaf(), torch.rand(4).requires_grad_(), torch.zeros(4), -8, 7, [1, -1], 0.5),
        ],
        "fake_quantize_backward": [(X, X, *GRID, [])],
        "fake_quantize_lsq_backward": [(X, X, *GRID, [])],
        "fake_quantize_with_mask": [(leaf(), *GRID, [])],
        "zero_clipped": [(X, X > 0), (X, (X.t() > 0).t()), (X, X.round())],
        "apply_mask": [(X, torch.full((4,), 0b1010, dtype=torch.uint8))],
        "fake_quantize_out": [(X, *GRID, [], torch.empty_like(X))],
        "fake_quantize_float8": [(leaf(), SCALE, F8, [])],
        "quantize_float8": [(X, SCALE, F8, [])],
        "quantize": [(X, *GRID, torch.int8, []), (X.t(), *GRID, torch.int16, [])],
        "dequantize": [(Q, SCALE, ZERO, [], torch.bfloat16), (Q, torch.rand(4), None, [1, -1], torch.float32)],
        "min_max": [(X, []), (X, [1, 4])],
        "histogram": [(X, -1.0, 1.0, 16)],
        "int8_linear": [
            (Q, SCALE, ZERO, *PACKED, None, None, "relu", *NO_OUT),
            (Q, SCALE, None, *PACKED, torch.rand(6), None, "none", *OUT),
        ],
        "int8_linear_quantizing": [
            (X, SCALE, ZERO, -128, 127, *PACKED, None, None, "gelu", torch.bfloat16, None, None)
        ],
        "int8_matmul": [(Q[None], SCALE, ZERO, W.t()[None], SCALE, ZERO, *NO_OUT)],
        "int8_conv": [(IMAGE, SCALE, ZERO, *CONV, None, None, [2, 2], [1, 1], [1, 1], 1, "relu", *OUT)],
        "float8_linear": [(X.to(F8), SCALE, X.to(F8), SCALE, None, torch.float32)],
        "weight_only_linear": [(leaf(), *four, None)],
        "int4_linear": [
            (
                X[:2, :1].repeat(1, 32).bfloat16(),
                torch.arange(64 * 16).view(64, 16).byte(),
                32,
                torch.rand(1, 64, 2).bfloat16(),
            )
        ],
        "int8_embedding": [(torch.tensor([1, 2]), Q, SCALE, ZERO, *OUT)],
        "int8_lookup": [(Q, torch.rand(256))],
        "int8_add": [(Q, SCALE, ZERO, Q[0], SCALE, ZERO, "relu", *OUT)],
        "int8_mul": [(Q, SCALE, ZERO, Q, SCALE, ZERO, *NO_OUT)],
        "int8_concat": [([Q, W], torch.rand(2), torch.zeros(2, dtype=torch.int32), 0, *OUT)],
        "int8_max_pool2d": [(IMAGE, [3, 3], [2, 2], [1, 1])],
        "int8_avg_pool2d": [(IMAGE, SCALE, ZERO, [3, 3], [2, 2], [1, 1], *OUT)],
        "int8_layer_norm": [(Q, SCALE, ZERO, torch.rand(8), torch.rand(8), 1e-5, *OUT)],
        "int8_rms_norm": [(Q, SCALE, ZERO, torch.rand(8), 1e-5, *OUT)],
        "int8_softmax": [(Q, SCALE, *OUT)],
        "round_to_codes": [(X, *STEPS, 255, []), (X.t(), *STEPS, 100, [0.1, 3.0])],
        "round_to_grid": [(X, *STEPS, 255)],
        "linear_to_floats": [(U, W, torch.rand(6), torch.rand(6), "gelu")],
        "linear_to_codes": [
            (U, W, torch.rand(6), torch.rand(6), "relu", None, *STEPS, 255),
            (U, W, torch.rand(6), torch.rand(6), "gelu", torch.rand(6), *STEPS, 63),
        ],
        "weight_of_integers": [(W, torch.rand(6, 1)), (W, torch.rand(1, 1))],
        "integers_of": [(W.float(),)],
        "channel_sums": [(W,), (W, 0)],
        "channels_inside": [(IMAGE, [0, 0], 0), (IMAGE, [1, 2], 7)],
        "adds_codes": [(IMAGE.float(), KERNEL)],
        "convolution_plus_codes": [
            (
                IMAGE.view(torch.uint8),
                KERNEL,
                0.1,
                torch.rand(6),
                bias,
                *[[1, 1]] * 3,
                1,
                "relu",
                ADDEND,
                0.1,
                3,
                0.2,
                0,
                255,
            )
            for bias in (None, torch.rand(6))
        ],
        "attention_of_integers": [(*[IMAGE.float()] * 3, SCALE, SCALE, None, False, 0.01)],
    }


def defined():
    names = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    return {operator for namespace, _, operator in names if namespace == NAMESPACE}


def test_every_operator_has_a_case():
    assert {name for name in defined() if name in dir(OPS)} <= set(calls())


@pytest.mark.parametrize("name", list(calls()))
def test_opcheck(name):
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if name == "float8_linear":
        checks = checks[1:3]  # the other checks multiply every input by a number, which float8 tensors cannot do
    for arguments in calls()[name]:
        torch.library.opcheck(getattr(OPS, name).default, arguments, test_utils=checks)


class Program(torch.nn.Module):
    def forward(self, x):
        y = ffk.fake_quantize(x, torch.full((4,), 0.1), torch.zeros(4, dtype=torch.int32), -8, 7, axis=0)
        q = ffk.quantize(y, SCALE, ZERO, -128, 127, torch.int8)
        return (
            ffk.int8_linear(q, SCALE, ZERO, PACKED, activation="relu") + ffk.fake_quantize_float8(y, SCALE, F8)[:, :6]
        )


@pytest.mark.slow
def test_compiles_into_one_graph_forward_and_backward():
    torch._dynamo.reset()
    compiled = torch.compile(Program(), fullgraph=True, backend="aot_eager")
    ours, theirs = leaf(), leaf()
    compiled(ours).square().sum().backward()
    Program()(theirs).square().sum().backward()
    assert torch.equal(compiled(X), Program()(X))
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.slow
def test_export_keeps_each_operator_one_node():
    exported = torch.export.export(Program(), (X,), strict=False)
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    kernels = [target.split(".")[1] for target in targets if target.startswith(NAMESPACE)]
    assert kernels == ["fake_quantize", "quantize", "int8_linear", "fake_quantize_float8"]
    assert torch.equal(exported.module()(X), Program()(X))


def run_python(program):
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


USE = """
import torch, fastforward_kernels as ffk
x = torch.randn(8, 8, requires_grad=True)
ffk.fake_quantize(x, torch.tensor(0.1), torch.tensor(0, dtype=torch.int32), -8, 7).sum().backward()
packed = ffk.pack_linear_weight(torch.ones(8, 8, dtype=torch.int8), torch.ones(8))
ffk.int8_linear(x.detach(), torch.tensor(0.1), torch.tensor(0, dtype=torch.int32), packed)
"""


def test_triton_is_not_imported_on_a_cpu():
    assert run_python(f"import sys{USE}print('triton' in sys.modules)") == "False"


def test_everything_works_with_triton_blocked():
    blocked = "import sys; sys.modules['triton'] = None"
    check = "from fastforward_kernels.library import has_triton; print(has_triton())"
    assert run_python(f"{blocked}{USE}{check}") == "False"


def test_other_devices_get_the_reference():
    y = ffk.fake_quantize(X.to("meta"), SCALE.to("meta"), ZERO.to("meta"), -8, 7)
    assert y.is_meta and y.shape == X.shape


def test_operators_are_defined_when_the_first_is_used():
    program = (
        "import sys, fastforward_kernels as ffk; print('ops' in vars(ffk), callable(ffk.quantize), 'ops' in vars(ffk))"
    )
    assert run_python(program) == "False True True"
