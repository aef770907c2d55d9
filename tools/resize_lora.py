#!/usr/bin/env python3
"""Make a LoRA file smaller: the nearest LoRA of a lower rank, layer by layer, by singular value decomposition.

    python tools/resize_lora.py --model big.safetensors --save_to small.safetensors --new_rank 8
    python tools/resize_lora.py --model big.safetensors --save_to small.safetensors --new_rank 32 --dynamic_method energy --dynamic_param 0.95

Prints, for each layer, the old and the new rank and the share of the change's norm that is kept. The strength stays the same: no
multiplier needs another value. Reads kohya's and diffusers' layout, writes kohya's.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, Python looks into tools/ alone

import torch
from torch import Tensor

from library.common.errors import UserError
from library.common.progress import progress_bar
from networks.lora_file import LoraFile, read_lora
from networks.weight_files import listed
from tools.lora_files import add_output_options, check_target, in_precision, run_tool, save_lora, table, tool_parser
from tools.low_rank import RankRule, add_rule_options, decompose_product, device_from, rule_from

RESIZED = ("lora_down.weight", "lora_up.weight", "alpha")


@dataclass(frozen=True)
class Resized:
    name: str
    old_rank: int
    new_rank: int
    norm: float  # of the change before, Frobenius
    kept: float  # share of it, 0..1


def main(arguments: list[str] | None = None) -> int:
    parser = tool_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="FILE", help="the LoRA file to make smaller")
    parser.add_argument("--new_rank", type=int, required=True, metavar="N", help="the rank, or the highest one")
    add_rule_options(parser)
    parser.add_argument("--device", help="where to compute, cpu or cuda; default: cuda if there is one")
    add_output_options(parser)
    chosen = parser.parse_args(arguments)

    def work() -> int:
        rule = rule_from(chosen.new_rank, "--new_rank", chosen.dynamic_method, chosen.dynamic_param)
        check_target(chosen.save_to, chosen.force, [chosen.model])
        lora = read_lora(chosen.model)
        tensors, rows = resize(lora, rule, device_from(chosen.device))
        save_lora(chosen.save_to, in_precision(tensors, chosen.save_precision), resized_metadata(lora, rows, rule))
        print(report(rows))
        print(f"{chosen.save_to}: {size_of(lora.tensors):,} values became {size_of(tensors):,}.")
        return 0

    return run_tool(work)


def resize(lora: LoraFile, rule: RankRule, device: torch.device) -> tuple[dict[str, Tensor], list[Resized]]:
    """The tensors of the smaller LoRA, in the dtypes of the old one, and what became of each layer.

    alpha / rank stays, DoRA's magnitudes too. UserError where layers are of another kind than LoRA.
    """
    layers = lora.layers
    other = [n for n, layer in layers.items() if not {"lora_down.weight", "lora_up.weight"} <= layer.keys()]
    if other:
        raise UserError(f"{lora.path}: only LoRA layers can be resized; these are of another kind: {listed(other)}.")
    tensors: dict[str, Tensor] = {}
    rows = []
    for name in progress_bar(list(layers), "Resizing"):
        layer = layers[name]
        new, row = _resize_layer(name, layer, rule, device)
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in new.items()}
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in layer.items() if suffix not in RESIZED}
        rows.append(row)
    return tensors, rows


def _resize_layer(
    name: str, layer: Mapping[str, Tensor], rule: RankRule, device: torch.device
) -> tuple[dict[str, Tensor], Resized]:
    down, up = layer["lora_down.weight"], layer["lora_up.weight"]
    old_rank = down.shape[0]
    scale = float(layer["alpha"]) / old_rank if "alpha" in layer else 1.0
    decomposed = decompose_product(up.to(device).flatten(1), down.to(device).flatten(1))
    rank = rule.rank(decomposed.s)
    row = Resized(name, old_rank, min(rank, old_rank), abs(scale) * float(decomposed.s.norm()), decomposed.kept(rank))
    if rank >= old_rank:
        return {suffix: layer[suffix] for suffix in RESIZED if suffix in layer}, row
    new_down, new_up = decomposed.factors(rank)
    return {
        "lora_down.weight": new_down.view(rank, *down.shape[1:]).to("cpu", down.dtype),
        "lora_up.weight": new_up.view(up.shape[0], rank, *up.shape[2:]).to("cpu", up.dtype),
        "alpha": torch.tensor(scale * rank),
    }, row


def resized_metadata(lora: LoraFile, rows: list[Resized], rule: RankRule) -> dict[str, str]:
    """The file's own, with the rank, alpha and a comment that are now true."""
    ranks = {row.new_rank for row in rows}
    was = lora.metadata.get("ss_network_dim", str(max(row.old_rank for row in rows)))
    how = f", {rule.method} {rule.value:g}" if rule.method else ""
    comment = f"rank made smaller, from {was} to at most {rule.most}{how}"
    before = lora.metadata.get("ss_training_comment", "None")
    changed = {
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": "Dynamic",
        "ss_training_comment": comment if before in ("", "None") else f"{comment}; {before}",
    }
    return {**lora.metadata, **changed}


def report(rows: list[Resized]) -> str:
    cells: list[tuple[str, ...]] = [("layer", "rank", "new", "norm", "kept")]
    for row in rows:
        cells.append((row.name, str(row.old_rank), str(row.new_rank), f"{row.norm:.4g}", f"{100 * row.kept:.2f} %"))
    total = sum(row.norm**2 for row in rows)
    kept = (sum((row.norm * row.kept) ** 2 for row in rows) / total) ** 0.5 if total else 1.0
    old, new = (sum(getattr(row, key) for row in rows) / len(rows) for key in ("old_rank", "new_rank"))
    cells.append(
        (f"{len(rows)} layers, mean rank", f"{old:.1f}", f"{new:.1f}", f"{total**0.5:.4g}", f"{100 * kept:.2f} %")
    )
    return table(cells)


def size_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


if __name__ == "__main__":
    sys.exit(main())
