"""Which clients read all of a LoRA file, as measured with files of this trainer: docs/clients.md in code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from networks.diffusers_layout import SWAPPED
from networks.lora_file import LoraFile
from networks.merging import kind_of

ALL = ""
PLAIN = "lora_down.weight"


@dataclass(frozen=True)
class Contents:
    """What of a file decides who reads it."""

    layout: str  # "kohya" or "diffusers"
    kinds: frozenset[str]  # keys of networks.merging.KINDS
    dora: bool
    dora_per_output: bool
    boft: bool
    t5: bool
    swapped: bool  # modulation layers whose scale and shift change places between the layouts

    @classmethod
    def of(cls, lora: LoraFile) -> Contents:
        layers = lora.layers
        scales = [layer["dora_scale"] for layer in layers.values() if "dora_scale" in layer]
        return cls(
            lora.layout,
            frozenset(kind_of(layer) or "unknown" for layer in layers.values()),
            bool(scales),
            any(scale.shape[0] > 1 for scale in scales),
            any(layer["oft_blocks"].dim() == 4 for layer in layers.values() if "oft_blocks" in layer),
            any(name.startswith("lora_te3_") for name in layers),
            any(name.endswith(SWAPPED[1]) for name in layers) or _last_context(layers),
        )

    @property
    def rotation(self) -> bool:
        return "oft_blocks" in self.kinds


def clients(lora: LoraFile) -> dict[str, str]:
    """Client -> ALL where it reads the whole file as it was trained, else what it does not."""
    contents = Contents.of(lora)
    of_layout = _of_kohya(contents) if contents.layout == "kohya" else _of_diffusers(contents)
    return {"ComfyUI 0.3.64 or later": _comfyui(contents), **of_layout}


def report(lora: LoraFile) -> str:
    """The clients in two lines: those that read everything, and the others with the reason."""
    read = clients(lora)
    whole = [client for client, reason in read.items() if reason == ALL]
    others = "".join(f"\n  {client}: {reason}" for client, reason in read.items() if reason != ALL)
    return f"Read whole by: {', '.join(whole) or 'no client that was tried'}." + (
        f"\nNot whole:{others}" if others else ""
    )


def _comfyui(contents: Contents) -> str:
    if "unknown" in contents.kinds:
        return "skips the layers of an unknown kind"
    if contents.rotation:
        return (
            "boft differs below strength 1" if contents.boft else "squares the strength of diag-oft: right at 1 alone"
        )
    return "applies magnitudes per output by another formula" if contents.dora_per_output else ALL


def _of_kohya(contents: Contents) -> dict[str, str]:
    if contents.rotation:
        forge = "refuses diag-oft and boft"
    else:
        forge = "skips the layers of an unknown kind" if "unknown" in contents.kinds else ALL
    sd_scripts = "ignores the magnitudes of DoRA" if contents.dora else ALL
    return {
        "Forge": forge,
        "sd-scripts": sd_scripts if contents.kinds == {PLAIN} else "not tried with this kind",
        "diffusers": "loads nothing, without an error; convert with tools/convert_lora.py",
        "SD.Next": "its native converter exchanges layers or drops them; use its diffusers mode and the diffusers layout",
        "stable-diffusion.cpp": "does not know kohya's names for SD3; convert with tools/convert_lora.py",
    }


def _of_diffusers(contents: Contents) -> dict[str, str]:
    diffusers = "skips the layers of T5" if contents.t5 else ALL
    swap = "lacks the exchange of scale and shift in norm_out and the last norm1_context"
    return {
        "diffusers": diffusers,
        "SD.Next in diffusers mode": diffusers,
        "stable-diffusion.cpp": swap if contents.swapped else "not tried without modulation layers",
        "Forge": "refuses the diffusers layout; convert with tools/convert_lora.py",
    }


def _last_context(layers: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether the last block's context is modulated by a layer of the file: of any block, since the model's depth is unknown."""
    return any(name.endswith(SWAPPED[0]) for name in layers)
