"""`--network_dim`, `--network_alpha`, `--network_dropout` and `--network_args` of networks.lora_sd3, as `LoraSettings`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from library.common.errors import UserError
from networks.arguments import (
    Parser,
    boolean,
    choice,
    make_settings,
    number,
    probability,
    split_arguments,
    typed_values,
    whole_number,
)

DEFAULT_RANK = 4  # of --network_dim
DEFAULT_CONV_ALPHA = 1.0
MAX_RANK = 65536  # beyond any layer's width: catches a slip of the keyboard
INITS = ("kaiming", "orthogonal", "pissa")
EMBEDDERS = (
    "context_embedder",
    "t_embedder",
    "x_embedder",
    "y_embedder",
    "final_layer_adaLN_modulation",
    "final_layer_linear",
)


@dataclass(frozen=True)
class LoraSettings:
    """Everything that shapes a LoRA for SD3. A rank of None means `rank`, a rank of 0 no LoRA there."""

    rank: int = DEFAULT_RANK
    alpha: float | None = 1.0  # None or 0: the layer's rank, so a scale of 1
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    context_attn_dim: int | None = None
    context_mlp_dim: int | None = None
    context_mod_dim: int | None = None
    x_attn_dim: int | None = None  # covers attn2 too
    x_mlp_dim: int | None = None
    x_mod_dim: int | None = None
    emb_dims: tuple[int, ...] | None = None  # ranks in the order of EMBEDDERS
    conv_dim: int | None = None  # in place of the rank that emb_dims gives x_embedder, the one convolution
    conv_alpha: float = DEFAULT_CONV_ALPHA
    train_block_indices: frozenset[int] | None = None  # None: all blocks
    split_qkv: bool = False
    train_t5xxl: bool = False
    use_dora: bool = False
    use_rslora: bool = False
    init: str = "kaiming"
    loraplus_lr_ratio: float | None = None
    loraplus_unet_lr_ratio: float | None = None
    loraplus_text_encoder_lr_ratio: float | None = None
    verbose: bool = False


def embedder_ranks(text: str) -> tuple[int, ...]:
    """ "[2,3,4,5,6,7]", with or without brackets, as six ranks."""
    expected = f"six whole numbers such as [4,0,0,4,0,0], for {', '.join(EMBEDDERS)}"
    inner = text.strip()
    if inner.startswith("[") and inner.endswith("]"):
        inner = inner[1:-1]
    parse = whole_number(0, MAX_RANK)
    try:
        ranks = tuple(parse(part) for part in inner.split(","))
    except ValueError:
        raise ValueError(expected) from None
    if len(ranks) != len(EMBEDDERS):
        raise ValueError(expected)
    return ranks


def block_indices(text: str) -> frozenset[int] | None:
    """ "all" -> None, "none" or "" -> no block, "1,2,6-8" -> {1, 2, 6, 7, 8}."""
    word = text.strip().lower().strip("[]").strip()
    if word == "all":
        return None
    if word in ("none", ""):
        return frozenset()
    blocks: set[int] = set()
    for part in word.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise ValueError("all, none, or block numbers and rising ranges such as 0,1,4-7")
        blocks.update(range(first, last + 1))
    return frozenset(blocks)


_rank = whole_number(0, MAX_RANK)
_ratio = number(1e-6, 1e6, "a positive number")
PARSERS: Mapping[str, Parser] = {
    "context_attn_dim": _rank,
    "context_mlp_dim": _rank,
    "context_mod_dim": _rank,
    "x_attn_dim": _rank,
    "x_mlp_dim": _rank,
    "x_mod_dim": _rank,
    "emb_dims": embedder_ranks,
    "conv_dim": _rank,
    "conv_alpha": number(0.0, expected="a number of at least 0"),
    "train_block_indices": block_indices,
    "split_qkv": boolean,
    "train_t5xxl": boolean,
    "use_dora": boolean,
    "use_rslora": boolean,
    "init": choice(*INITS),
    "dropout": probability(),
    "rank_dropout": probability(),
    "module_dropout": probability(),
    "loraplus_lr_ratio": _ratio,
    "loraplus_unet_lr_ratio": _ratio,
    "loraplus_text_encoder_lr_ratio": _ratio,
    "verbose": boolean,
}


def read_settings(
    texts: Mapping[str, object],
    network_dim: int | None = None,
    network_alpha: float | None = 1.0,
    neuron_dropout: float | None = None,
    depth: int | None = None,
) -> LoraSettings:
    """Settings from the three options and the texts of `--network_args` by key. UserError with every problem at once.

    depth: the model's number of blocks, to check train_block_indices against; None leaves that check out.
    """
    values, problems = typed_values(texts, PARSERS)
    problems += _range_problems(values, network_dim, network_alpha, neuron_dropout, depth)
    if problems:
        raise UserError(problems)
    if neuron_dropout is not None:
        values["dropout"] = neuron_dropout
    values["rank"] = DEFAULT_RANK if network_dim is None else network_dim
    return make_settings(LoraSettings, {"alpha": network_alpha, **values})


def check_network_args(
    args: Iterable[str] | None, depth: int | None = None, max_norm: float | None = None
) -> list[str]:
    """What is wrong with `--network_args`, a sentence each; needs no model.

    depth: number of blocks, as read from the checkpoint's header; max_norm: --scale_weight_norms, if given.
    """
    texts, problems = split_arguments(args or [])
    values, more = typed_values(texts, PARSERS)
    problems += more + _range_problems(values, None, 1.0, None, depth)
    if max_norm is not None and values.get("init") == "pissa":
        problems.append(
            "--scale_weight_norms can't cap a LoRA with init=pissa, whose change starts as a difference: leave one out."
        )
    return problems


def trains_t5xxl(args: Iterable[str] | None) -> bool:
    """Whether `--network_args` ask for a LoRA on T5 (the default is no). What is wrong with them is for `check_network_args`."""
    texts, _ = split_arguments(args or [])
    values, _ = typed_values({"train_t5xxl": texts.get("train_t5xxl", "false")}, {"train_t5xxl": boolean})
    return bool(values.get("train_t5xxl", False))


def _range_problems(
    values: Mapping[str, object],
    network_dim: int | None,
    network_alpha: float | None,
    neuron_dropout: float | None,
    depth: int | None,
) -> list[str]:
    problems = []
    if network_dim is not None and not 0 <= network_dim <= MAX_RANK:
        problems.append(f"--network_dim must be from 0 to {MAX_RANK}, not {network_dim}.")
    if network_alpha is not None and not 0 <= network_alpha < float("inf"):
        problems.append(f"--network_alpha must be a number of at least 0, not {network_alpha}.")
    if neuron_dropout is not None and not 0 <= neuron_dropout < 1:
        problems.append(f"--network_dropout must be from 0 to below 1, not {neuron_dropout}.")
    if neuron_dropout is not None and values.get("dropout", neuron_dropout) != neuron_dropout:
        problems.append("--network_dropout and dropout in --network_args are the same thing and differ: give one.")
    blocks = values.get("train_block_indices")
    if isinstance(blocks, frozenset) and depth is not None:
        beyond = sorted(block for block in blocks if block >= depth)
        if beyond:
            names = ", ".join(map(str, beyond))
            problems.append(
                f"--network_args: train_block_indices names {names}; this model has blocks 0 to {depth - 1}."
            )
    return problems
