"""The header of a safetensors file, read with suspicion: whatever the bytes are, the answer is a Header or a UserError.

Layout (safetensors format, version 0): 8 bytes little-endian length N, N bytes of JSON, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

from library.common.errors import UserError

MAX_HEADER_BYTES = 32 * 1024 * 1024  # real headers are below 1 MiB; a parsed one takes some twenty times its bytes
MAX_DIMENSIONS = 64  # torch's own limit
MAX_SIZE = 2**63 - 1
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_FIRST_BYTES = (
    (b"GGUF", "a GGUF file (quantised weights for other programs; use the .safetensors original)"),
    (b"PK\x03\x04", "a zip archive or a PyTorch .ckpt/.pt/.bin file"),
    (b"\x80\x02", "a pickle (an old PyTorch .ckpt/.pt/.bin file)"),
    (b"\x80\x03", "a pickle (an old PyTorch .ckpt/.pt/.bin file)"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself (run `git lfs pull`, or download the file)"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf", "a 7-Zip archive"),
    (b"Rar!", "a RAR archive"),
    (b"%PDF", "a PDF"),
)


@dataclass(frozen=True)
class TensorInfo:
    dtype: str  # as safetensors spells it: "BF16", "F8_E4M3", ...
    shape: tuple[int, ...]
    offsets: tuple[int, int]  # first and one-past-last byte, counted from Header.data_start


@dataclass(frozen=True)
class Header:
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int  # bytes before the first tensor's


def read_header(path: str | Path) -> Header:
    """Read and check the header of a safetensors file; no tensor data is read.

    UserError (with the path and the reason) where there is no file, it is of another kind, malformed or cut short.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; one .safetensors file is needed.")
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            start = file.read(512)
            if size == 0:
                raise UserError(f"{path} is empty (0 bytes): copy or download it again.")
            length = int.from_bytes(start[:8], "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise UserError(f"{path} {_why_not_safetensors(start, size, length)}")
            file.seek(0)
            data = file.read(8 + length)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    return parse_header(data, size, str(path))


def parse_header(data: bytes, file_size: int, name: str = "the file") -> Header:
    """Check a header held in memory: `data` is the file's first 8 + N bytes (or more), `file_size` the whole file's length.

    Raises UserError that starts with `name`, and nothing else, for any bytes. Holds at most a small multiple of `data` in memory.
    """
    try:
        return _parsed(data, file_size)
    except _Malformed as error:
        raise UserError(f"{name}: {error}") from None


class _Malformed(Exception):
    """Why a header is refused, as a sentence."""


def _parsed(data: bytes, file_size: int) -> Header:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_HEADER_BYTES, len(data) - 8, file_size - 8):
        raise _Malformed(f"it {_why_not_safetensors(data[:512], file_size, length)}")
    entries = _json_object(data[8 : 8 + length])
    metadata = _metadata(entries.pop("__metadata__", {}))
    tensors = {key: _tensor_info(key, entry) for key, entry in entries.items()}
    _check_layout(tensors, file_size - 8 - length)
    return Header(tensors, metadata, 8 + length)


def _json_object(text: bytes) -> dict[str, object]:
    if not text.startswith(b"{"):
        raise _Malformed("the header is not a JSON object.")
    try:
        value: dict[str, object] = json.loads(
            text.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
        )
    except UnicodeDecodeError:
        raise _Malformed("the header is not UTF-8 text, so this is not a safetensors file or it is damaged.") from None
    except RecursionError:
        raise _Malformed("the header is nested too deeply.") from None
    except ValueError as error:  # JSON errors, and numbers of thousands of digits
        raise _Malformed(f"the header is not valid JSON ({_short(str(error))}).") from None
    if any(_is_broken(name) for name in value if not name.isascii()):
        raise _Malformed("a tensor's name is not valid text.")
    return value


def _is_broken(name: str) -> bool:
    """Whether text holds half of a surrogate pair, which JSON can say and UTF-8 cannot."""
    return any("\ud800" <= letter <= "\udfff" for letter in name)


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Malformed(f"the header names {_short(twice)} twice.")
    return table


def _refuse_constant(name: str) -> None:
    raise _Malformed(f"the header holds {name}, which is not a size.")


def _metadata(value: object) -> dict[str, str]:
    if type(value) is not dict or not all(type(text) is str for text in value.values()):
        raise _Malformed("__metadata__ is not a table of strings.")
    return value


def _tensor_info(key: str, entry: object) -> TensorInfo:
    label = f"tensor {_short(key)}"
    if type(entry) is not dict or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _Malformed(f"{label} lacks dtype, shape or data_offsets.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPE_BITS:
        raise _Malformed(f"{label} has the unknown dtype {_short(dtype)}.")
    if type(shape) is not list or len(shape) > MAX_DIMENSIONS or not all(_is_size(size) for size in shape):
        raise _Malformed(f"{label} has the impossible shape {_short(shape)}.")
    if type(offsets) is not list or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise _Malformed(f"{label} has the impossible data_offsets {_short(offsets)}.")
    bits = prod(shape) * DTYPE_BITS[dtype]
    begin, end = offsets
    if bits % 8 or end - begin != bits // 8:
        raise _Malformed(
            f"{label} is {dtype} {_short(shape)}, which does not fill the {end - begin} bytes given to it."
        )
    return TensorInfo(dtype, tuple(shape), (begin, end))


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_SIZE


def _check_layout(tensors: dict[str, TensorInfo], data_bytes: int) -> None:
    """The tensors must follow each other without overlap or gap and fill the file, as the format demands."""
    position = 0
    for key, info in sorted(tensors.items(), key=lambda item: item[1].offsets):
        if info.offsets[0] != position:
            what = "overlaps another" if info.offsets[0] < position else "leaves a gap before it"
            raise _Malformed(f"tensor {_short(key)} {what} (byte {info.offsets[0]}, not {position}).")
        position = info.offsets[1]
    if position > data_bytes:
        raise _Malformed(
            f"the file is cut short: {position - data_bytes:,} of {position:,} bytes are missing. Copy or download it again."
        )
    if position < data_bytes:
        raise _Malformed(f"{data_bytes - position:,} bytes at the end belong to no tensor: the file is damaged.")


def _why_not_safetensors(start: bytes, size: int, length: int) -> str:
    kind = kind_by_first_bytes(start)
    if kind is not None:
        return f"is {kind}, not a safetensors file."
    if size < 8:
        return f"is only {size} bytes long: not a safetensors file."
    if length <= MAX_HEADER_BYTES:
        return f"is cut short: its header alone is {length:,} bytes, the file {size:,}. Copy or download it again."
    return f"is not a safetensors file (its first 8 bytes announce a header of {length:,} bytes)."


def _short(value: object) -> str:
    """A value for a message: printable and never long."""
    text = repr(value[:80]) if isinstance(value, str) else repr(value[:8]) if isinstance(value, list) else repr(value)
    return text if len(text) <= 160 else text[:157] + "..."


def kind_by_first_bytes(start: bytes) -> str | None:
    """What a file that begins with `start` (some hundred bytes) is; None where nothing known begins so."""
    for magic, kind in _FIRST_BYTES:
        if start.startswith(magic):
            return kind
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page (a failed download: log in to the site, accept the licence, download again)"
    if text.startswith((b"{", b"[")):
        return "a JSON text"
    return None
