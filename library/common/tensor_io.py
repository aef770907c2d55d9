"""Tensors out of a part: read once, moved and converted one after another, so that memory holds one copy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from library.common.errors import ReadError, UserError
from library.common.safetensors_header import Header, TensorInfo, read_header

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
SAMPLE_BYTES = 256
Read = Callable[[str, TensorInfo | None], Tensor]
FileStamp = tuple[int, int]
"""Size in bytes and time of the last change in ns."""
CHANGED = (
    "{}: this model file has changed since the run began. Do not write to a model's file while it is in use; if nobody does, its drive "
    "is unreliable: copy the file to a local one, or try --disable_mmap_load_safetensors."
)


@dataclass(frozen=True)
class Part:
    """One model's share of a file."""

    name: str  # of the model, such as "vae"
    path: Path
    prefix: str  # what stands before every key in the file; may be empty
    tensors: dict[str, TensorInfo]  # by key without the prefix; scales of float8 weights are not among them
    scales: dict[str, str] = field(default_factory=dict)  # key of a scaled float8 weight -> its scale's full name
    elsewhere: dict[str, str] = field(default_factory=dict)  # key -> full name, where that is not prefix + key
    pickled: bool = False  # a PyTorch .pt/.ckpt/.bin file instead of safetensors
    stamp: FileStamp | None = None  # of the file when its header was read

    def has_changed(self) -> bool:
        """Whether the file has another size or time than when its header was read; a file that cannot be looked at counts as the same."""
        now = file_stamp(self.path)
        return self.stamp is not None and now is not None and now != self.stamp

    def stored_name(self, key: str) -> str:
        """The name in the file of the tensor `key`."""
        return self.elsewhere.get(key, self.prefix + key)


def file_stamp(path: Path) -> FileStamp | None:
    """The file's stamp; None where there is no such file or the drive does not answer."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def load_tensors(
    part: Part, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, mmap: bool = True
) -> dict[str, Tensor]:
    """The part's tensors by key, on `device`; floating-point ones in `dtype`, others (position_ids) as stored.

    dtype None keeps the stored dtype, float8 included, except for weights that carry a scale of their own (scaled
    float8 files): these mean weight * scale and come in bfloat16. With mmap and nothing to convert the tensors stay
    views of the file (private: writing to them leaves the file as it is): a file that is cut short later kills the process. Map it only
    where the tensors are moved to another device, or copied, before anything else. Without mmap the file is read plainly.
    UserError where the file cannot be read.
    """
    loaded = {}
    with _reader(part, mmap) as read:
        for key in sorted(part.tensors, key=lambda name: part.tensors[name].offsets):
            tensor = read(part.stored_name(key), part.tensors[key]).to(device)
            scale = part.scales.get(key)
            if scale is not None:
                tensor = _scaled(tensor, read(scale, None).to(device), part, key).to(dtype or torch.bfloat16)
            elif dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(dtype)
            loaded[key] = tensor
    return {key: loaded[key] for key in part.tensors}


def fingerprint(part: Part) -> str:
    """16 hex digits that tell one set of weights from another, wherever the file lies and whatever its prefix.

    Hashes each tensor's key, dtype, shape and some bytes of its start and middle: milliseconds for any size.
    """
    digest = hashlib.sha256()
    with _reader(part, mmap=False) as read:
        for key in sorted(part.tensors):
            info = part.tensors[key]
            digest.update(f"{key}|{info.dtype}|{info.shape}|".encode())
            size = info.offsets[1] - info.offsets[0]
            for start in (0, size // 2):
                digest.update(_some_bytes(read, part, key, start, min(start + SAMPLE_BYTES, size)))
            if key in part.scales:
                digest.update(_as_bytes(read(part.scales[key], None)).numpy().tobytes())
    return digest.hexdigest()[:16]


def _some_bytes(read: Read, part: Part, key: str, start: int, end: int) -> bytes:
    """Bytes start to end of a tensor."""
    info = part.tensors[key]
    if part.pickled:
        return _as_bytes(read(part.stored_name(key), info))[start:end].numpy().tobytes()
    window = TensorInfo("U8", (end - start,), (info.offsets[0] + start, info.offsets[0] + end))
    return read(part.stored_name(key), window).numpy().tobytes()


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _scaled(weight: Tensor, scale: Tensor, part: Part, key: str) -> Tensor:
    """weight * scale in float32; the scale is one number or one a row."""
    rows = (-1,) + (1,) * (weight.dim() - 1)
    if scale.numel() not in (1, weight.shape[0]):
        raise UserError(f"{part.path}: the scale of {part.stored_name(key)} has shape {tuple(scale.shape)}.")
    return weight.float() * scale.float().reshape(rows)


@contextmanager
def _reader(part: Part, mmap: bool) -> Iterator[Read]:
    """Yield read(full name, info or None) -> CPU tensor as stored; turns what goes wrong with the file into UserError."""
    if part.has_changed():
        raise ReadError(CHANGED.format(part.path))
    try:
        if part.pickled:
            tensors = unpickle(part.path, mmap)
            yield lambda name, info: tensors[name]
        elif mmap:
            with safe_open(str(part.path), framework="pt", device="cpu") as file:
                yield lambda name, info: file.get_tensor(name)
        else:
            header = read_header(part.path)
            with part.path.open("rb", buffering=0) as plain:
                yield lambda name, info: _read_plain(plain, header.data_start, info or header.tensors[name])
    except UserError as error:
        raise error if isinstance(error, ReadError) else ReadError(error.problems) from error
    except (OSError, SafetensorError) as error:
        hint = " If the drive cannot be memory-mapped, --disable_mmap_load_safetensors may help." if mmap else ""
        raise ReadError(f"{part.path} cannot be read: {error}.{hint}") from error


def _read_plain(file: FileIO, data_start: int, info: TensorInfo) -> Tensor:
    buffer = torch.empty(info.offsets[1] - info.offsets[0], dtype=torch.uint8)
    file.seek(data_start + info.offsets[0])
    done, view = 0, memoryview(buffer.numpy())  # type: ignore[arg-type]
    while done < len(view):  # one call returns 2 GiB at most on Linux
        count = file.readinto(view[done:])
        if not count:
            raise OSError("it became shorter while it was read")
        done += count
    return buffer.view(TORCH_DTYPES[info.dtype]).reshape(info.shape)


def read_pickled_header(path: Path) -> Header:
    """The names, dtypes and shapes in a PyTorch file, as if it were safetensors (offsets only tell sizes)."""
    tensors = {}
    for name, tensor in unpickle(path).items():
        if tensor.dtype not in DTYPE_NAMES:
            raise UserError(f"{path}: tensor {name!r} has the dtype {tensor.dtype}, which no SD3 model has.")
        size = tensor.numel() * tensor.element_size()
        tensors[name] = TensorInfo(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), (0, size))
    return Header(tensors, {}, 0)


def unpickle(path: Path, mmap: bool = True) -> dict[str, Tensor]:
    """The tensors of a PyTorch .pt/.ckpt/.bin file, loaded with weights_only=True: a file cannot run code."""
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds for a damaged or dangerous file
        reason = str(error).split("\n", 1)[0][:200]
        raise UserError(
            f"{path} is not a PyTorch weights file that can be loaded safely ({reason}). Use a .safetensors file."
        ) from error
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} holds no table of tensors. Use a .safetensors file.")
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
