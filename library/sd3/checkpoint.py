"""From paths to parts: which file holds the denoiser, the three text encoders and the VAE of an SD3 model.

Headers alone are read. One single file may hold everything; the path of an encoder or the VAE wins over the copy in
the checkpoint (`--clip_l`, `--clip_g`, `--t5xxl`, `--vae`); "" counts as none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from library.common.errors import Problems, UserError
from library.common.safetensors_header import Header, read_header
from library.common.tensor_io import Part, read_pickled_header
from library.sd3.checkpoint_checks import TITLES, core_problems, fit_problems, shapes_of, shard_hint
from library.sd3.file_kinds import kind_by_keys
from library.sd3.parts import make_part
from library.sd3.text_encoder_sizes import check_text_encoder

ENCODERS = ("clip_l", "clip_g", "t5xxl")
# The tensor by which a part is known; what stands before it is the part's prefix.
MARKS = {
    "mmdit": "joint_blocks.0.x_block.attn.qkv.weight",
    "clip_l": "text_model.embeddings.token_embedding.weight",
    "clip_g": "text_model.embeddings.token_embedding.weight",
    "t5xxl": "encoder.block.0.layer.0.SelfAttention.q.weight",
    "vae": "decoder.conv_in.weight",
}


@dataclass(frozen=True)
class ModelFiles:
    """Where each model's tensors are; None for one that is nowhere."""

    mmdit: Part
    clip_l: Part | None
    clip_g: Part | None
    t5xxl: Part | None
    vae: Part | None

    def encoders(self) -> dict[str, Part | None]:
        return {"clip_l": self.clip_l, "clip_g": self.clip_g, "t5xxl": self.t5xxl}


@dataclass(frozen=True)
class _File:
    option: str
    path: Path
    header: Header
    pickled: bool


def locate_parts(
    checkpoint: str | Path,
    clip_l: str | Path | None = None,
    clip_g: str | Path | None = None,
    t5xxl: str | Path | None = None,
    vae: str | Path | None = None,
) -> ModelFiles:
    """Find every part by its tensors' names, in milliseconds.

    UserError lists all that is wrong: files missing, malformed, cut short or of another kind (it says which), encoders with
    missing, unknown or misshaped tensors or of other widths than the denoiser takes. An encoder or VAE that is nowhere is None, not an error.
    """
    problems = Problems()
    base = _open("--pretrained_model_name_or_path", checkpoint, problems)
    parts: dict[str, Part | None] = dict.fromkeys(MARKS)
    if base is not None:
        parts = {name: _embedded(name, base, problems) for name in MARKS}
    for name, path in {"clip_l": clip_l, "clip_g": clip_g, "t5xxl": t5xxl, "vae": vae}.items():
        if path is not None and str(path).strip():
            file = _open(f"--{name}", path, problems)
            parts[name] = _separate(name, file, problems) if file is not None else None
    present = {name: part for name, part in parts.items() if part is not None}
    for part in present.values():
        problems.problems.extend(check_text_encoder(part) if part.name in ENCODERS else core_problems(part))
    problems.raise_if_any()
    problems.problems.extend(fit_problems(present))
    problems.raise_if_any()
    return ModelFiles(present["mmdit"], parts["clip_l"], parts["clip_g"], parts["t5xxl"], parts["vae"])


def _open(option: str, value: str | Path, problems: Problems) -> _File | None:
    if not str(value).strip():
        problems.add(f"{option} is empty: give the path of the SD3 model's .safetensors file.")
        return None
    path = Path(value).expanduser()
    try:
        if not path.exists():
            raise UserError(f"{path} does not exist.{_hub_hint(option, str(value))}")
        if path.is_dir():
            raise UserError(_about_folder(path))
        pickled = _is_pickled(path)
        return _File(option, path, read_pickled_header(path) if pickled else read_header(path), pickled)
    except OSError as error:
        problems.add(f"{option}: {path} cannot be read: {error.strerror or error}.")
    except UserError as error:
        problems.add(f"{option}: {error}")
    return None


def _is_pickled(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(4)
    return start == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"))


def _hub_hint(option: str, value: str) -> str:
    if option == "--pretrained_model_name_or_path" and re.fullmatch(r"[\w.-]+/[\w.-]+", value):
        return " A name on the Hugging Face Hub is not enough: download the model's single .safetensors file."
    return ""


def _about_folder(path: Path) -> str:
    if (path / "model_index.json").exists() or (path / "config.json").exists():
        return f"{path} is a folder in diffusers format; the single .safetensors file of the model is needed."
    files = sorted(file.name for file in path.glob("*.safetensors"))[:3]
    inside = f" It holds {', '.join(files)}: give one of these." if files else ""
    return f"{path} is a folder; one .safetensors file is needed.{inside}"


def _prefixes(header: Header, mark: str) -> list[str]:
    """What stands before `mark` in the file's names: "" or ending with a dot; sorted."""
    prefixes = {name[: -len(mark)] for name in header.tensors if name.endswith(mark)}
    return sorted(prefix for prefix in prefixes if not prefix or prefix.endswith("."))


def _embedded(name: str, base: _File, problems: Problems) -> Part | None:
    """The part `name` of the base checkpoint."""
    prefixes = _prefixes(base.header, MARKS[name])
    if name in ENCODERS:
        prefixes = [prefix for prefix in prefixes if name in prefix.split(".")]
    if name == "mmdit":
        if not prefixes:
            kind = kind_by_keys(shapes_of(base.header.tensors))
            problems.add(f"{base.option}: {base.path} is {kind}; an SD3 or SD3.5 model is needed.")
            return None
        prefixes = [p for p in ("model.diffusion_model.", "") if p in prefixes] or prefixes
    return _part(name, base, prefixes[0]) if prefixes else None


def _separate(name: str, file: _File, problems: Problems) -> Part | None:
    """The part `name` of a file of its own."""
    prefixes = _prefixes(file.header, MARKS[name])
    if not prefixes and name in ("clip_l", "clip_g"):
        prefixes = _prefixes(file.header, MARKS[name].removeprefix("text_model."))
    named = [prefix for prefix in prefixes if name in prefix.split(".")]
    prefixes = named or prefixes
    if len(prefixes) == 1:
        return _part(name, file, prefixes[0])
    if prefixes:
        problems.add(f"{file.option}: {file.path} holds several encoders ({', '.join(prefixes)}) and none is {name}.")
    else:
        kind = kind_by_keys(shapes_of(file.header.tensors))
        problems.add(f"{file.option}: {file.path} is {kind}; {TITLES[name]} is needed{shard_hint(file.path)}.")
    return None


def _part(name: str, file: _File, prefix: str) -> Part:
    others = {other for mark in MARKS.values() for other in _prefixes(file.header, mark) if other}
    return make_part(name, file.path, prefix, file.header, tuple(others), file.pickled)
