"""What people do with a module goes on working with its companion: copying, saving, compiling, exporting, tracing."""

import copy
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion as Version

import fastforward as ff
from fastforward.exceptions import QuantizationError
from fastforward.nn.module import QuantizedModule
from tests.autoquant.companion_models import Meta, Net, Shared, Slotted


def _quantized(model: nn.Module, *inputs: torch.Tensor) -> nn.Module:
    return ff.quantize(model.eval(), [ff.Call(inputs, {})], progress=False)


def _x() -> torch.Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["stubs", "live"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    """A rewritten model, with stubs or calibrated."""
    return ff.quantize_model(Net()).eval() if request.param == "stubs" else _quantized(Net(), _x())


def test_deepcopy_is_independent(model: nn.Module) -> None:
    expected = model(_x())
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    assert torch.equal(twin(_x()), expected)
    with torch.no_grad():
        twin.weight.zero_()
    assert torch.equal(model(_x()), expected)


def test_pickle_and_torch_save(model: nn.Module) -> None:
    expected = model(_x())
    assert torch.equal(pickle.loads(pickle.dumps(model))(_x()), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, QuantizedModule)
    assert torch.equal(loaded(_x()), expected)


def test_loading_in_a_fresh_process(model: nn.Module, tmp_path: Path) -> None:
    torch.save((model, _x(), model(_x())), tmp_path / "model.pt")
    code = (
        f"import torch; model, x, expected = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False); "
        "assert torch.equal(model(x), expected); print(len(list(model.named_quantizers(skip_stubs=False))))"
    )
    environment_path = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "kernels")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {environment_path!r}; {code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_torch_compile_fullgraph(model: nn.Module) -> None:
    torch._dynamo.reset()
    expected = model(_x())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(_x()), expected)


def chosen_by(places: torch.Tensor):
    def choose(x):
        return x[places]

    return choose


def scaled_by(factor):
    return lambda x: x * factor


def doubled(x):
    return x * 2


def squared(x):
    return x * x


@torch.jit.script
def scripted(x):
    return x + 1


