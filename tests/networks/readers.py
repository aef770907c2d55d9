"""How ComfyUI turns a file's tensors into a changed weight, written independently from its loaders: one function an algorithm."""

from __future__ import annotations

import torch
from torch import Tensor


def strength_of(file: dict[str, Tensor], rank: int | None) -> float:
    return file["alpha"].item() / rank if rank is not None and "alpha" in file else 1.0


def lora(weight: Tensor, file: dict[str, Tensor]) -> Tensor:
    up, down = file["lora_up.weight"].flatten(start_dim=1), file["lora_down.weight"].flatten(start_dim=1)
    if "lora_mid.weight" in file:
        mid, thin = file["lora_mid.weight"], file["lora_down.weight"]
        final = [thin.shape[1], thin.shape[0], *mid.shape[2:]]
        down = torch.mm(thin.transpose(0, 1).flatten(1), mid.transpose(0, 1).flatten(1)).reshape(final).transpose(0, 1)
        down = down.flatten(start_dim=1)
    return (up @ down).reshape(weight.shape) * strength_of(file, file["lora_down.weight"].shape[0])


def loha(weight: Tensor, file: dict[str, Tensor]) -> Tensor:
    if "hada_t1" in file:
        m1 = torch.einsum("ijkl,jr,ip->prkl", file["hada_t1"], file["hada_w1_b"], file["hada_w1_a"])
        m2 = torch.einsum("ijkl,jr,ip->prkl", file["hada_t2"], file["hada_w2_b"], file["hada_w2_a"])
    else:
        m1 = file["hada_w1_a"] @ file["hada_w1_b"]
        m2 = file["hada_w2_a"] @ file["hada_w2_b"]
    return (m1 * m2).reshape(weight.shape) * strength_of(file, file["hada_w1_b"].shape[0])


def lokr(weight: Tensor, file: dict[str, Tensor]) -> Tensor:
    rank = None
    if "lokr_w1" in file:
        w1 = file["lokr_w1"]
    else:
        rank = file["lokr_w1_b"].shape[0]
        w1 = file["lokr_w1_a"] @ file["lokr_w1_b"]
    if "lokr_w2" in file:
        w2 = file["lokr_w2"]
    else:
        rank = file["lokr_w2_b"].shape[0]
        w2 = file["lokr_w2_a"] @ file["lokr_w2_b"]
        if "lokr_t2" in file:
            w2 = torch.einsum("ijkl,jr,ip->prkl", file["lokr_t2"], file["lokr_w2_b"], file["lokr_w2_a"])
    if w2.dim() == 4:
        w1 = w1.unsqueeze(2).unsqueeze(2)
    return torch.kron(w1, w2).reshape(weight.shape) * strength_of(file, rank)


def glora(weight: Tensor, file: dict[str, Tensor]) -> Tensor:
    a1, a2, b1, b2 = (file[f"{name}.weight"].flatten(start_dim=1) for name in ("a1", "a2", "b1", "b2"))
    if weight.dim() > 2:
        through = torch.einsum("o i ..., i j -> o j ...", torch.einsum("o i ..., i j -> o j ...", weight, a1), a2)
    else:
        through = weight @ a1 @ a2
    return (b1 @ b2 + through.flatten(1)).reshape(weight.shape) * strength_of(file, a2.shape[0])


def full(weight: Tensor, file: dict[str, Tensor]) -> Tensor:
    return file["diff"]


def rotation(blocks: Tensor) -> Tensor:
    identity = torch.eye(blocks.shape[-1])
    q = blocks - blocks.transpose(-1, -2)
    return (identity + q) @ (identity - q).float().inverse()


def oft(weight: Tensor, file: dict[str, Tensor]) -> Tensor:
    blocks = file["oft_blocks"]
    number, size, _ = blocks.shape
    rows = weight.view(number, size, *weight.shape[1:])
    turned = torch.einsum("k n m, k n ... -> k m ...", rotation(blocks) - torch.eye(size), rows)
    return turned.reshape(weight.shape)


def boft(weight: Tensor, file: dict[str, Tensor]) -> Tensor:
    r = rotation(file["oft_blocks"])
    stages, size = r.shape[0], r.shape[-1]
    rows = weight
    for i in range(stages):
        g, k = 2, 2**i * (size // 2)
        rows = rows.unflatten(0, (-1, g, k)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, size))
        rows = torch.einsum("b i j, b j ... -> b i ...", r[i], rows)
        rows = rows.flatten(0, 1).unflatten(0, (-1, k, g)).transpose(1, 2).flatten(0, 2)
    return rows - weight


BY_MARK = {
    "lora_up.weight": lora,
    "hada_w1_a": loha,
    "lokr_w1": lokr,
    "lokr_w1_a": lokr,
    "a1.weight": glora,
    "diff": full,
    "oft_blocks": oft,
}


def read(weight: Tensor, file: dict[str, Tensor]) -> Tensor:
    """The weight that ComfyUI uses at strength 1."""
    mark = next(mark for mark in BY_MARK if mark in file)
    reader = boft if mark == "oft_blocks" and file["oft_blocks"].dim() == 4 else BY_MARK[mark]
    change = reader(weight, file)
    if "dora_scale" not in file:
        return weight + change
    merged = weight + change
    scale = file["dora_scale"]
    by_output = scale.shape[0] == weight.shape[0]
    normed = weight if by_output else merged
    axes = [axis for axis in range(weight.dim()) if axis != (0 if by_output else 1)]
    norm = normed.pow(2).sum(dim=axes, keepdim=True).sqrt()
    return merged * (scale / (norm + torch.finfo(weight.dtype).eps))
