#!/usr/bin/env python3
"""Check a LoRA file: names, shapes, alphas, NaN, how large each layer's change is, and which clients read all of it.

    python tools/check_lora.py my_lora.safetensors --plot norms.png
    python tools/check_lora.py my_lora.safetensors --base_model sd3.5_medium.safetensors

Exit code 0: all is well. 1: something is wrong with the file, and was said. 2: the file can't be read. With --base_model the layers
are held against that checkpoint's. --plot draws the norms of the changes by block.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, Python looks into tools/ alone

from torch import Tensor

from library.common.errors import UserError
from library.common.safetensors_header import read_header
from library.sd3.checkpoint import locate_parts
from networks.diffusers_layout import fit
from networks.diffusers_names import diffusers_paths
from networks.lora_file import LoraFile, read_lora
from networks.merging import check_change, kind_of
from networks.weight_files import PICKLED, listed
from tools.checkpoint_weights import TITLES, Weight, lora_weights
from tools.lora_clients import clients, report
from tools.lora_files import check_free, run_tool, table, tool_parser
from tools.norm_plot import Bar, draw_norms

KINDS = {
    "lora_down.weight": "LoRA",
    "hada_w1_a": "LoHa",
    "a1.weight": "GLoRA",
    "diff": "difference",
    "oft_blocks": "OFT",
}
# how tensors' names begin in checkpoints and their parts
PARTS_OF_MODELS = (
    "model.diffusion_model.",
    "first_stage_model.",
    "joint_blocks.",
    "text_encoders.",
    "text_model.",
    "shared.",
)
HALVES = {"x": "MMDiT, image", "context": "MMDiT, text"}
MMDIT_LAYER = re.compile(r"lora_unet_joint_blocks_(\d+)_(x|context)_block_(attn2?|mlp|adaLN)_")
TEXT_LAYER = re.compile(r"(lora_te[123]_).*?(?:layers|block)_(\d+)_(?:.*?)(attn|SelfAttention|mlp|DenseReluDense)_")
PARTS_OF_LAYER = {
    "attn": "attn",
    "attn2": "attn2",
    "SelfAttention": "attn",
    "mlp": "mlp",
    "DenseReluDense": "mlp",
    "adaLN": "adaLN",
}


@dataclass(frozen=True)
class LayerReport:
    name: str
    kind: str
    rank: int | None
    alpha: float | None
    norm: float | None  # Frobenius norm of the change at multiplier 1; None where it depends on the checkpoint
    largest: float  # absolute value in any of its tensors
    problems: list[str]


def main(arguments: list[str] | None = None) -> int:
    parser = tool_parser(__doc__)
    parser.add_argument("model", type=Path, metavar="FILE", help="the LoRA file")
    parser.add_argument(
        "--base_model", type=Path, metavar="FILE", help="check names and shapes against this checkpoint"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the norms of the changes by block")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--layers", action="store_true", help="print every layer, not only the sums by block")
    parser.add_argument("--force", action="store_true", help="replace the file of --plot if it is there")
    chosen = parser.parse_args(arguments)

    def work() -> int:
        if chosen.plot is not None:
            check_free(chosen.plot, chosen.force)
        refuse_checkpoint(chosen.model)
        lora = read_lora(chosen.model, damaged=True)
        weights = lora_weights(locate_parts(chosen.base_model)) if chosen.base_model else None
        layers = [check_layer(name, tensors, weights) for name, tensors in lora.layers.items()]
        problems = [problem for layer in layers for problem in layer.problems]
        if chosen.plot is not None:
            draw_norms(chosen.plot, chosen.model.name, bars(layers))
        if chosen.json:
            result = {"layers": [asdict(layer) for layer in layers], "clients": clients(lora), "problems": problems}
            print(json.dumps(result, indent=2))
        else:
            print(f"{chosen.model}: {facts(lora, layers)}\n")
            print(by_layer(layers) if chosen.layers else by_block(layers))
            print(f"\n{report(lora)}")
            print("\n" + ("\n".join(["Problems:", *problems]) if problems else "No problems found."))
        return 1 if problems else 0

    return run_tool(work)


def refuse_checkpoint(path: Path) -> None:
    """UserError where the file is a model rather than a LoRA."""
    if path.suffix in PICKLED:
        return
    keys = read_header(path).tensors.keys()
    if not any(key.startswith(PARTS_OF_MODELS) for key in keys) or any("lora" in key for key in keys):
        return
    raise UserError(f"{path} is a checkpoint, not a LoRA. Give the LoRA file, and this one with --base_model.")


def check_layer(name: str, tensors: Mapping[str, Tensor], weights: Mapping[str, Weight] | None) -> LayerReport:
    """All that can be said about one layer. weights: the checkpoint's, None for no comparison."""
    mark = kind_of(tensors)
    is_lora = "lora_down.weight" in tensors
    kind = "DoRA" if "dora_scale" in tensors else KINDS.get(mark or "", "LoKr" if mark else "unknown")
    rank = tensors["lora_down.weight"].shape[0] if is_lora else None
    alpha = float(tensors["alpha"]) if "alpha" in tensors and tensors["alpha"].numel() == 1 else None
    problems = list(_value_problems(name, tensors))
    if diffusers_paths(name) is None:
        problems.append(f"{name} is no layer of SD3: programs pass it over.")
    elif weights is not None:
        if name not in weights:
            problems.append(f"{name} is not in the checkpoint.")
        else:
            problem = check_change(name, tensors, weights[name].empty_layer())
            problems += [problem] if problem else []
    if mark is None:
        problems.append(f"{name} has tensors that make no known kind of change: {', '.join(sorted(tensors))}.")
    shapes = _shape_problem(name, tensors) if is_lora else None
    if shapes:
        problems.append(shapes)
    norm = change_norm(tensors) if is_lora and not problems else None
    if norm == 0:
        problems.append(f"{name} changes nothing: its lora_up or its lora_down is zero.")
    largest = max((float(t.float().abs().max()) for t in tensors.values() if t.numel()), default=0.0)
    return LayerReport(name, kind, rank, alpha, norm, largest, problems)


