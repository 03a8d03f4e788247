"""Converting takes little more memory than the model has, and a model larger than memory converts all the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calibrated import outputs
from safetensors.torch import save_file

import fastforward as ff

nn = torch.nn
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

# In a process of its own: what it allocates before the measurement is given back to nobody else.
PEAK = """
import sys, torch
import fastforward as ff
import fastforward.integer.conversion, fastforward.nn.layers
from fastforward.integer import sharded
torch.set_num_threads(1)

def megabytes(key):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024

def quantizer(bits, granularity, low):
    made = ff.nn.LinearQuantizer(bits, symmetric=True, allow_one_sided=False, granularity=granularity)
    made.quantization_range = (low, -low)
    return made

def model(kind):
    # Larger than what glibc keeps for itself when it is freed.
    layers = [ff.nn.QuantizedLinear(4096, 2560, bias=False) for _ in range(3)]
    for layer in layers:
        grouped = kind == "int4"
        low = torch.full((2560, 32) if grouped else (2560,), -0.03)
        layer.weight_quantizer = quantizer(4 if grouped else 8, ff.PerGroup(128) if grouped else ff.PerChannel(0), low)
        if kind == "static":
            layer.input_quantizer = quantizer(8, ff.PerTensor(), torch.tensor(-1.0))
    return torch.nn.Sequential(*layers)

warm_up = ff.nn.QuantizedLinear(16, 16)
warm_up.weight_quantizer = quantizer(8, ff.PerChannel(0), torch.full((16,), -1.0))
ff.convert(torch.nn.Sequential(warm_up))
for kind in ("static", "int8", "int4"):
    made = model(kind)
    open("/proc/self/clear_refs", "w").write("5")
    before = megabytes("VmRSS")
    ff.convert(made)
    assert all(layer.holds_integers for layer in made)
    print(kind, megabytes("VmHWM") - before, megabytes("VmRSS") - before)
"""

SHARDS = """
import resource, sys, torch
import fastforward as ff
from fastforward.integer import convert_shards
torch.set_num_threads(1)

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(2048, 2048) for _ in range(10))

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x

with torch.device("meta"):
    model, other = Net(), Net()
convert_shards(other, sys.argv[1], scheme="w8")  # imports what it needs
del other
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + int(sys.argv[2]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    torch.nn.Sequential(*(torch.nn.Linear(2048, 2048) for _ in range(10)))
    sys.exit("the float model fits into the limit")
except RuntimeError as error:
    assert "memory" in str(error)
convert_shards(model, sys.argv[1], scheme="w8")
print(tuple(model(torch.ones(1, 2048)).shape))
"""


def _run(script: str, *arguments: object) -> list[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    # What is freed is to leave the process at once: how much glibc keeps otherwise differs from run to run.
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "131072"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@linux
def test_the_peak_is_the_model_and_its_largest_layer() -> None:
    layer = 4096 * 2560 * 4 / 2**20
    lines = [line.split() for line in _run(PEAK)]
    assert [kind for kind, *_ in lines] == ["static", "int8", "int4"]
    for kind, peak, after in lines:
        # 6 MB for the interpreter's own ups and downs.
        assert float(peak) <= layer + 6, f"{kind}: {peak} MB above the model"
        assert float(after) <= -3 * layer * (0.75 if kind == "int4" else 0.65), f"{kind}: {after} MB"


def _checkpoint(path: Path, tensors: dict[str, torch.Tensor], per_file: int) -> Path:
    names = list(tensors)
    files = [names[start : start + per_file] for start in range(0, len(names), per_file)]
    weight_map = {}
    for number, part in enumerate(files):
        save_file({name: tensors[name].contiguous() for name in part}, path / f"model-{number}.safetensors")
        weight_map.update(dict.fromkeys(part, f"model-{number}.safetensors"))
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


@linux
def test_a_model_larger_than_memory_converts(tmp_path: Path) -> None:
    shapes = {"weight": (2048, 2048), "bias": (2048,)}
    tensors = {f"layers.{i}.{name}": torch.zeros(shape) for i in range(10) for name, shape in shapes.items()}
    # 160 MB of floats, 40 MB of integers; a file of 16 MB is mapped at a time.
    assert _run(SHARDS, _checkpoint(tmp_path, tensors, 2), 120) == ["(1, 2048)"]


class Net(nn.Module):
    """Tied tables, a norm, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 32)
        self.norm = nn.BatchNorm1d(32)
        self.hidden = nn.Linear(32, 64)
        self.out = nn.Linear(64, 32)
        self.head = nn.Linear(32, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.table(tokens))
        return self.head(x + self.out(torch.relu(self.hidden(x))))


def _float() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def _meta() -> Net:
    with torch.device("meta"):
        return Net().eval()


@pytest.mark.parametrize("scheme", ["w8", "w8a8_dynamic"])
@pytest.mark.parametrize("where", ["directory", "index", "file"])
def test_shards_give_what_the_whole_model_gives(where: str, scheme: str, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in _float().state_dict().items() if name != "head.weight"}
    path = _checkpoint(tmp_path, tensors, 3)
    if where == "index":
        path = path / "model.safetensors.index.json"
    elif where == "file":
        path = path / "whole.safetensors"
        save_file(tensors, path)
    tokens = torch.randint(0, 20, (6,))
    whole = ff.quantize_model(_float())
    ff.schemes.get(scheme).apply(whole)
    with ff.estimate_ranges(whole, ff.observers.MinMax), torch.no_grad():
        whole(tokens)
    expected = outputs(ff.convert(whole), tokens)
    model = ff.integer.convert_shards(_meta(), path, scheme=scheme)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert torch.equal(outputs(model, tokens), expected)
    assert {link.path for link in ff.integer.explain(model).integer} >= {"table", "hidden", "out", "head"}


def test_what_is_missing_is_named_and_nothing_changes(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in _float().state_dict().items() if not name.startswith("out")}
    model = _meta()
    with pytest.raises(ff.exceptions.StateError, match=r"lacks 2 tensors.*out\.weight"):
        ff.integer.convert_shards(model, _checkpoint(tmp_path, {k: v.clone() for k, v in tensors.items()}, 2))
    assert type(model.hidden) is nn.Linear


def test_static_activations_are_refused(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path, {k: v.clone() for k, v in _float().state_dict().items()}, 99)
    with pytest.raises(ValueError, match="take data to find"):
        ff.integer.convert_shards(_meta(), path, scheme="w8a8")


def test_a_damaged_or_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ff.exceptions.StateError, match="no .safetensors"):
        ff.integer.convert_shards(_meta(), tmp_path)
    with pytest.raises(ff.exceptions.StateError, match="does not exist"):
        ff.integer.convert_shards(_meta(), tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ff.exceptions.StateError, match="cannot be read"):
        ff.integer.convert_shards(_meta(), tmp_path)
