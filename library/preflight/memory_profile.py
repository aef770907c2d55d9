"""What the parts of a run take, in bytes, from headers and options: every model is measured on the meta device."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from library.caching.fill import encoder_roles
from library.common.errors import UserError
from library.memory.estimator.optimizer_memory import optimizer_cost
from library.memory.estimator.planner import ModelBytes, StepReckoner, TrainedBytes
from library.memory.estimator.step_memory import (
    POLICIES,
    StepShape,
    block_work,
    lora_bytes,
    measure_encoder,
    measure_forward,
    measure_pass,
    measure_vae,
    weight_bytes,
)
from library.memory.estimator.table import Phase
from library.memory.quantization import in_joint_blocks, replace_linears
from library.memory.stand_ins import STAND_INS
from library.preflight.network import make_network
from library.preflight.plan import RunPlan
from library.sd3.checkpoint import ModelFiles
from library.sd3.conditioning import CLIP_TOKENS
from library.sd3.mmdit import MMDiT
from library.sd3.models import empty_mmdit, empty_vae
from library.sd3.text_encoders import checkpoint_layers, empty_encoder
from library.sd3.text_stage import ENCODERS, parse_t5_dtype
from library.training.precision import Precision

STARTS_ANEW = {"network_weights": None}


class MeasuredRun:
    """The parts of a run by their bytes."""

    def __init__(
        self,
        args: argparse.Namespace,
        plan: RunPlan,
        device_type: str,
        precision: Precision,
        processes: int,
        quantisation: str | None,
    ):
        """quantisation: how the denoiser's weights are stored; others can be measured later."""
        self.args, self.plan, self.precision = args, plan, precision
        self.device_type = "cpu" if device_type == "cpu" and args.vram is None else "cuda"
        self.files: ModelFiles = plan.files
        self.shape = self._largest_batch()
        present = [name for name, part in self.files.encoders().items() if part is not None]
        trains = dict(zip(ENCODERS, plan.rates.trained_text_encoders))
        self.roles = encoder_roles(present, trains, args.cache_text_encoder_outputs)
        self.encoders = {name: self._encoder(name) for name in present}
        self.t5_may_move = "t5xxl" in present and not args.t5xxl_device and "t5xxl" not in self.roles.trained
        self.models: dict[str | None, ModelBytes] = {}
        self._measure_training(quantisation, processes)
        self._measure_encoders()
        self._measure_vae()

    def _largest_batch(self) -> StepShape:
        sizes = [
            (w * h * d.settings.batch_size, d.settings.batch_size, h, w)
            for d in self.plan.index.training
            for w, h in d.buckets
        ]
        _, batch, height, width = max(sizes)
        trains_text = any(self.plan.rates.trained_text_encoders)
        return StepShape(batch, height, width, CLIP_TOKENS + self.args.t5xxl_max_token_length, trains_text)

    def _encoder(self, name: str) -> nn.Module:
        part = self.files.encoders()[name]
        assert part is not None
        model = empty_encoder(part)
        if name != "t5xxl":
            return model.to(self.precision.dtype)
        dtype, kind = parse_t5_dtype(self.args.t5xxl_dtype, self.precision.dtype)
        if self.args.fp8_base and not self.args.fp8_base_unet and kind is None:
            kind = "fp8"
        model = model.to(dtype)
        if kind is not None:
            replace_linears(model, STAND_INS[kind], lambda path: ".block." in path)
        return model

    def _network(self, denoiser: nn.Module | None) -> nn.Module:
        """The network on the meta device. The weights that it starts with take no other room."""
        args = self.args if self.args.dim_from_weights else argparse.Namespace(**{**vars(self.args), **STARTS_ANEW})
        encoders = [self.encoders[name] if name in self.roles.trained else None for name in ENCODERS]
        try:
            network = make_network(args, encoders, denoiser)
        except NotImplementedError as error:
            raise UserError(
                f"--memory_plan and --blocks_to_swap auto can't reckon with this network of {args.network_module}, which reads "
                "the base model's weights while it is made. Choose the memory options yourself."
            ) from error
        network.to("meta", self.precision.trained_dtype).train().attach()
        return network

    def _measure_training(self, quantisation: str | None, processes: int) -> None:
        """The denoiser, the network and what they leave for others to know."""
        model, network = self._denoiser_and_network(quantisation)
        self.models[quantisation] = self._model_bytes(model, network)
        self.trained = self._trained_bytes(network, len(model.joint_blocks), processes)
        self.work = tuple(block_work(model, self.shape))
        number = torch.float32 if self.precision.dtype == torch.float16 else self.precision.dtype  # see MMDiT.forward
        self.stream_bytes = self.shape.streams * model.config.hidden_size * number.itemsize
        self.preview_bytes = self._preview_forward(model)

    def measure_quantised(self, quantisation: str) -> bool:
        """Measure the denoiser with another storage too; False where the network needs whole weights."""
        try:
            model, network = self._denoiser_and_network(quantisation)
        except UserError:
            return False
        self.models[quantisation] = self._model_bytes(model, network)
        cast(Any, network).detach()  # the encoders have their network already
        return True

    def _denoiser_and_network(self, quantisation: str | None) -> tuple[MMDiT, nn.Module]:
        model = empty_mmdit(self.files.mmdit).to(self.precision.dtype).requires_grad_(False)
        if quantisation is not None:
            replace_linears(model, STAND_INS[quantisation], in_joint_blocks)
        return model, self._network(model if self.plan.rates.unet > 0 else None)

    def _model_bytes(self, model: MMDiT, network: nn.Module) -> ModelBytes:
        blocks = tuple(weight_bytes(block) for block in model.joint_blocks)
        passes = {policy: measure_pass(model, network, policy, self.shape, self.device_type) for policy in POLICIES}
        return ModelBytes(blocks, weight_bytes(model) - sum(blocks), passes)

    def _trained_bytes(self, network: nn.Module, depth: int, processes: int) -> TrainedBytes:
        args = self.args
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        numbers = sum(parameter.numel() for parameter in parameters)
        cost = optimizer_cost(
            args.optimizer_type, args.learning_rate, args.optimizer_args, self.precision.trained_dtype
        )
        gradients = lora_bytes(network, depth)
        averages = (4 * numbers if args.ema_decay else 0) + (4 * numbers if processes > 1 else 0)
        return TrainedBytes(
            weight_bytes(network),
            tuple(gradients),
            size - sum(gradients),
            int(cost.kept * size),
            averages,
            int(cost.step * size),
        )

    def _preview_forward(self, model: MMDiT) -> int:
        prompts = self.plan.prompts
        if not prompts:
            return 0
        height, width = max(((p.height, p.width) for p in prompts), key=lambda size: size[0] * size[1])
        together = 2 * height * width <= self.shape.batch * self.shape.height * self.shape.width
        shape = replace(self.shape, batch=2 if together else 1, height=height, width=width)
        return measure_forward(model, shape, self.device_type)

    def _measure_encoders(self) -> None:
        """Weights, and what encoding takes beside them: for captions ahead and for a batch in training."""
        args = self.args
        self.encoder_weights = {name: weight_bytes(model) for name, model in self.encoders.items()}
        tokens = dict.fromkeys(ENCODERS, CLIP_TOKENS) | {"t5xxl": args.t5xxl_max_token_length}
        ahead = args.text_encoder_batch_size or 1
        self.ahead, self.kept_by_encoders = {}, 0
        for name, model in self.encoders.items():
            self.ahead[name] = measure_encoder(model, ahead, tokens[name], self.device_type, trained=False)
            if name in self.roles.trained:
                if args.gradient_checkpointing:
                    checkpoint_layers(model)
                self.kept_by_encoders += measure_encoder(
                    model, self.shape.batch, tokens[name], self.device_type, trained=True
                )

    def _measure_vae(self) -> None:
        args, shape = self.args, self.shape
        self.decode_bytes = 0
        assert self.files.vae is not None
        vae = empty_vae(self.files.vae).to(torch.float32 if args.no_half_vae else self.precision.dtype)
        self.vae_weights = weight_bytes(vae)
        count = min(shape.batch, args.vae_batch_size) if not args.cache_latents else args.vae_batch_size
        pixels = (max(1, count), 3, shape.height, shape.width)
        self.encode_bytes = measure_vae(vae, "encode", pixels, self.device_type)
        if self.plan.prompts:
            height, width = max(((p.height, p.width) for p in self.plan.prompts), key=lambda size: size[0] * size[1])
            self.decode_bytes = measure_vae(
                vae, "decode", (1, vae.config.latent_channels, height // 8, width // 8), self.device_type
            )

    @property
    def image_bytes(self) -> int:
        """Caching latents: the VAE alone, beside encoders that stay; nothing where images are encoded live."""
        return self.vae_weights + self.encode_bytes if self.args.cache_latents else 0

    def caption_bytes(self, t5_on_cpu: bool) -> int:
        """Caching text: one encoder after another; nothing where captions are encoded live."""
        on_device = [name for name in self.roles.ahead if not (name == "t5xxl" and self._t5_is_away(t5_on_cpu))]
        return max((self.encoder_weights[name] + self.ahead[name] for name in on_device), default=0)

    def _t5_is_away(self, t5_on_cpu: bool) -> bool:
        return t5_on_cpu or (self.args.t5xxl_device or "").startswith("cpu")

    def live_weights(self, t5_on_cpu: bool) -> int:
        """Encoders that training needs, and the VAE where images are encoded live."""
        names = [name for name in self.roles.live if not (name == "t5xxl" and self._t5_is_away(t5_on_cpu))]
        return sum(self.encoder_weights[name] for name in names) + (self.vae_weights if self._vae_stays() else 0)

    def reckoner(self, t5_on_cpu: bool) -> StepReckoner:
        weights = self.live_weights(t5_on_cpu)
        return StepReckoner(
            self.models,
            self.trained,
            weights,
            self.kept_by_encoders,
            self.stream_bytes,
            self.work,
            rounds_pinned=self.device_type == "cuda",
        )

    def beside(self, reckoner: StepReckoner) -> int:
        """The most that moments other than a step need beside the denoiser's weights."""
        return max((phase.bytes for phase in self.live_phases(reckoner, 0)), default=0)

    def _vae_stays(self) -> bool:
        """Whether the VAE keeps its place on the device between encodings or previews."""
        args = self.args
        return not args.cache_latents or bool(args.highvram and self.plan.prompts)

    def live_phases(self, reckoner: StepReckoner, base: int) -> list[Phase]:
        resident = base + reckoner.trained.kept + reckoner.encoder_weights
        found = []
        if not self.args.cache_latents:
            found.append(Phase("images encoded in a step", resident + self.encode_bytes))
        if self.plan.prompts:
            more = 0 if self._vae_stays() else self.vae_weights
            found.append(Phase("previews: the denoiser", resident + self.preview_bytes))
            found.append(Phase("previews: the VAE", resident + more + self.decode_bytes))
        return found