def _value_problems(name: str, tensors: Mapping[str, Tensor]) -> list[str]:
    problems = []
    for suffix, tensor in tensors.items():
        bad = tensor.numel() - int(tensor.float().isfinite().sum())
        if bad:
            problems.append(f"{name}.{suffix} has {bad} NaN or infinite values.")
    if "alpha" in tensors and tensors["alpha"].numel() != 1:
        problems.append(f"{name}.alpha is not one number but {list(tensors['alpha'].shape)}.")
    elif "alpha" in tensors and float(tensors["alpha"]) == 0:
        problems.append(f"{name}.alpha is 0: the layer has no strength.")
    return problems


def _shape_problem(name: str, tensors: Mapping[str, Tensor]) -> str | None:
    down, up = tensors["lora_down.weight"], tensors.get("lora_up.weight")
    if up is None:
        return f"{name} has no lora_up."
    if not fit(down, up, None):
        return f"{name}: lora_down {list(down.shape)} and lora_up {list(up.shape)} do not fit each other."
    return None


def change_norm(tensors: Mapping[str, Tensor]) -> float | None:
    """||scale * Up @ Down|| from rank x rank matrices, for a plain LoRA or a DoRA's direction; None with a middle factor."""
    if "lora_mid.weight" in tensors:
        return None
    down, up = (tensors[f"lora_{side}.weight"].double().flatten(1) for side in ("down", "up"))
    scale = float(tensors["alpha"]) / down.shape[0] if "alpha" in tensors else 1.0
    return abs(scale) * math.sqrt(max(0.0, float(((up.t() @ up) * (down @ down.t())).sum())))


def position_of(name: str) -> tuple[str, int, str] | None:
    """(part of the model, block, part of the block) of a LoRA name; None for what lies in no block."""
    mmdit, text = MMDIT_LAYER.match(name), TEXT_LAYER.match(name)
    if mmdit:
        return HALVES[mmdit[2]], int(mmdit[1]), PARTS_OF_LAYER[mmdit[3]]
    return (TITLES[text[1]], int(text[2]), PARTS_OF_LAYER[text[3]]) if text else None


def bars(layers: list[LayerReport]) -> list[Bar]:
    """The norms of layers in one block and part of it, put together: the root of the sum of their squares."""
    sums: dict[tuple[str, int, str], float] = {}
    for layer in layers:
        position = position_of(layer.name)
        if position is not None and layer.norm is not None:
            sums[position] = sums.get(position, 0.0) + layer.norm**2
    return [Bar(*position, math.sqrt(total)) for position, total in sums.items()]


def facts(lora: LoraFile, layers: list[LayerReport]) -> str:
    kinds = ", ".join(sorted({layer.kind for layer in layers}))
    ranks = sorted({layer.rank for layer in layers if layer.rank is not None})
    shown = "" if not ranks else f", rank {ranks[0]}" if len(ranks) == 1 else f", ranks {ranks[0]} to {ranks[-1]}"
    parts = [title for prefix, title in TITLES.items() if any(layer.name.startswith(prefix) for layer in layers)]
    total = math.sqrt(sum(layer.norm**2 for layer in layers if layer.norm is not None))
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in lora.tensors.values() if tensor.dim()})
    return (
        f"{kinds} of {listed(parts)} in {lora.layout}'s layout, {len(layers)} layers{shown}, {', '.join(dtypes)}, "
        f"norm of all changes {total:.4g}"
    )


def by_block(layers: list[LayerReport]) -> str:
    """Norms: a line a block, a column a part of it; then what lies in no block."""
    cells: dict[tuple[str, int], dict[str, float]] = {}
    for bar in bars(layers):
        cells.setdefault((bar.part, bar.block), {})[bar.kind] = bar.norm
    kinds = [kind for kind in ("attn", "attn2", "mlp", "adaLN") if any(kind in row for row in cells.values())]
    rows: list[tuple[str, ...]] = [("norms by block", *kinds)] if cells else []
    for (part, block), row in sorted(cells.items()):
        rows.append((f"{part} {block}", *(f"{row[kind]:.4g}" if kind in row else "-" for kind in kinds)))
    lines = [table(rows)] if rows else []
    others = [layer for layer in layers if position_of(layer.name) is None or layer.norm is None]
    return "\n\n".join([*lines, *([by_layer(others)] if others else [])])


def by_layer(layers: list[LayerReport]) -> str:
    rows: list[tuple[str, ...]] = [("layer", "kind", "rank", "alpha", "norm", "largest value")]
    for layer in layers:
        numbers = ("-" if value is None else f"{value:.4g}" for value in (layer.rank, layer.alpha, layer.norm))
        rows.append((layer.name, layer.kind, *numbers, f"{layer.largest:.4g}"))
    return table(rows)


if __name__ == "__main__":
    sys.exit(main())