class Square(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x * x

    @staticmethod
    def backward(context, gradient):
        return gradient


class Squaring(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Square.apply(x)


def test_calling_again_remembers_nothing_more() -> None:
    model = ff.quantize_model(Squaring())
    sizes = []
    for _ in range(3):
        model(torch.ones(2))
        sizes.append([len(known) for known in model.__dict__["_ff_scopes"]["forward"].memo.values()])
    assert sizes == [[1]] * 3


class Base(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 3


class Callables(Base):
    """Calls at one place: functions of one list, operators, a closure that is another in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = [doubled, torch.tanh, squared, torch.sigmoid, torch.Tensor.exp]

    def forward(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        for step in self.steps:
            x = step(x)
        for step in (doubled, chosen_by(places)):
            x = step(x)
        for step in (self.halved,):
            x = step(x)
        return super().forward(scripted(x))

    def halved(self, x):
        return x / 2


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("eager_first", [False, True])
def test_a_compiled_model_calls_what_it_is_given_not_what_stood_there_before(live: bool, eager_first: bool) -> None:
    if live and Version(torch.__version__) < Version("2.14"):
        pytest.skip("older compilers cannot tell the name of a closure, and raise")
    torch._dynamo.reset()
    inputs = [(torch.randn(4), torch.tensor(places)) for places in ([0, 1, 3], [2, 2, 0])]
    model = ff.quantize_model(Callables())
    if eager_first or live:
        model(*inputs[0])
    if live:
        for name in model.own_quantizers():
            setattr(model, name, Scaled())
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    for x, places in inputs:
        assert torch.equal(compiled(x, places), model(x, places))
        assert live != torch.equal(model(x, places), Callables()(x, places))


def test_what_goes_on_by_itself_after_a_graph_break_looks_for_callees_again() -> None:
    model = ff.quantize_model(Callables())
    scope = model.__dict__["_ff_scopes"]["forward"]
    met = scaled_by(2)
    scope.compiled.callee(0, met)(torch.ones(2))
    assert [callee for _, callee, *_ in scope.memo[0]] == [met]


class Scaled(ff.nn.Quantizer):
    def simulate(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1.01


def test_compiling_refuses_a_callee_that_no_eager_run_has_met_where_quantizers_stand() -> None:
    torch._dynamo.reset()
    model = ff.quantize_model(Callables())
    model.steps = [scaled_by(2)]
    model(torch.ones(2), torch.tensor([1, 0]))
    for name in model.own_quantizers():
        setattr(model, name, Scaled())
    model.steps = [scaled_by(3)]
    with pytest.raises(Exception, match="run the model once before compiling"):
        torch.compile(model, fullgraph=True, backend="eager")(torch.ones(2), torch.tensor([1, 0]))


class Scaling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Square.apply(x) + 1


def test_an_autograd_function_is_compiled_with_the_quantizer_of_its_result() -> None:
    torch._dynamo.reset()
    model = ff.quantize_model(Scaling())
    model(torch.ones(3))
    for name in model.own_quantizers():
        setattr(model, name, Scaled())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.arange(3.0)), model(torch.arange(3.0)))


PRODUCTS = {"matmul": torch.matmul}


class ByName(nn.Module):
    """Only a run shows which operator is called."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return PRODUCTS["matmul"](x, x)


def test_compiling_refuses_a_loaded_model_whose_quantizers_no_run_has_put_in_place(tmp_path: Path) -> None:
    torch._dynamo.reset()
    x = torch.randn(3, 3)
    model = ff.quantize(ByName(), [x], progress=False)
    ff.save_quantization(model, tmp_path / "state")
    loaded = ByName()
    ff.load_quantization(loaded, tmp_path / "state")
    with pytest.raises(Exception, match="run the model once before compiling"):
        torch.compile(loaded, fullgraph=True, backend="eager")(x)
    assert torch.equal(loaded(x), model(x))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(loaded, fullgraph=True, backend="eager")(x), model(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_compiling_refuses_a_copy_whose_quantizers_no_run_of_its_own_has_found(
    duplicate: Callable[[nn.Module], nn.Module],
) -> None:
    torch._dynamo.reset()
    x = torch.randn(3, 3)
    model = ff.quantize(ByName(), [x], progress=False)
    copied = duplicate(model)
    with pytest.raises(Exception, match="run the model once before compiling"):
        torch.compile(copied, fullgraph=True, backend="eager")(x)
    assert torch.equal(copied(x), model(x))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(copied, fullgraph=True, backend="eager")(x), model(x))


def test_torch_export(model: nn.Module) -> None:
    expected = model(_x())
    program = torch.export.export(model, (_x(),))
    torch.testing.assert_close(program.module()(_x()), expected)


def test_symbolic_trace() -> None:
    model = ff.quantize_model(Net()).eval()
    expected = model(_x())
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(_x()), expected)


def test_scripting_is_refused(model: nn.Module) -> None:
    with pytest.raises(QuantizationError, match="torch.compile or torch.export"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(model)


def test_dequantize_gives_the_float_model_back(model: nn.Module) -> None:
    ff.dequantize_model(model)
    plain = Net().eval()
    plain.load_state_dict(model.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert model.__dict__.keys() == plain.__dict__.keys()
    assert torch.equal(model(_x()), plain(_x()))


def test_a_float_checkpoint_loads_into_a_quantized_model() -> None:
    torch.manual_seed(5)
    checkpoint = Net().state_dict()
    model = ff.quantize_model(Net()).eval()
    assert model.state_dict().keys() == checkpoint.keys()
    model.load_state_dict(checkpoint)
    live = _quantized(Net(), _x())
    result = live.load_state_dict(checkpoint, strict=False)
    assert not result.unexpected_keys
    assert all("quantizer" in key for key in result.missing_keys)
    assert torch.equal(live.weight, checkpoint["weight"])


@pytest.mark.parametrize("build", [Slotted, Meta, Shared])
def test_unusual_classes(build: Any) -> None:
    torch.manual_seed(0)
    plain = build().eval()
    model = ff.quantize_model(copy.deepcopy(plain))
    assert isinstance(model, build)
    assert type(type(model)) is type(build)
    assert torch.equal(model(_x()), plain(_x()))
    assert model(_x()).isfinite().all()


def test_a_shared_module_is_swapped_once() -> None:
    model = ff.quantize_model(Shared())
    assert model.first is model.second
    assert model.state_dict().keys() == Shared().state_dict().keys()


@pytest.mark.parametrize(
    "parametrize",
    [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm],
)
def test_parametrized_modules(parametrize: Any) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(parametrize(nn.Linear(8, 8)), nn.ReLU())

    plain, model = build(), ff.quantize_model(build())
    assert torch.equal(model(_x()), plain(_x()))
    live = _quantized(build(), _x())
    assert {row.mode for row in ff.coverage(live, _x()).rows if row.operator == "linear"} == {"simulated"}


def _train(rank: int, world: int, file: str, results: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    model = ff.quantize_model(Net())
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped(_x() + rank).sum().backward()
    results[rank] = model.weight.grad.clone()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path: Path) -> None:
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_train, args=(2, str(tmp_path / "store"), results), nprocs=2)
        gradients = dict(results)
    expected = Net()
    ((expected(_x()).sum() + expected(_x() + 1).sum()) / 2).backward()
    torch.testing.assert_close(gradients[0], expected.weight.grad)
    assert torch.equal(gradients[0], gradients[1])
