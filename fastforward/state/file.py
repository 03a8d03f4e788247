"""The container of a quantization state: safetensors files whose header carries a JSON manifest.

Out go tensors and a manifest, in come bytes that nobody vouches for. Reading checks everything before a tensor is made:
sizes against the file, the manifest against its SHA-256, each tensor's type, shape and bytes against the manifest.
Whatever is wrong with a file is a `StateError`. Nothing is unpickled and nothing named in a file is imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastforward.exceptions import StateError

MAX_HEADER = 100_000_000  # bytes, as in the safetensors format
MAX_ELEMENTS = 1 << 60
_MANIFEST, _CHECKSUM = "fastforward", "fastforward.sha256"
_SHARD_NAME = re.compile(r"[\w.-]+-[0-9a-f]{8}-\d{5}-of-\d{5}\.safetensors")

# How safetensors spells data types. Types that it lacks are stored as bytes; the manifest has the real one.
_SPELLED: Mapping[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_EXTRA_TYPES = (
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "uint16",
    "uint32",
    "uint64",
    "complex64",
    "complex128",
)
_TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _SPELLED} | {
    name: getattr(torch, name) for name in _EXTRA_TYPES if hasattr(torch, name)
}


@dataclass(frozen=True)
class Contents:
    """What a state holds.

    Attributes:
        manifest: JSON data.
        tensors: CPU tensors by key, each with memory of its own.
    """

    manifest: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def write(path: Path, contents: Contents, max_shard_size: int | None = None) -> None:
    """Write a state; `path` is either replaced as a whole or left as it was.

    Args:
        path: The file to write.
        contents: Manifest and tensors; keys ``tensors`` and ``shards`` of the manifest are filled in here.
        max_shard_size: Bytes of tensors per file; more go to further files beside it, named in the manifest.

    Raises:
        StateError: The file cannot be written.
    """
    raw = {key: _as_bytes(tensor) for key, tensor in contents.tensors.items()}
    shards = _distribute(raw, max_shard_size)
    records = {
        key: _record(contents.tensors[key], raw[key], number) for number, shard in enumerate(shards) for key in shard
    }
    previous = _shards_of(path)
    digest = hashlib.sha256("".join(record["sha256"] for record in records.values()).encode()).hexdigest()[:8]
    names = [f"{path.stem}-{digest}-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards))]
    manifest = {**contents.manifest, "tensors": records, "shards": names}
    text = json.dumps(manifest, sort_keys=True, allow_nan=False)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    try:
        for name, shard in zip(names, shards[1:], strict=True):
            _write_file(path.with_name(name), {}, {key: (records[key], raw[key]) for key in shard})
        main = {key: (records[key], raw[key]) for key in shards[0]}
        _write_file(path, {_MANIFEST: text, _CHECKSUM: checksum}, main)
        for name in previous - set(names):
            path.with_name(name).unlink(missing_ok=True)
    except OSError as error:
        msg = f"cannot write {path}: {error}"
        raise StateError(msg) from error


def read(path: Path) -> Contents:
    """Read a state and check all of it.

    Raises:
        StateError: There is no such file, it is damaged, or it is no quantization state.
    """
    metadata, first = _read_file(path)
    manifest = _manifest(path, metadata)
    names = shard_names(manifest, path)
    files = [first, *(_read_file(path.with_name(name))[1] for name in names)]
    records = manifest.get("tensors")
    if not isinstance(records, dict):
        _damaged(path, "the manifest lists no tensors")
    stored = sum(len(file) for file in files)
    if stored != len(records):
        _damaged(path, f"the manifest lists {len(records)} tensors, the files hold {stored}")
    return Contents(manifest, {key: _checked(path, key, record, files) for key, record in records.items()})


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest alone; tensors are neither read nor checked.

    Raises:
        StateError: There is no such file, or it is no quantization state.
    """
    with _opened(path) as file:
        header, _ = _read_header(path, file)
    return _manifest(path, header.get("__metadata__"))


def shard_names(manifest: Mapping[str, Any], path: Path) -> list[str]:
    """Names of further files beside `path`, refused unless they are plain names of the form that `write` gives."""
    names = manifest.get("shards")
    if not isinstance(names, list) or len(names) > 99_999:
        _damaged(path, "the manifest has no list of further files")
    for name in names:
        if not isinstance(name, str) or _SHARD_NAME.fullmatch(name) is None:
            _damaged(path, f"{name!r} is not the name of a further file of a state")
    return names


@dataclass(frozen=True)
class _Stored:
    """A tensor as it lies in a file: what the header says, and the bytes."""

    dtype: str
    shape: list[int]
    data: memoryview


