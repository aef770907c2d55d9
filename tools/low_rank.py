"""Matrices of low rank: the best ones near a given matrix or product, and how high a rank is enough."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from library.common.errors import UserError


def _by_energy(s: Tensor, share: float) -> int:
    return _first_reaching(s.square().cumsum(0) / s.square().sum(), share)


def _by_frobenius(s: Tensor, share: float) -> int:
    return _by_energy(s, share**2)


def _by_sum(s: Tensor, share: float) -> int:
    return _first_reaching(s.cumsum(0) / s.sum(), share)


def _by_ratio(s: Tensor, ratio: float) -> int:
    return int((s * ratio >= s[0]).sum())


def _first_reaching(shares: Tensor, share: float) -> int:
    return int((shares < share - 1e-12).sum()) + 1


METHODS: Mapping[str, tuple[Callable[[Tensor, float], int], str]] = MappingProxyType(
    {
        "energy": (_by_energy, "the share of the squared norm to keep, 0.95 say"),
        "sv_fro": (_by_frobenius, "the share of the Frobenius norm to keep, 0.97 say"),
        "sv_cumulative": (_by_sum, "the share of the sum of singular values to keep, 0.9 say"),
        "sv_ratio": (_by_ratio, "drop singular values this many times smaller than the largest, 20 say"),
    }
)


ROUNDING = 1e-6


@dataclass(frozen=True)
class RankRule:
    """The rank for a layer, from its singular values. Those below float32's resolution, ROUNDING of the first, are none."""

    most: int
    method: str | None = None  # a key of METHODS; None: always `most`
    value: float = 0.0

    def rank(self, s: Tensor) -> int:
        """s: float64 [n], falling. At least 1, at most `most` and the number of values that are not rounding."""
        nonzero = int((s > s[0] * ROUNDING).sum()) if s[0] > 0 else 1
        rank = self.most
        if self.method is not None and s[0] > 0:
            rank = METHODS[self.method][0](s, self.value)
        return max(1, min(rank, self.most, nonzero))


@dataclass(frozen=True)
class Decomposition:
    """up @ down [out, in] by singular values: u [out, n], s [n] falling, v [n, in], float64."""

    u: Tensor
    s: Tensor
    v: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Down [rank, in] and Up [out, rank] of the best matrix of that rank, each with the root of the singular values; float32."""
        root = self.s[:rank].sqrt()
        return (root[:, None] * self.v[:rank]).float(), (self.u[:, :rank] * root).float()

    def kept(self, rank: int) -> float:
        """The share of the Frobenius norm that this rank keeps."""
        total = self.s.square().sum()
        return math.sqrt(self.s[:rank].square().sum() / total) if total > 0 else 1.0


def decompose_product(up: Tensor, down: Tensor) -> Decomposition:
    """The SVD of up [out, r] @ down [r, in] without making the product: by QR of both, then a matrix of r x r."""
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().t())
    u, s, v = torch.linalg.svd(r_up @ r_down.t(), full_matrices=False)
    return Decomposition(q_up @ u, s, v @ q_down.t())


def decompose(matrix: Tensor, most: int) -> Decomposition:
    """The singular values of a matrix [out, in], all of them, and the `most` first vectors.

    From the eigenvalues of the smaller of A A' and A' A in float64: many times quicker than an SVD of a wide matrix, and true
    to 1e-8 of the largest singular value.
    """
    a = matrix.double()
    if a.shape[0] > a.shape[1]:
        turned = decompose(matrix.t(), most)
        return Decomposition(turned.v.t(), turned.s, turned.u.t())
    squares, vectors = torch.linalg.eigh(a @ a.t())  # rising
    s = squares.flip(0).clamp(min=0).sqrt()
    u = vectors.flip(1)[:, :most]
    v = (u.t() @ a) / s[: u.shape[1], None].clamp(min=torch.finfo(torch.float64).tiny)
    return Decomposition(u, s, v)


def add_rule_options(parser: argparse.ArgumentParser) -> None:
    """--dynamic_method and --dynamic_param."""
    meanings = "; ".join(f"{name}: {meaning}" for name, (_, meaning) in METHODS.items())
    parser.add_argument(
        "--dynamic_method",
        choices=list(METHODS),
        help="choose each layer's rank by its singular values, up to the given rank",
    )
    parser.add_argument("--dynamic_param", type=float, metavar="X", help=f"the value for --dynamic_method; {meanings}")


def rule_from(most: int, option: str, method: str | None, value: float | None) -> RankRule:
    """UserError where the values make no rule. option: the name of the option for `most`."""
    if most < 1:
        raise UserError(f"{option} must be 1 or more, not {most}.")
    if (method is None) != (value is None):
        raise UserError("--dynamic_method and --dynamic_param belong together: give both or neither.")
    if method == "sv_ratio" and (value or 0) < 1:
        raise UserError(f"--dynamic_param {value:g}: a ratio of singular values is 1 or more.")
    if method not in (None, "sv_ratio") and not 0 < (value or 0) <= 1:
        raise UserError(f"--dynamic_param {value:g}: a share is above 0 and at most 1.")
    return RankRule(most, method, value or 0.0)


def device_from(text: str | None) -> torch.device:
    """--device; without it the first CUDA device if there is one."""
    name = text or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).tolist()
    except (RuntimeError, ValueError, AssertionError):
        raise UserError(f"--device {name}: there is no such device here. cpu always works.") from None
    return device
