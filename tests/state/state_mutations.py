"""Damaged and forged state files for the tests: bytes changed at random, and manifests changed and signed again."""

import hashlib
import json
import struct

from hypothesis import strategies as st

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=8),
    st.sampled_from(
        ["../../etc/passwd", "/dev/zero", "os.system", "LinearQuantizer", "IntegerLinear", "a" * 9999, "0", "\x00"]
    ),
    st.sampled_from([2**63, -1, 2**200, 10**18, 1e308]),
    st.lists(st.integers(-2, 5), max_size=3),
    st.dictionaries(st.sampled_from(["scale", "dtype", "PerGroup", "x"]), st.integers(-2, 5), max_size=2),
)


@st.composite
def damaged(draw, content):
    """`content` with bytes flipped, cut, inserted or repeated."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["flip", "cut", "insert", "length", "swap"]))
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        if kind == "flip" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[place : place + draw(st.integers(1, 4096))]
        elif kind == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "length":
            data[:8] = struct.pack("<Q", draw(st.integers(0, 2**64 - 1)))
        else:
            other = draw(st.integers(0, max(len(data) - 1, 0)))
            data[place : place + 8], data[other : other + 8] = data[other : other + 8], data[place : place + 8]
    return bytes(data)


@st.composite
def forged(draw, content):
    """`content` with values of the manifest or header replaced, and the manifest's checksum computed again."""
    header, data = split(content)
    manifest = json.loads(header["__metadata__"]["fastforward"])
    for _ in range(draw(st.integers(1, 3))):
        target = manifest if draw(st.integers(0, 4)) else header
        _change(draw, target)
    return join(header, manifest, data)


def split(content):
    """Header and tensor bytes of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header, manifest, data):
    """A safetensors file whose manifest carries a right checksum."""
    if isinstance(header.get("__metadata__"), dict):
        text = json.dumps(manifest)
        checksum = hashlib.sha256(text.encode()).hexdigest()
        header["__metadata__"].update({"fastforward": text, "fastforward.sha256": checksum})
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def _change(draw, node):
    while True:
        keys = sorted(node) if isinstance(node, dict) else range(len(node))
        if not keys:
            return
        key = draw(st.sampled_from(list(keys)))
        inner = node[key]
        if isinstance(inner, (dict, list)) and inner and draw(st.integers(0, 3)):
            node = inner
            continue
        action = draw(st.sampled_from(["replace", "delete", "move"]))
        if action == "replace":
            node[key] = draw(JUNK)
        elif action == "delete":
            del node[key]
        elif isinstance(node, dict):
            node[draw(st.text(max_size=6))] = node.pop(key)
        return
