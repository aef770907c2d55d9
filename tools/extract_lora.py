#!/usr/bin/env python3
"""Make a LoRA file out of two checkpoints: the difference of the tuned one to the original, layer by layer, by singular values.

    python tools/extract_lora.py --model_org sd3.5_medium.safetensors --model_tuned my_model.safetensors --save_to my_model_lora.safetensors --dim 32

Layers that do not differ are left out. Prints each layer's rank and the share of its difference's norm that the LoRA holds. What no LoRA
can hold (biases, norms, the position table) is counted and left out. Memory holds one layer of both models at a time.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, Python looks into tools/ alone

import torch
from torch import Tensor

from library.common.errors import UserError
from library.common.progress import progress_bar
from library.sd3.checkpoint import ModelFiles, locate_parts
from library.sd3.mmdit_config import MMDiTConfig
from library.sd3.models import shapes_of
from networks.weight_files import listed
from tools.checkpoint_weights import PREFIXES, Weight, WeightReader, lora_weights, open_weights
from tools.lora_files import (
    add_output_options,
    check_target,
    in_precision,
    run_tool,
    save_lora,
    table,
    tool_parser,
)
from tools.low_rank import RankRule, add_rule_options, decompose, device_from, rule_from

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extracted:
    name: str
    rank: int
    norm: float  # of the difference, Frobenius
    relative: float  # the same, as a share of the weight's norm
    kept: float  # share of the difference's norm that the LoRA holds


def main(arguments: list[str] | None = None) -> int:
    parser = tool_parser(__doc__)
    parser.add_argument("--model_org", type=Path, required=True, metavar="FILE", help="the original checkpoint")
    parser.add_argument("--model_tuned", type=Path, required=True, metavar="FILE", help="the one that was tuned")
    parser.add_argument("--dim", type=int, default=16, metavar="N", help="the rank, or the highest one; default: 16")
    add_rule_options(parser)
    parser.add_argument(
        "--min_diff",
        type=float,
        default=1e-6,
        metavar="X",
        help="leave out a layer whose difference's norm is below X times the weight's; default: 1e-6",
    )
    parser.add_argument("--unet_only", action="store_true", help="leave out the text encoders")
    parser.add_argument("--device", help="where to compute, cpu or cuda; default: cuda if there is one")
    add_output_options(parser)
    chosen = parser.parse_args(arguments)

    def work() -> int:
        rule = rule_from(chosen.dim, "--dim", chosen.dynamic_method, chosen.dynamic_param)
        check_target(chosen.save_to, chosen.force, [chosen.model_org, chosen.model_tuned])
        files = locate_parts(chosen.model_org), locate_parts(chosen.model_tuned)
        kind = MMDiTConfig.from_shapes(shapes_of(files[1].mmdit)).kind
        tensors, rows = extract(*files, rule, chosen.min_diff, chosen.unet_only, device_from(chosen.device))
        ready = in_precision(tensors, chosen.save_precision)
        save_lora(chosen.save_to, ready, extracted_metadata(rows, kind, chosen.model_org, chosen.model_tuned))
        print(report(rows))
        print(f"{chosen.save_to}: {len(rows)} layers.")
        return 0

    return run_tool(work)


def extract(
    original: ModelFiles,
    tuned: ModelFiles,
    rule: RankRule,
    min_diff: float,
    unet_only: bool,
    device: torch.device,
) -> tuple[dict[str, Tensor], list[Extracted]]:
    """The tensors of the LoRA in float32, and what became of each layer. UserError where the models don't fit or are the same."""
    theirs, ours = lora_weights(original), lora_weights(tuned)
    _check_same_kind(theirs, ours, original, tuned)
    names = [name for name in ours if name in theirs and (not unet_only or name.startswith(PREFIXES["mmdit"]))]
    absent = [name for name in ours if name not in theirs]
    if absent and not unet_only:
        logger.warning(
            "%d layers are in the tuned model alone, so they have no difference: %s", len(absent), listed(absent)
        )
    tensors: dict[str, Tensor] = {}
    rows = []
    with ExitStack() as stack:
        before = stack.enter_context(open_weights(original.mmdit.path))
        after = stack.enter_context(open_weights(tuned.mmdit.path))
        others = _other_differences(before, after, original, tuned)
        for name in progress_bar(names, "Extracting"):
            weight, old = ours[name], before.read(theirs[name]).to(device)
            change = after.read(weight).to(device) - old
            norm, size = float(change.norm()), float(old.norm())
            if not change.isfinite().all():
                raise UserError(f"{name} has NaN or infinite values in one of the models.")
            if norm <= min_diff * size:
                continue
            decomposed = decompose(change.flatten(1), rule.most)
            rank = rule.rank(decomposed.s)
            down, up = (factor.cpu() for factor in decomposed.factors(rank))
            kernel = weight.info.shape[1:]
            tensors[f"{name}.lora_down.weight"] = down.view(rank, *kernel)
            tensors[f"{name}.lora_up.weight"] = up.view(up.shape[0], rank, *(1,) * (len(kernel) - 1))
            tensors[f"{name}.alpha"] = torch.tensor(float(rank))
            rows.append(Extracted(name, rank, norm, norm / size if size else 1.0, decomposed.kept(rank)))
    if not rows:
        raise UserError(
            f"{original.mmdit.path} and {tuned.mmdit.path} have the same weights: there is nothing to extract."
        )
    if others:
        logger.warning("%d tensors differ that no LoRA can hold; they are left out: %s", len(others), listed(others))
    return tensors, rows


