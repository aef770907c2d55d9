"""Shared by the tools for LoRA files: writing with correct hashes, rewriting a safetensors file, options, exit codes, tables."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from library.common.errors import UserError
from library.common.files import atomic_write, save_safetensors
from library.common.logging_setup import ConsoleHandler
from library.common.safetensors_header import read_header
from library.common.tensor_io import DTYPE_NAMES
from library.saving.model_hash import lora_hashes
from networks.diffusers_layout import ADAPTER_CONFIG
from networks.weight_files import FP32_SUFFIXES

DTYPES = {
    "float": torch.float32,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
STALE = ("sshs_model_hash", "sshs_legacy_hash", ADAPTER_CONFIG)  # metadata keys that belong to one file alone
CHUNK = 16 << 20  # bytes


def save_lora(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a LoRA file whole or not at all, with its new hashes."""
    kept = {key: value for key, value in metadata.items() if key not in STALE}
    save_safetensors(path, tensors, kept | lora_hashes(tensors, kept))


def rewrite_safetensors(
    source: Path, target: Path, metadata: Mapping[str, str], changed: Iterable[tuple[str, Tensor]] = ()
) -> None:
    """Write `source` to `target`, whole or not at all, with `metadata` in place of its own.

    Unchanged tensors are copied byte by byte, so memory holds one tensor.
    changed: names with new values of the same dtype and shape, one after another. Names, order and all else stay.
    """
    header = read_header(source)
    entries = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for name, info in header.tensors.items():
        entries[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.offsets}  # type: ignore[dict-item]
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # the tensors start at a multiple of 8 bytes, as the format wants
    with atomic_write(target) as temporary, source.open("rb") as old, temporary.open("wb") as new:
        new.write(len(text).to_bytes(8, "little") + text)
        start = new.tell()
        old.seek(header.data_start)
        shutil.copyfileobj(old, new, CHUNK)
        for name, tensor in changed:
            info = header.tensors[name]
            if (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) != (info.dtype, info.shape):
                raise ValueError(f"{name} must stay {info.dtype} {info.shape}")
            new.seek(start + info.offsets[0])
            new.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def check_target(path: Path, force: bool, sources: Iterable[Path] = ()) -> None:
    """UserError where writing would lose a file of the user's: one that is there, or a source, unless `force` allows the first."""
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: the result is a .safetensors file; give a name that ends so.")
    if any(path.exists() and source.exists() and path.samefile(source) for source in sources):
        raise UserError(f"{path} is one of the files that are read. Give the result another name.")
    check_free(path, force)


def check_free(path: Path, force: bool) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file.")
    if path.exists() and not force:
        raise UserError(f"{path} is there already. Give another name, or --force to replace it.")


def in_precision(tensors: Mapping[str, Tensor], precision: str | None) -> dict[str, Tensor]:
    """Tensors in the dtype of --save_precision; None: as they are. Alphas and DoRA's magnitudes stay as they are."""
    dtype = DTYPES[precision] if precision else None
    return {
        key: tensor if dtype is None or tensor.dim() == 0 or key.endswith(FP32_SUFFIXES) else tensor.to(dtype)
        for key, tensor in tensors.items()
    }


def add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--save_to", "--output", type=Path, required=True, metavar="FILE", help="the .safetensors file to write"
    )
    parser.add_argument(
        "--save_precision",
        choices=sorted(DTYPES),
        help="the precision of the tensors in the file; default: as in the input, float where that would lose digits",
    )
    parser.add_argument("--force", action="store_true", help="replace the output file if it is there")


def tool_parser(description: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def run_tool(tool: Callable[[], int]) -> int:
    """Run a tool's work and return the exit code: 2 after a mistake of the user, which it prints."""
    logging.basicConfig(level="INFO", format="%(message)s", handlers=[ConsoleHandler(all_to_stderr=True)])
    try:
        return tool()
    except UserError as error:
        print(error.as_text(), file=sys.stderr)
    except OSError as error:
        print(f"{error.filename or 'A file'} cannot be read or written: {error.strerror or error}.", file=sys.stderr)
    return 2


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows of texts as aligned columns, the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            f"{cell:<{width}}" if column == 0 else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
