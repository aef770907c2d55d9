#!/usr/bin/env python3
"""Merge LoRA files, each with its ratio: into a checkpoint, or into one LoRA file.

    python tools/merge_lora.py --models style.safetensors --ratios 0.8 --base_model sd3.5_medium.safetensors --save_to merged.safetensors
    python tools/merge_lora.py --models style.safetensors person.safetensors --ratios 0.7 1 --save_to both.safetensors

Into a checkpoint: the layers are changed in float32 and stored as they were; every other tensor, name and byte stays. Memory
holds one layer at a time. All kinds of LoRA and LyCORIS files that the trainer reads can be merged.

Into one LoRA: exact, as the ranks are put beside each other (so they add up); --new_rank takes the nearest LoRA of that rank
instead. This is for plain LoRA files; a DoRA depends on the checkpoint and can be merged into one alone.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, Python looks into tools/ alone

import torch
from torch import Tensor

from library.common.errors import Problems, UserError
from library.common.progress import progress_bar
from library.common.safetensors_header import read_header
from library.sd3.checkpoint import locate_parts
from networks.diffusers_layout import scaled
from networks.lora_file import LoraFile, read_lora
from networks.merging import check_change, merged_weight
from networks.weight_files import listed
from tools.checkpoint_weights import TITLES, Weight, as_stored, lora_weights, open_weights
from tools.lora_files import (
    add_output_options,
    check_target,
    in_precision,
    rewrite_safetensors,
    run_tool,
    save_lora,
    tool_parser,
)
from tools.low_rank import RankRule, add_rule_options, decompose_product, device_from, rule_from

logger = logging.getLogger(__name__)
PLAIN = {"lora_down.weight", "lora_up.weight", "alpha"}


def main(arguments: list[str] | None = None) -> int:
    parser = tool_parser(__doc__)
    parser.add_argument("--models", type=Path, nargs="+", required=True, metavar="FILE", help="the LoRA files")
    parser.add_argument(
        "--ratios", type=float, nargs="+", metavar="X", help="the strength of each LoRA, in the same order; default: 1"
    )
    parser.add_argument(
        "--base_model", "--sd_model", type=Path, metavar="FILE", help="merge into this checkpoint (.safetensors)"
    )
    parser.add_argument(
        "--skip_missing",
        action="store_true",
        help="with --base_model: leave out the layers of text encoders that the checkpoint does not hold",
    )
    parser.add_argument("--new_rank", type=int, metavar="N", help="without --base_model: the rank, or the highest one")
    add_rule_options(parser)
    parser.add_argument("--device", help="where to compute, cpu or cuda; default: cuda if there is one")
    add_output_options(parser)
    chosen = parser.parse_args(arguments)

    def work() -> int:
        ratios = chosen.ratios or [1.0] * len(chosen.models)
        if len(ratios) != len(chosen.models):
            raise UserError(f"--ratios has {len(ratios)} values for {len(chosen.models)} files in --models.")
        base = chosen.base_model
        check_target(chosen.save_to, chosen.force, [*chosen.models, *([base] if base else [])])
        device = device_from(chosen.device)
        if base is None:
            rule = None
            if chosen.new_rank is not None:
                rule = rule_from(chosen.new_rank, "--new_rank", chosen.dynamic_method, chosen.dynamic_param)
            elif chosen.dynamic_method:
                raise UserError("--dynamic_method needs --new_rank, the highest rank.")
            loras = [read_lora(path) for path in chosen.models]
            tensors = merge_loras(loras, ratios, rule, device)
            save_lora(
                chosen.save_to, in_precision(tensors, chosen.save_precision), merged_metadata(loras, ratios, tensors)
            )
            print(f"{chosen.save_to}: {len(chosen.models)} files became one LoRA.")
            return 0
        if chosen.new_rank is not None or chosen.dynamic_method or chosen.save_precision:
            raise UserError(
                "--new_rank, --dynamic_method and --save_precision are for merging into one LoRA: a checkpoint keeps its dtypes."
            )
        loras = [read_lora(path) for path in chosen.models]
        count = merge_into_checkpoint(base, loras, ratios, chosen.save_to, device, chosen.skip_missing)
        print(f"{chosen.save_to}: {count} layers of {base} changed.")
        return 0

    return run_tool(work)


# --- into a checkpoint -------------------------------------------------------------------------------------------------


def merge_into_checkpoint(
    base: Path,
    loras: Sequence[LoraFile],
    ratios: Sequence[float],
    save_to: Path,
    device: torch.device,
    skip_missing: bool = False,
) -> int:
    """Write `base` with the LoRAs merged in, one after another, and return how many layers changed.

    UserError lists every layer that does not fit before anything is written.
    """
    weights = lora_weights(locate_parts(base))
    changes = _fitting(loras, ratios, weights, base, skip_missing)
    with open_weights(base) as reader:

        def changed() -> Iterator[tuple[str, Tensor]]:
            for name in progress_bar(list(changes), "Merging"):
                weight = weights[name]
                value = reader.read(weight).to(device)
                bias = reader.stored(weight.bias).float() if weight.bias else None
                bias_changes = False
                for tensors, ratio in changes[name]:
                    value = merged_weight(value, tensors, ratio)
                    if "diff_b" in tensors and bias is not None:
                        bias, bias_changes = bias + ratio * tensors["diff_b"].float(), True
                yield weight.stored, _finite(reader.in_stored_form(weight, value), name)
                if bias_changes:
                    assert bias is not None and weight.bias is not None and weight.bias_info is not None
                    yield weight.bias, _finite(as_stored(bias, weight.bias_info), name)

        names = ", ".join(f"{lora.path.name} x {ratio:g}" for lora, ratio in zip(loras, ratios))
        metadata = read_header(base).metadata
        kept = {key: value for key, value in metadata.items() if key != "modelspec.hash_sha256"}
        rewrite_safetensors(base, save_to, {**kept, "merged_loras": names}, changed())
    return len(changes)


def _fitting(
    loras: Sequence[LoraFile], ratios: Sequence[float], weights: Mapping[str, Weight], base: Path, skip_missing: bool
) -> dict[str, list[tuple[dict[str, Tensor], float]]]:
    """LoRA name -> the tensors that change this layer and their ratios, in the order of the files."""
    problems = Problems()
    present = {prefix for prefix in TITLES if any(name.startswith(prefix) for name in weights)}
    changes: dict[str, list[tuple[dict[str, Tensor], float]]] = {}
    for lora, ratio in zip(loras, ratios):
        absent: dict[str, list[str]] = {}
        for name, tensors in lora.layers.items():
            prefix = next((prefix for prefix in TITLES if name.startswith(prefix)), "")
            if name in weights:
                problem = check_change(name, tensors, weights[name].empty_layer())
                if problem:
                    problems.add(f"{lora.path}: {problem}")
                changes.setdefault(name, []).append((tensors, ratio))
            elif prefix and prefix not in present:
                absent.setdefault(prefix, []).append(name)
            else:
                problems.add(f"{lora.path}: {name} is no layer of {base}.")
        for prefix, names in absent.items():
            message = f"{lora.path} changes {len(names)} layers of {TITLES[prefix]}, which {base} does not hold"
            if skip_missing:
                logger.warning("%s: they are left out.", message)
            else:
                problems.add(f"{message}. Give a checkpoint with its text encoders, or --skip_missing.")
    del problems.problems[20:]
    problems.raise_if_any()
    return changes


def _finite(tensor: Tensor, name: str) -> Tensor:
    if not bool(tensor.float().isfinite().all()):
        raise UserError(
            f"{name}: the merged weight is beyond the range of {tensor.dtype}, or the LoRA holds NaN. Check the file with "
            "tools/check_lora.py, or give a lower ratio."
        )
    return tensor


# --- into one LoRA -----------------------------------------------------------------------------------------------------


def merge_loras(
    loras: Sequence[LoraFile], ratios: Sequence[float], rule: RankRule | None, device: torch.device
) -> dict[str, Tensor]:
    """One LoRA that does what the files do together: exact with added ranks, or the nearest by `rule`.

    UserError where a file is no plain LoRA or two do not fit each other.
    """
    pairs_by_name: dict[str, list[tuple[Tensor, Tensor]]] = {}  # Down, Up times its strength
    problems = Problems()
    for lora, ratio in zip(loras, ratios):
        layers = lora.layers
        other = [name for name, layer in layers.items() if layer.keys() - PLAIN or len(layer.keys() & PLAIN) < 2]
        if other:
            problems.add(
                f"{lora.path} is not a plain LoRA ({listed(other)}): merge it into a checkpoint, with --base_model."
            )
            continue
        for name, layer in layers.items():
            down, up = layer["lora_down.weight"], layer["lora_up.weight"]
            strength = ratio * (float(layer["alpha"]) / down.shape[0] if "alpha" in layer else 1.0)
            pairs = pairs_by_name.setdefault(name, [])
            if pairs and (pairs[0][0].shape[1:] != down.shape[1:] or pairs[0][1].shape[0] != up.shape[0]):
                problems.add(f"{lora.path}: {name} has another size than in {loras[0].path}. Are they for one model?")
                continue
            pairs.append((down, scaled(up, strength)))
    problems.raise_if_any()
    tensors: dict[str, Tensor] = {}
    for name in progress_bar(list(pairs_by_name), "Merging"):
        downs, ups = zip(*pairs_by_name[name])
        down, up = torch.cat(downs), torch.cat(ups, dim=1)
        if rule is not None:
            dtype, sizes = up.dtype, (down.shape[1:], up.shape[2:])
            decomposed = decompose_product(up.to(device).flatten(1), down.to(device).flatten(1))
            rank = rule.rank(decomposed.s)
            down, up = (factor.to("cpu", dtype) for factor in decomposed.factors(rank))
            down, up = down.view(rank, *sizes[0]), up.view(up.shape[0], rank, *sizes[1])
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(float(down.shape[0]))
    return tensors


def merged_metadata(
    loras: Sequence[LoraFile], ratios: Sequence[float], tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    """The entries that all files share, and those of the new file."""
    first = loras[0].metadata
    common = {key: value for key, value in first.items() if all(lora.metadata.get(key) == value for lora in loras)}
    ranks = {tensor.shape[0] for key, tensor in tensors.items() if key.endswith("lora_down.weight")}
    dim = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    names = ", ".join(f"{lora.path.stem} x {ratio:g}" for lora, ratio in zip(loras, ratios))
    return common | {
        "ss_network_module": first.get("ss_network_module", "networks.lora_sd3"),
        "ss_network_dim": dim,
        "ss_network_alpha": dim,
        "modelspec.title": " + ".join(lora.path.stem for lora in loras),
        "modelspec.merged_from": names,
    }


if __name__ == "__main__":
    sys.exit(main())
