"""From the tensors of a LoRA file to changed weights, by plain arithmetic: what readers such as ComfyUI do.

LoRA with and without a middle factor, DoRA, LoHa and LoKr (Yeh et al. 2024, "LyCORIS", section 3), GLoRA, full differences, and
the rotations OFT and BOFT (Qiu et al. 2023; Liu et al. 2024). All in float32; a layer's tensors come by suffix, as `lora_down.weight` or `alpha`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from library.common.errors import UserError
from networks.dora import EPSILON
from networks.network_layer import BaseLayer, plain_weight

# what tells a layer's kind, and all the suffixes of that kind
KINDS: Mapping[str, tuple[str, ...]] = {
    "lora_down.weight": ("lora_up.weight", "lora_mid.weight", "alpha", "dora_scale"),
    "hada_w1_a": ("hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "alpha", "dora_scale"),
    "lokr_w1": ("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "alpha", "dora_scale"),
    "lokr_w1_a": ("lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "alpha", "dora_scale"),
    "a1.weight": ("a2.weight", "b1.weight", "b2.weight", "alpha"),
    "diff": ("diff_b",),
    "oft_blocks": ("alpha",),
}


def kind_of(tensors: Mapping[str, Tensor]) -> str | None:
    """The suffix that tells the kind of a layer's change, or None for a kind that is not read here."""
    for mark, others in KINDS.items():
        if mark in tensors and not tensors.keys() - {mark, *others}:
            return mark
    return None


