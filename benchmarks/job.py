"""A training job of any size on random weights, put together from the trainer's own parts by the trainer's own options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import repeat

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from library.common.errors import UserError
from library.common.seeds import StepGenerators, seed_everything
from library.data.batch import Batch
from library.distributed.gradients import GradientReducer
from library.distributed.launch import AcceleratorSettings, make_accelerator
from library.memory.apply import apply_memory_optimizations
from library.memory.block_swap import BlockSwapper
from library.options.resolve import resolve_options
from library.preflight.network import make_network
from library.preflight.settings.models import memory_settings, network_settings
from library.preflight.settings.plan import rate_settings
from library.preflight.settings.training import flow_settings, loss_settings, scheduler_settings
from library.sd3.mmdit import MMDiT
from library.sd3.mmdit_config import HEAD_SIZE, MMDiTConfig
from library.training.optimizers import build_optimizer
from library.training.precision import LossScaler, Precision, choose_precision
from library.training.schedulers import build_schedule
from library.training.step import StepSettings, TrainingStep
from library.training.train_progress import StepReport, TrainProgress
from networks.network import Network

PRESETS = {
    "sd3m": MMDiTConfig(24, 1536, 2, 16, 16, 4096, 2048, 6144, 192, False, ()),
    "sd35m": MMDiTConfig(24, 1536, 2, 16, 16, 4096, 2048, 6144, 384, True, tuple(range(13))),
    "sd35l": MMDiTConfig(38, 2432, 2, 16, 16, 4096, 2048, 9728, 192, True, ()),
}
Conditioning = tuple[Tensor, Tensor]
CLIP_TOKENS = 77
ENDLESS = 10**9  # steps


# --- sizes ------------------------------------------------------------------------------------------------------------


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Options that say how large the model is."""
    parser.add_argument("--preset", choices=list(PRESETS), default="sd3m", help="whose sizes (sd3m)")
    parser.add_argument("--scale", type=float, default=1.0, help="make it this much less deep and wide (1)")
    parser.add_argument("--depth", type=int, help="blocks, instead of the preset's")
    parser.add_argument("--hidden_size", type=int, help="channels, a multiple of 64, instead of the preset's")


def sizes(chosen: argparse.Namespace) -> MMDiTConfig:
    """The configuration that the options of `add_sizes` ask for."""
    full = PRESETS[chosen.preset]
    depth = chosen.depth or max(2, round(full.depth * chosen.scale))
    width = chosen.hidden_size or max(HEAD_SIZE, round(full.hidden_size * chosen.scale / HEAD_SIZE) * HEAD_SIZE)
    if width % HEAD_SIZE or depth < 1:
        raise SystemExit(f"--hidden_size must be a multiple of {HEAD_SIZE}, --depth at least 1.")
    dual = round(len(full.dual_attention_blocks) * depth / full.depth)
    return replace(
        full, depth=depth, hidden_size=width, mlp_hidden_size=4 * width, dual_attention_blocks=tuple(range(dual))
    )