def _write_file(path: Path, metadata: dict[str, str], tensors: Mapping[str, tuple[dict[str, Any], memoryview]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for key, (record, data) in tensors.items():
        spelled = _SPELLED.get(_TYPES[record["dtype"]])
        shape = record["shape"] if spelled else [data.nbytes]
        header[key] = {"dtype": spelled or "U8", "shape": shape, "data_offsets": [position, position + data.nbytes]}
        position += data.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # Beside the target, so that the final rename stays within one file system and is atomic.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for _, data in tensors.values():
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _as_bytes(tensor: torch.Tensor) -> memoryview:
    plain = tensor.detach().cpu().contiguous()
    if plain.numel() == 0:
        return memoryview(b"")
    if sys.byteorder != "little":
        msg = "states are written on little-endian machines only"
        raise StateError(msg)
    octets: Any = plain.reshape(-1).view(torch.uint8).numpy()
    return memoryview(octets)


def _distribute(raw: Mapping[str, memoryview], max_shard_size: int | None) -> list[list[str]]:
    """Keys by file, in order; the first file holds the manifest."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, data in raw.items():
        if max_shard_size is not None and shards[-1] and size + data.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += data.nbytes
    return shards


def _record(tensor: torch.Tensor, data: memoryview, shard: int) -> dict[str, Any]:
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "sha256": hashlib.sha256(data).hexdigest(),
        "shard": shard,
    }


def _shards_of(path: Path) -> set[str]:
    """Further files of the state that stands at `path` now, which a new state replaces."""
    if not path.exists():
        return set()
    try:
        return set(shard_names(read_manifest(path), path))
    except StateError:
        return set()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        msg = f"cannot read {path}: {error}"
        raise StateError(msg) from error


def _read_file(path: Path) -> tuple[Any, dict[str, _Stored]]:
    with _opened(path) as file:
        header, size = _read_header(path, file)
        data = memoryview(file.read())
    metadata = header.pop("__metadata__", None)
    tensors = {key: _located(path, key, entry, data) for key, entry in header.items()}
    if sum(stored.data.nbytes for stored in tensors.values()) != data.nbytes:
        _damaged(path, f"its {size} bytes are not the tensors that its header lists")
    return metadata, tensors


def _read_header(path: Path, file: Any) -> tuple[dict[str, Any], int]:
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    if len(prefix) < 8:
        _damaged(path, f"it has {size} bytes, too few for a header")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(size - 8, MAX_HEADER):
        _damaged(path, f"its header claims {length} bytes of {size}")
    header = parse_json(path, file.read(length))
    if not isinstance(header, dict):
        _damaged(path, "its header is not a mapping")
    return header, size


def _located(path: Path, key: str, entry: Any, data: memoryview) -> _Stored:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), _shape(fields.get("shape")), fields.get("data_offsets")
    if not isinstance(dtype, str) or shape is None or not isinstance(offsets, list) or not _is_pair(offsets):
        _damaged(path, f"the header's entry for tensor {key!r} is malformed")
    start, end = offsets
    if not start <= end <= data.nbytes:
        _damaged(path, f"tensor {key!r} lies outside the file")
    return _Stored(dtype, shape, data[start:end])


def _manifest(path: Path, metadata: Any) -> dict[str, Any]:
    fields = metadata if isinstance(metadata, dict) else {}
    text, checksum = fields.get(_MANIFEST), fields.get(_CHECKSUM)
    if not isinstance(text, str):
        msg = f"{path} is a safetensors file, but no quantization state: save one with ff.save_quantization"
        raise StateError(msg)
    encoded = text.encode("utf-8", "surrogatepass")
    if hashlib.sha256(encoded).hexdigest() != checksum:
        _damaged(path, "the manifest does not match its checksum")
    manifest = parse_json(path, encoded)
    if not isinstance(manifest, dict):
        _damaged(path, "the manifest is not a mapping")
    return manifest


def _checked(path: Path, key: str, record: Any, files: list[dict[str, _Stored]]) -> torch.Tensor:
    fields = record if isinstance(record, dict) else {}
    dtype, shape, shard = _TYPES.get(str(fields.get("dtype"))), _shape(fields.get("shape")), fields.get("shard")
    if dtype is None or shape is None or type(shard) is not int or not 0 <= shard < len(files):
        _damaged(path, f"the manifest's entry for tensor {key!r} is malformed")
    stored = files[shard].get(key)
    if stored is None:
        _damaged(path, f"tensor {key!r} is not in the file that the manifest says")
    spelled = _SPELLED.get(dtype)
    expected = (spelled, shape) if spelled else ("U8", [stored.data.nbytes])
    if (stored.dtype, stored.shape) != expected or math.prod(shape) * dtype.itemsize != stored.data.nbytes:
        _damaged(path, f"tensor {key!r} is not of the type and shape that the manifest says")
    if hashlib.sha256(stored.data).hexdigest() != fields.get("sha256"):
        _damaged(path, f"tensor {key!r} does not match its checksum")
    if stored.data.nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(stored.data), dtype=torch.uint8).view(dtype).reshape(shape)


def _shape(value: Any) -> list[int] | None:
    """A shape, or None for anything else; one beyond what a tensor can have is none, even where an axis is empty."""
    if not _is_sizes(value) or math.prod(max(length, 1) for length in value) > MAX_ELEMENTS:
        return None
    shape: list[int] = value
    return shape


def _is_pair(value: list[Any]) -> bool:
    return len(value) == 2 and _is_sizes(value)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def parse_json(path: Path, text: bytes) -> Any:
    """JSON data; a repeated key, NaN, or nesting without end is an error.

    Raises:
        StateError: The text is not JSON of that kind.
    """
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        msg = f"{path} is damaged or no state file: its header is not JSON ({type(error).__name__}); save it again"
        raise StateError(msg) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        msg = "a key occurs twice"
        raise ValueError(msg)
    return found


def _refuse_constant(name: str) -> NoReturn:
    msg = f"{name} is not JSON"
    raise ValueError(msg)


def _damaged(path: Path, reason: str) -> NoReturn:
    msg = f"{path} is damaged or no state file: {reason}; save it again"
    raise StateError(msg)
