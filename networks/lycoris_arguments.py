"""`--network_args` of `--network_module=lycoris.kohya`: LyCORIS's own names, checked, with SD3's defaults."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

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
from networks.lora_arguments import DEFAULT_RANK, MAX_RANK

# what ComfyUI and the clients built on it read
ALGORITHMS = ("lora", "locon", "loha", "lokr", "glora", "full", "diag-oft", "boft")
REFUSED_ALGORITHMS = {
    "dylora": "LyCORIS 4.1 runs it at a random rank outside training too and can't load its own files",
    "ia3": "no client reads its files",
    "tlora": "no client reads its files",
}
FACTORED = ("lora", "locon", "loha", "lokr", "glora")  # act on activations; the others rebuild the weight
WITH_DORA = ("lora", "locon", "loha", "lokr")
OFTEN_ALL_DROPPED = 1e-7  # of a layer's steps; hundreds of layers make it a step in tens of thousands
PRESETS = ("full", "full-lin", "attn-mlp", "attn-only", "unet-only", "unet-transformer-only")
REFUSED = {
    "block_size": "it is for algo=dylora alone, which is not supported here",
    "train_norm": "SD3's norms have no weights that LyCORIS can train",
    "constraint": "readers take its unit differently, so the file would act otherwise than in training",
    "constrain": "readers take its unit differently, so the file would act otherwise than in training",
    "rescaled": "readers leave the rescaling out, so the file would act otherwise than in training",
    "train_llm_adapter": "SD3 has no such part",
}
_ratio = number(1e-6, 1e6, "a positive number")


def _algorithm(text: str) -> str:
    word = text.strip().lower()
    if word in REFUSED_ALGORITHMS:
        raise ValueError(f"one of {', '.join(ALGORITHMS)} ({word} is not supported: {REFUSED_ALGORITHMS[word]})")
    return choice(*ALGORITHMS)(word)


def _preset(text: str) -> str:
    if text in PRESETS or text.lower().endswith(".toml"):
        return text
    raise ValueError(f"one of {', '.join(PRESETS)}, or the path of a .toml file")


PARSERS: Mapping[str, Parser] = {
    "algo": _algorithm,
    "preset": _preset,
    "conv_dim": whole_number(0, MAX_RANK),
    "conv_alpha": number(0.0, expected="a number of at least 0"),
    "dropout": probability(),
    "rank_dropout": probability(),
    "rank_dropout_scale": boolean,
    "module_dropout": probability(),
    "use_tucker": boolean,
    "use_cp": boolean,
    "use_conv_cp": boolean,
    "use_scalar": boolean,
    "factor": whole_number(-1, MAX_RANK),
    "decompose_both": boolean,
    "full_matrix": boolean,
    "unbalanced_factorization": boolean,
    "dora_wd": boolean,
    "wd_on_output": boolean,
    "bypass_mode": boolean,
    "rs_lora": boolean,
    "train_t5xxl": boolean,
    "loraplus_lr_ratio": _ratio,
    "loraplus_unet_lr_ratio": _ratio,
    "loraplus_text_encoder_lr_ratio": _ratio,
    "verbose": boolean,
}


@dataclass(frozen=True)
class LycorisSettings:
    """Settings of a LyCORIS network. Names are LyCORIS's; see its documentation for the algorithms' own options."""

    rank: int = DEFAULT_RANK
    alpha: float | None = 1.0
    algo: str = "lora"
    preset: str | None = None  # None: the same layers as networks.lora_sd3
    conv_dim: int | None = None  # None: the rank
    conv_alpha: float | None = None  # None: alpha
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_tucker: bool = False
    dora_wd: bool = False
    train_t5xxl: bool = False
    bypass: bool = True  # change activations; False: rebuild the changed weight at each forward
    loraplus_lr_ratio: float | None = None
    loraplus_unet_lr_ratio: float | None = None
    loraplus_text_encoder_lr_ratio: float | None = None
    verbose: bool = False
    options: Mapping[str, object] = field(default_factory=dict)  # passed to LyCORIS's modules unchanged


def read_settings(
    texts: Mapping[str, object],
    network_dim: int | None = None,
    network_alpha: float | None = 1.0,
    neuron_dropout: float | None = None,
) -> LycorisSettings:
    """Settings from `--network_dim`, `--network_alpha`, `--network_dropout` and `--network_args`. UserError with every problem."""
    values, problems = typed_values({k: v for k, v in texts.items() if k not in REFUSED}, PARSERS)
    problems += _conflicts({k: str(v) for k, v in texts.items()}, values, neuron_dropout)
    if network_dim is not None and not 1 <= network_dim <= MAX_RANK:
        problems.append(f"--network_dim must be from 1 to {MAX_RANK} for LyCORIS, not {network_dim}.")
    rank = DEFAULT_RANK if network_dim is None else network_dim
    problems += _rank_dropout_problems(values, rank)
    if problems:
        raise UserError(problems)
    algo = values.pop("algo", "lora")
    dora = values.get("dora_wd", False)
    bypass = values.pop("bypass_mode", algo in FACTORED and not dora)
    tucker = True in [values.pop(name, False) for name in ("use_tucker", "use_cp", "use_conv_cp")]
    if neuron_dropout is not None:
        values["dropout"] = neuron_dropout
    own = {name: values.pop(name) for name in tuple(values) if name in LycorisSettings.__dataclass_fields__}
    # one magnitude per input: the form of DoRA on which readers agree (see networks.dora)
    wd_on_out = values.pop("wd_on_output", False)
    options = {"rank_dropout_scale": False, "wd_on_out": wd_on_out, "weight_decompose": dora, **values}
    chosen = {"rank": rank, "alpha": network_alpha, "algo": algo, "bypass": bypass, "use_tucker": tucker}
    return make_settings(LycorisSettings, {**chosen, "options": options, **own})


def check_network_args(
    args: Iterable[str] | None, depth: int | None = None, max_norm: float | None = None
) -> list[str]:
    """What is wrong with `--network_args`, a sentence each; needs no model and no LyCORIS. See lora_arguments."""
    texts, problems = split_arguments(args or [])
    values, more = typed_values({k: v for k, v in texts.items() if k not in REFUSED}, PARSERS)
    problems += more + _conflicts(texts, values, None)
    if max_norm is not None and values.get("algo") in ("diag-oft", "boft"):
        problems.append(f"--scale_weight_norms can't cap algo={values['algo']}, whose change is a rotation.")
    return problems


def _rank_dropout_problems(values: Mapping[str, object], rank: int) -> list[str]:
    share = values.get("rank_dropout", 0.0)
    if not (values.get("rank_dropout_scale") and values.get("algo", "lora") in ("lora", "locon")):
        return []
    assert isinstance(share, float)
    dropped = share ** max(rank, 1)  # all ranks of a layer at once
    if dropped <= OFTEN_ALL_DROPPED:
        return []
    return [
        f"--network_args: rank_dropout_scale divides by the share of ranks that are kept, and of {rank} ranks none is "
        f"kept too often ({dropped:.0e} of a layer's steps). Leave it out, or raise --network_dim."
    ]


def _conflicts(texts: Mapping[str, str], values: Mapping[str, object], neuron_dropout: float | None) -> list[str]:
    problems = [f"--network_args: {key} is not supported: {REFUSED[key]}." for key in texts if key in REFUSED]
    algo, dora = values.get("algo", "lora"), values.get("dora_wd", False)
    bypass = values.get("bypass_mode", algo in FACTORED and not dora)
    dropout = neuron_dropout or values.get("dropout")
    if dora and algo not in WITH_DORA:
        problems.append(f"--network_args: dora_wd works with {', '.join(WITH_DORA)}, not with {algo}.")
    if bypass and (dora or algo not in FACTORED):
        reason = "dora_wd" if dora else f"algo={algo}"
        problems.append(f"--network_args: bypass_mode=True can't do {reason}, which needs the changed weight.")
    if not bypass and (dropout or values.get("rank_dropout")):
        problems.append(
            "Neuron and rank dropout have no meaning where LyCORIS rebuilds the weight (dora_wd, bypass_mode=False, "
            "algo=full, diag-oft or boft): use module_dropout."
        )
    if "wd_on_output" in values and not dora:
        problems.append("--network_args: wd_on_output says how dora_wd works: give dora_wd=True too.")
    if algo not in ("lora", "locon") and any(key.startswith("loraplus") for key in values):
        problems.append(f"--network_args: the LoRA+ ratios are for lora_up, which algo={algo} does not have.")
    if algo == "glora" and (dropout or values.get("rank_dropout")):
        problems.append("--network_args: algo=glora has no neuron or rank dropout here: use module_dropout.")
    if algo == "lokr" and bypass and values.get("rank_dropout"):
        problems.append("--network_args: algo=lokr has no rank dropout: use dropout or module_dropout.")
    return problems