def weight_change(tensors: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """The change D of a float32 weight [out, in, ...] at strength 1, before DoRA. KeyError where tensors are incomplete."""
    kind = kind_of(tensors)
    t = {suffix: tensor.to(weight.device, torch.float32) for suffix, tensor in tensors.items()}
    if kind == "diff":
        change, rank = t["diff"], None
    elif kind == "a1.weight":
        a1, a2, b1, b2 = (t[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
        change, rank = torch.einsum("oi...,ij->oj...", weight, a1 @ a2) + (b1 @ b2).view(weight.shape), a2.shape[0]
    elif kind == "hada_w1_a":
        first = _tucker(t.get("hada_t1"), t["hada_w1_a"], t["hada_w1_b"])
        second = _tucker(t.get("hada_t2"), t["hada_w2_a"], t["hada_w2_b"])
        change, rank = first.view(weight.shape) * second.view(weight.shape), t["hada_w1_b"].shape[0]
    elif kind in ("lokr_w1", "lokr_w1_a"):
        change, rank = _kronecker(t, weight)
    elif kind == "lora_down.weight":
        down, up = t["lora_down.weight"], t["lora_up.weight"].flatten(1)
        if "lora_mid.weight" in t:
            change = torch.einsum("or,rs...,si->oi...", up, t["lora_mid.weight"], down.flatten(1))
        else:
            change = (up @ down.flatten(1)).view(weight.shape)
        rank = down.shape[0]
    elif kind == "oft_blocks":
        return _rotation_change(t["oft_blocks"], weight, 1.0)
    else:
        raise KeyError(f"no kind of change has {', '.join(sorted(tensors))}")
    return change * (t["alpha"] / rank) if rank and "alpha" in t else change


def merged_weight(weight: Tensor, tensors: Mapping[str, Tensor], strength: float = 1.0) -> Tensor:
    """A weight [out, in, ...] of any dtype with a layer's change at `strength`, in float32."""
    weight = weight.float()
    if "oft_blocks" in tensors:
        return weight + _rotation_change(tensors["oft_blocks"].to(weight.device, torch.float32), weight, strength)
    change = weight_change(tensors, weight).view(weight.shape)
    if "dora_scale" not in tensors:
        return weight + strength * change
    merged = weight + change
    magnitude = tensors["dora_scale"].to(weight.device, torch.float32)
    per_input = magnitude.shape[0] == 1 and magnitude.numel() == weight.shape[1]
    axes = [axis for axis in range(weight.dim()) if axis != int(per_input)]
    norm: Tensor = torch.linalg.vector_norm(merged, dim=axes, keepdim=True) + EPSILON
    return weight + strength * (merged * (magnitude.view(norm.shape) / norm) - weight)


@torch.no_grad()
def merge_into(layer: BaseLayer, tensors: Mapping[str, Tensor], strength: float = 1.0) -> None:
    """Change a base layer's weight (and bias) in place, computed in float32 and kept in its dtype."""
    if plain_weight(layer) is None:
        raise TypeError("a weight must be merged before it is quantised")
    layer.weight.data = merged_weight(layer.weight, tensors, strength).to(layer.weight.dtype)
    if "diff_b" in tensors and layer.bias is not None:
        change = tensors["diff_b"].to(layer.bias.device, torch.float32)
        layer.bias.data = (layer.bias.float() + strength * change).to(layer.bias.dtype)


def check_change(name: str, tensors: Mapping[str, Tensor], layer: BaseLayer) -> str | None:
    """Why a layer's tensors can't change `layer`, as a sentence, or None. Computes shapes alone."""
    if kind_of(tensors) is None:
        return f"{name} has tensors of a kind that can't be merged here ({', '.join(sorted(tensors))})."
    shape = layer.weight.shape if isinstance(layer, nn.Conv2d) else (layer.out_features, layer.in_features)
    if "diff_b" in tensors and (layer.bias is None or tensors["diff_b"].shape != layer.bias.shape):
        return f"{name} has a diff_b that does not fit the layer's bias."
    if "alpha" in tensors and tensors["alpha"].numel() != 1:
        return f"{name} has an alpha of {list(tensors['alpha'].shape)}, not one number."
    if "oft_blocks" in tensors and float(tensors.get("alpha", 0.0)) != 0:
        return f"{name} is a rotation with a constraint, which readers take differently."
    try:
        meta = {
            suffix: torch.empty(tensor.shape, device="meta") for suffix, tensor in tensors.items() if suffix != "alpha"
        }
        weight_change(meta, torch.empty(shape, device="meta")).view(shape)
        merged_weight(torch.empty(shape, device="meta"), meta)
    except (KeyError, RuntimeError, ValueError, IndexError, TypeError):
        shapes = ", ".join(f"{suffix} {list(tensor.shape)}" for suffix, tensor in sorted(tensors.items()))
        return f"{name} does not fit a layer of {list(shape)}: {shapes}."
    return None


def merge_layers(
    changes: Mapping[str, Mapping[str, Tensor]], layers: Mapping[str, BaseLayer], strength: float, where: str
) -> int:
    """Merge a file's changes by LoRA name into the layers of these names. Returns how many; UserError lists all misfits."""
    problems = [f"{where}: {name} is no layer of this model." for name in changes if name not in layers]
    checks = (check_change(name, tensors, layers[name]) for name, tensors in changes.items() if name in layers)
    problems += [f"{where}: {problem}" for problem in checks if problem]
    if problems:
        raise UserError(_shortened(problems))
    for name, tensors in changes.items():
        merge_into(layers[name], tensors, strength)
    return len(changes)


def _shortened(problems: list[str], most: int = 20) -> list[str]:
    more = len(problems) - most
    return problems[:most] + ([f"… and {more} more."] if more > 0 else [])


def _tucker(core: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """a @ b, or with a core [r, s, ...]: sum over r, s of a[r, out] core[r, s, ...] b[s, in]."""
    return a @ b if core is None else torch.einsum("rs...,ro,si->oi...", core, a, b)


def _rotation_change(blocks: Tensor, weight: Tensor, strength: float) -> Tensor:
    """(R - I) W at `strength`, R by the Cayley transform of blocks - blocks' (Qiu et al. 2023, "OFT", section 3.2).

    blocks [n, b, b]: one block-diagonal rotation of the output channels. [m, n, b, b]: m of them, each after a butterfly
    permutation (Liu et al. 2024, "BOFT", section 4).
    """
    skew = blocks - blocks.transpose(-1, -2)
    identity = torch.eye(blocks.shape[-1], device=blocks.device)
    rotations = torch.linalg.solve(identity - skew, identity + skew, left=False)  # (I + Q) (I - Q)^-1
    if blocks.dim() == 3:
        rows = weight.unflatten(0, blocks.shape[:2])  # [n, b, in, ...]
        return strength * torch.einsum("knm,kn...->km...", rotations - identity, rows).flatten(0, 1)
    rotated = weight
    size = blocks.shape[-1]
    for stage, rotation in enumerate(rotations):
        stride = 2**stage * (size // 2)
        rows = rotated.unflatten(0, (-1, 2, stride)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, size))
        rows = torch.einsum("bij,bj...->bi...", strength * rotation + (1 - strength) * identity, rows)
        rotated = rows.flatten(0, 1).unflatten(0, (-1, stride, 2)).transpose(1, 2).flatten(0, 2)
    return rotated - weight


def _kronecker(t: Mapping[str, Tensor], weight: Tensor) -> tuple[Tensor, int | None]:
    """LoKr's w1 (x) w2 in the weight's shape, and its rank (None where both factors are full: then alpha does not count)."""
    rank = None
    if "lokr_w1" in t:
        w1 = t["lokr_w1"]
    else:
        w1, rank = t["lokr_w1_a"] @ t["lokr_w1_b"], t["lokr_w1_b"].shape[0]
    if "lokr_w2" in t:
        w2 = t["lokr_w2"]
    else:
        w2, rank = _tucker(t.get("lokr_t2"), t["lokr_w2_a"], t["lokr_w2_b"]), t["lokr_w2_b"].shape[0]
    w2 = w2.flatten(1)
    kernel = weight[0, 0].numel()
    blocks = w2.view(w2.shape[0], -1, kernel)  # [k, n, kernel]
    change = torch.einsum("lm,knx->lkmnx", w1, blocks)  # [l, k, m, n, kernel]
    return change.reshape(weight.shape), rank