def _check_same_kind(
    theirs: Mapping[str, Weight], ours: Mapping[str, Weight], original: ModelFiles, tuned: ModelFiles
) -> None:
    wrong = [n for n in ours if n in theirs and ours[n].info.shape != theirs[n].info.shape]
    unet = {name for name in ours.keys() ^ theirs.keys() if name.startswith(PREFIXES["mmdit"])}
    if wrong or unet:
        names = listed(sorted([*wrong, *unet]))
        raise UserError(
            f"{original.mmdit.path} and {tuned.mmdit.path} are models of different kinds or sizes, so they have no "
            f"difference. These layers do not match: {names}."
        )


def _other_differences(before: WeightReader, after: WeightReader, original: ModelFiles, tuned: ModelFiles) -> list[str]:
    """Small tensors of the MMDiT (biases, norms, the position table) that differ."""
    layers = {weight.stored for weight in lora_weights(tuned).values()}
    differing = []
    for key in tuned.mmdit.tensors:
        name = tuned.mmdit.stored_name(key)
        if name not in layers and key in original.mmdit.tensors:
            old, new = before.stored(original.mmdit.stored_name(key)), after.stored(name)
            if old.shape != new.shape or not torch.allclose(old.float(), new.float(), rtol=1e-2, atol=1e-4):
                differing.append(key)
    return differing


def extracted_metadata(rows: list[Extracted], kind: str, original: Path, tuned: Path) -> dict[str, str]:
    ranks = {row.rank for row in rows}
    dim = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    return {
        "ss_v2": "False",
        "ss_base_model_version": kind,
        "ss_network_module": "networks.lora_sd3",
        "ss_network_dim": dim,
        "ss_network_alpha": dim,
        "ss_training_comment": f"extracted from {tuned.name}, as its difference to {original.name}",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"stable-diffusion-3-{kind}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": tuned.stem,
    }


def report(rows: list[Extracted]) -> str:
    cells: list[tuple[str, ...]] = [("layer", "rank", "norm", "of weight", "kept")]
    for row in rows:
        share = f"{100 * row.relative:.3g} %"
        cells.append((row.name, str(row.rank), f"{row.norm:.4g}", share, f"{100 * row.kept:.2f} %"))
    total = sum(row.norm**2 for row in rows) ** 0.5
    kept = sum((row.norm * row.kept) ** 2 for row in rows) ** 0.5 / total
    mean = sum(row.rank for row in rows) / len(rows)
    cells.append((f"{len(rows)} layers, mean rank", f"{mean:.1f}", f"{total:.4g}", "", f"{100 * kept:.2f} %"))
    return table(cells)


if __name__ == "__main__":
    sys.exit(main())