def random_model(config: MMDiTConfig, dtype: torch.dtype, seed: int = 0) -> MMDiT:
    """A frozen model of noise on the CPU: weights of the size that keeps activations near 1, biases and tables small."""
    with torch.device("meta"):
        model = MMDiT(config)
    noise = torch.randn(2**20 - 3, generator=torch.Generator().manual_seed(seed))  # no period that divides a row
    tensors = {}
    for name, empty in model.state_dict().items():
        centre = 1.0 if name.endswith(("ln_q.weight", "ln_k.weight")) else 0.0
        size = empty[0].numel() ** -0.5 if empty.dim() > 1 and name != "pos_embed" else 0.1
        values = (centre + size * noise).to(dtype)
        times = -(-empty.numel() // values.numel())
        tensors[name] = values.repeat(times)[: empty.numel()].view(empty.shape).clone()
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.requires_grad_(False).eval()


# --- options ----------------------------------------------------------------------------------------------------------


def training_options(words: Sequence[str]) -> argparse.Namespace:
    """The trainer's options, from its own parser and checks. UserError for what is wrong with them.

    The model, the data, the folder and the length of the run need no words: the benchmark sets them.
    """
    fixed = [
        *(
            "--pretrained_model_name_or_path",
            "random",
            "--train_data_dir",
            ".",
            "--output_dir",
            ".",
            "--output_name",
            "x",
        ),
        *("--max_train_steps", str(ENDLESS), "--network_module", "networks.lora_sd3", "--network_train_unet_only"),
        *("--resolution", "1024", "--caption_extension", ".txt"),
    ]
    resolved = resolve_options([*fixed, *words])
    problems = list(resolved.problems)
    if resolved.args.memory_plan or resolved.args.blocks_to_swap == "auto":
        problems.append("A benchmark measures what it is told: give --blocks_to_swap a number, and no --memory_plan.")
    if problems:
        raise UserError(problems)
    return resolved.args


# --- the job ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A batch."""

    batch: int
    height: int  # pixels
    width: int
    text_tokens: int

    @classmethod
    def of(cls, args: argparse.Namespace, side: int) -> Shape:
        return cls(args.train_batch_size, side, side, CLIP_TOKENS + args.t5xxl_max_token_length)


@dataclass
class Job:
    """A model with its network and optimizer, ready for one step after another."""

    model: MMDiT
    network: Network
    swapper: BlockSwapper | None
    training_step: TrainingStep[Conditioning]
    batch: Batch
    progress: TrainProgress

    def step(self) -> StepReport:
        """One optimizer step: forward, backward, clip, step."""
        count = self.training_step.settings.accumulation
        samples = [len(self.batch.paths)] * count
        report = self.training_step(self.progress, repeat(self.batch, count), samples)
        self.progress = report.progress
        return report


def make_job(config: MMDiTConfig, args: argparse.Namespace, shape: Shape, device: torch.device) -> Job:
    """Model, network, optimizer and loop as the trainer makes them, on `device`."""
    precision = choose_precision(args.mixed_precision, args.full_fp16, args.full_bf16, device)
    model = random_model(config, precision.dtype)
    settings = memory_settings(args, config.depth)
    swapper = apply_memory_optimizations(model, settings, device)
    seed_everything(args.seed or 0)
    network = make_network(network_settings(args), [None] * 3, model).to(device, precision.trained_dtype).train()
    network.attach()
    groups = network.parameter_groups(rate_settings(args).rates(train_t5xxl=False))
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = build_optimizer(args.optimizer_type, groups, args.learning_rate, args.optimizer_args)
    schedule = build_schedule(
        scheduler_settings(args, ENDLESS), optimizer.optimizer, optimizer.is_schedule_free, optimizer.forced_schedule
    )
    optimizer.train()
    accumulation = args.gradient_accumulation_steps
    step = TrainingStep(
        StepSettings(accumulation, args.max_grad_norm, args.seed or 0, flow_settings(args), loss_settings(args)),
        make_accelerator(AcceleratorSettings(precision.mixed_precision, accumulation)),
        RandomBatchModel(model, network),
        parameters,
        optimizer,
        schedule,
        GradientReducer(parameters, 1),
        scaler=LossScaler(device) if precision.scale_loss else None,
    )
    return Job(model, network, swapper, step, random_batch(config, shape, precision, device), TrainProgress())


@dataclass(frozen=True)
class RandomBatchModel:
    """The model family of a `random_batch`, which holds its latents and its conditioning."""

    model: MMDiT
    network: Network

    def batch_latents(self, batch: Batch, generators: StepGenerators) -> Tensor:
        assert batch.latents is not None
        return batch.latents

    def conditioning(self, batch: Batch, generators: StepGenerators, training: bool) -> Conditioning:
        return conditioning_of(batch)

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return self.model(noisy, timesteps, *conditioning)

    def set_multiplier(self, multiplier: float) -> None:
        return

    def base_model(self) -> AbstractContextManager[object]:
        return self.network.disable_adapters()


def conditioning_of(batch: Batch) -> Conditioning:
    """The context [B, L, 4096] and the pooled text [B, 2048] of a `random_batch`."""
    assert batch.text is not None
    return batch.text["context"], batch.text["pooled"]


def random_batch(config: MMDiTConfig, shape: Shape, precision: Precision, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(1)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    context = noise(shape.batch, shape.text_tokens, config.context_size).to(precision.dtype)
    pooled = noise(shape.batch, config.pooled_size).to(precision.dtype)
    latents = noise(shape.batch, config.in_channels, shape.height // 8, shape.width // 8)
    weights = torch.ones(shape.batch, device=device)
    return Batch(
        images=None,
        latents=latents,
        captions=[""] * shape.batch,
        text={"context": context, "pooled": pooled},
        mask=None,
        loss_weights=weights,
        preserve=None,
        network_multiplier=1.0,
        paths=[f"{number}.png" for number in range(shape.batch)],
        size=(shape.width, shape.height),
    )


# --- work -------------------------------------------------------------------------------------------------------------


def model_flops(config: MMDiTConfig, args: argparse.Namespace, shape: Shape) -> int:
    """Operations of a step's forward and backward, optimizer aside: what the model needs, without recomputation.

    The model and its network run once on the meta device, with shapes alone, and torch counts. Two for each multiplication
    with its addition; attention counts as two matmuls forward and four backward.
    """
    with torch.device("meta"):
        model = MMDiT(config).requires_grad_(False)
    network = make_network(network_settings(args), [None] * 3, model)
    network.train().attach()
    context = torch.empty(shape.batch, shape.text_tokens, config.context_size, device="meta")
    pooled = torch.empty(shape.batch, config.pooled_size, device="meta")
    noisy = torch.empty(shape.batch, config.in_channels, shape.height // 8, shape.width // 8, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(noisy, torch.empty(shape.batch, device="meta"), context, pooled).float().square().mean().backward()
    return counter.get_total_flops() * args.gradient_accumulation_steps
