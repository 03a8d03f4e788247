"""Files of unknown origin: damaged, forged or of another kind, they raise StateError and change nothing.

The number of examples is set by FASTFORWARD_FUZZ_EXAMPLES; the loader was run over 10,000 of each kind.
"""

import json
import os
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fastforward as ff
from fastforward.exceptions import StateError
from tests.state.state_mutations import damaged, forged, join, split

EXAMPLES = int(os.environ.get("FASTFORWARD_FUZZ_EXAMPLES", "150"))
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x):
        return torch.matmul(self.linear(x), self.weight)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def content(folder):
    net = ff.quantize_model(Net())
    ff.schemes.get("w8a8").apply(net)
    with ff.estimate_ranges(net, ff.observers.MinMax):
        net(torch.randn(3, 4))
    return ff.save_quantization(net, folder / "good.safetensors").read_bytes()


def load(folder, content):
    """Load `content` into a fresh model; return the error, having checked that an error leaves the model alone."""
    path = folder / "mutated.safetensors"
    path.write_bytes(content)
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    try:
        ff.load_quantization(net, path)
    except StateError as error:
        assert type(net) is Net and type(net.linear) is nn.Linear
        assert net.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        return error
    return None


def test_the_undamaged_file_loads(folder, content):
    assert load(folder, content) is None


@FUZZ
@given(data=st.data())
def test_damaged_files_raise_state_errors_only(folder, content, data):
    mutated = data.draw(damaged(content))
    if load(folder, mutated) is None:
        (header, tensors), (good_header, good_tensors) = split(mutated), split(content)
        assert tensors == good_tensors
        assert header["__metadata__"]["fastforward"] == good_header["__metadata__"]["fastforward"]


@FUZZ
@given(data=st.data())
def test_forged_manifests_raise_state_errors_only(folder, content, data):
    load(folder, data.draw(forged(content)))


def test_every_flipped_bit_of_a_tensor_or_of_the_manifest_is_noticed(folder, content):
    _, tensors = split(content)
    start = len(content) - len(tensors)
    manifest = content.index(b"fastforward")
    places = [*range(start, len(content), 7), *range(manifest, manifest + 2000, 41), 0, 3, 7]
    for place in places:
        mutated = bytearray(content)
        mutated[place] ^= 4
        assert load(folder, bytes(mutated)) is not None, place


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, -1])
def test_truncated_files_are_refused(folder, content, length):
    assert "damaged" in str(load(folder, content[:length]))


def edited(content, change):
    """`content` with its manifest changed by a function, and signed again."""
    header, data = split(content)
    manifest = json.loads(header["__metadata__"]["fastforward"])
    change(manifest, header)
    return join(header, manifest, data)


def set_version(manifest, header):
    manifest["version"] = 2


def climb(manifest, header):
    manifest["shards"] = ["../../etc/passwd"]


def absolute(manifest, header):
    manifest["shards"] = ["/dev/zero"]


def unexpected_class(manifest, header):
    manifest["quantizers"][0]["class"] = "os.system"


def unexpected_module(manifest, header):
    manifest["quantizers"][0]["class"] = "QuantizedModule"


def unexpected_integer(manifest, header):
    manifest["integers"] = [{"path": "linear", "class": "convert", "data": {}, "tensors": {}}]


def huge_bits(manifest, header):
    manifest["quantizers"][0]["arguments"]["num_bits"] = 10**6


def hostile_argument(manifest, header):
    manifest["quantizers"][0]["arguments"]["granularity"] = {"PerGroup": {"group_size": -1}}


def unknown_argument(manifest, header):
    manifest["quantizers"][0]["arguments"]["__class__"] = 1


def other_key(manifest, header):
    manifest["parameters"]["weight"] = "nothing"


def outside(manifest, header):
    header["weight"]["data_offsets"] = [0, 1 << 60]


def overlapping(manifest, header):
    header["weight"]["data_offsets"] = header["linear.weight"]["data_offsets"]


def huge_shape(manifest, header):
    header["weight"]["shape"] = manifest["tensors"]["weight"]["shape"] = [1 << 62, 1 << 62]


def hidden_tensor(manifest, header):
    header["extra"] = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_version, "version 2 .*reads version 1"),
        (climb, "not the name of a further file"),
        (absolute, "not the name of a further file"),
        (unexpected_class, "unknown quantizer class 'os.system'"),
        (unexpected_module, "unknown quantizer class 'QuantizedModule'"),
        (unexpected_integer, "'convert', which is not a class of fastforward.integer"),
        (huge_bits, "num_bits must be between"),
        (hostile_argument, "group_size must be positive"),
        (unknown_argument, "__class__"),
        (other_key, "refers to tensor 'nothing'"),
        (outside, "outside the file"),
        (overlapping, "not the tensors that its header lists|lies outside|does not match its checksum"),
        (huge_shape, "malformed"),
        (hidden_tensor, "the files hold"),
    ],
)
def test_hostile_manifests_say_what_is_wrong(folder, content, change, reason):
    assert load(folder, edited(content, lambda manifest, header: None)) is None
    error = load(folder, edited(content, change))
    assert error is not None
    with pytest.raises(StateError, match=reason):
        raise error


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (struct.pack("<Q", 2**63) + b"{}", "header claims"),
        (struct.pack("<Q", 100_000_001) + b" " * 64, "header claims"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "not JSON"),
        (struct.pack("<Q", 17) + b'{"a": 1, "a": 2 }', "not JSON"),
        (struct.pack("<Q", 2) + b"[]", "not a mapping"),
        (struct.pack("<Q", 2) + b"\xff\xff", "not JSON"),
        (b"PK\x03\x04 a pickle in a zip file", "header claims"),
        (safetensors.torch.save({"a": torch.ones(2)}), "no quantization state"),
    ],
)
def test_files_of_another_kind_are_refused(folder, content, reason):
    error = load(folder, content)
    assert error is not None
    with pytest.raises(StateError, match=reason):
        raise error


def test_missing_files_and_directories_without_a_state_are_refused(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(StateError, match="cannot read"):
            ff.load_quantization(Net(), path)
