"""What the parts of a run take, in bytes, from headers and options: every model is measured on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic

import torch
from torch import nn

from library.caching.fill import encoder_roles
from library.common.errors import UserError
from library.common.transformer import StepShape, TransformerModel
from library.data.images import VAE_SCALE_FACTOR
from library.data.prompts import PreviewPrompt
from library.memory.estimator.planner import ModelBytes, StepMemoryEstimator, TrainedBytes
from library.memory.estimator.step_memory import (
    POLICIES,
    TrainingStep,
    measure_call,
    measure_encoder,
    measure_forward,
    measure_pass,
    weight_bytes,
)
from library.memory.estimator.table import Phase
from library.preflight.disk_space import OptimizerSettings
from library.preflight.inspector import Files, ModelInspector
from library.preflight.network import NetworkSettings, make_network
from library.preflight.optimizer_memory import optimizer_cost
from library.preflight.plan import RunPlan
from library.training.precision import Precision
from networks.network import Network


@dataclass(frozen=True)
class ProfileSettings:
    """The options that the bytes of a run depend on, beside those that the planner chooses."""

    network: NetworkSettings
    optimizer: OptimizerSettings
    caches_latents: bool = False
    caches_text: bool = False
    keeps_average: bool = False  # --ema_decay
    checkpoints_encoders: bool = False  # --gradient_checkpointing
    highvram: bool = False
    vae_batch_size: int = 1
    text_encoder_batch_size: int = 1
    for_gpu: bool = False  # measure as on a GPU whatever the device is (--vram)


class MemoryProfile(Generic[Files]):
    """The parts of a run by their bytes."""

    def __init__(
        self,
        settings: ProfileSettings,
        plan: RunPlan[Files],
        inspector: ModelInspector[Files],
        device_type: str,
        precision: Precision,
        processes: int,
        quantization: str | None,
    ):
        """quantization: how the denoiser's weights are stored; others can be measured later."""
        self.settings, self.plan, self.precision = settings, plan, precision
        self.device_type = "cpu" if device_type == "cpu" and not settings.for_gpu else "cuda"
        self.parts = inspector.memory_parts(plan.files)
        self.names = inspector.encoder_names()
        trains = dict(zip(self.names, plan.rates.trained_text_encoders))
        self.roles = encoder_roles(list(self.parts.encoders), trains, settings.caches_text)
        self.shape = self._largest_batch()
        self.models: dict[str | None, ModelBytes] = {}
        self._measure_training(quantization, processes)
        self._measure_encoders()
        self._measure_vae()

    @property
    def an_encoder_may_move(self) -> bool:
        """Whether there is a text encoder that the planner may put on the CPU."""
        return any(part.may_move and name not in self.roles.trained for name, part in self.parts.encoders.items())

    # --- measured once ---------------------------------------------------------------------------------------------

    def _largest_batch(self) -> StepShape:
        sizes = [
            (w * h * d.settings.batch_size, d.settings.batch_size, h, w)
            for d in self.plan.index.training
            for w, h in d.buckets
        ]
        _, batch, height, width = max(sizes)
        return StepShape(batch, height, width, self.parts.text_tokens, bool(self.roles.trained))

    def _measure_training(self, quantization: str | None, processes: int) -> None:
        """The denoiser, the network, and sizes that do not depend on the denoiser's storage."""
        model, network = self._denoiser_and_network(quantization)
        self.models[quantization] = self._model_bytes(model, network)
        self.trained = self._trained_bytes(network, self._step(model, network).trained_bytes(), processes)
        self.work = tuple(self.parts.block_flops(self.shape))
        number = (
            torch.float32 if self.precision.dtype == torch.float16 else self.precision.dtype
        )  # of the residual streams
        self.stream_bytes = self.parts.stream_tokens(self.shape) * self.parts.hidden_size * number.itemsize
        self.preview_bytes = self._preview_forward(model)

    def measure_quantized(self, quantization: str) -> bool:
        """Measure the denoiser with another storage too; False where the network needs whole weights."""
        try:
            model, network = self._denoiser_and_network(quantization)
        except UserError:
            return False
        self.models[quantization] = self._model_bytes(model, network)
        network.detach()  # the encoders have their network already
        return True

    def _denoiser_and_network(self, quantization: str | None) -> tuple[TransformerModel, Network]:
        model = self.parts.denoiser(quantization)
        return model, self._network(model if self.plan.rates.unet > 0 else None)

    def _network(self, denoiser: nn.Module | None) -> Network:
        """The attached network on the meta device. The weights that it starts with take no memory of their own."""
        settings = self.settings.network
        settings = settings if settings.dim_from_weights else replace(settings, weights=None)
        encoders = [self.parts.encoders[name].model if name in self.roles.trained else None for name in self.names]
        try:
            network = make_network(settings, encoders, denoiser)
        except NotImplementedError as error:
            raise UserError(
                f"--memory_plan and --blocks_to_swap auto can't reckon with this network of {settings.module}, which reads "
                "the base model's weights while it is made. Choose the memory options yourself."
            ) from error
        network.to("meta", self.precision.trained_dtype).train()
        network.attach()
        return network

    def _step(self, model: TransformerModel, network: nn.Module) -> TrainingStep:
        inputs = partial(self.parts.inputs, self.shape)
        return TrainingStep(model, network, inputs, self.parts.block_of, self.shape.trains_text)

    def _model_bytes(self, model: TransformerModel, network: nn.Module) -> ModelBytes:
        blocks = tuple(weight_bytes(block) for block in model.blocks)
        step = self._step(model, network)
        passes = {policy: measure_pass(step, policy, self.device_type) for policy in POLICIES}
        return ModelBytes(blocks, weight_bytes(model) - sum(blocks), passes)

    def _trained_bytes(self, network: nn.Module, gradients: list[int], processes: int) -> TrainedBytes:
        optimizer = self.settings.optimizer
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        numbers = sum(parameter.numel() for parameter in parameters)
        cost = optimizer_cost(optimizer.name, optimizer.learning_rate, optimizer.args, self.precision.trained_dtype)
        averages = (4 * numbers if self.settings.keeps_average else 0) + (4 * numbers if processes > 1 else 0)
        return TrainedBytes(
            weight_bytes(network),
            tuple(gradients),
            size - sum(gradients),
            int(cost.kept * size),
            averages,
            int(cost.step * size),
        )

    def _preview_forward(self, model: TransformerModel) -> int:
        if not self.plan.prompts:
            return 0
        width, height = largest_preview(self.plan.prompts)
        together = 2 * height * width <= self.shape.batch * self.shape.height * self.shape.width
        shape = replace(self.shape, batch=2 if together else 1, height=height, width=width)
        return measure_forward(model, partial(self.parts.inputs, shape), self.device_type)

    def _measure_encoders(self) -> None:
        """Weights, and what encoding takes beside them: for captions that are cached and for a batch in training."""
        settings = self.settings
        self.encoder_weights = {name: weight_bytes(part.model) for name, part in self.parts.encoders.items()}
        self.encoding: dict[str, int] = {}
        self.kept_by_encoders = 0
        for name, part in self.parts.encoders.items():
            batch = settings.text_encoder_batch_size
            self.encoding[name] = measure_encoder(part.model, batch, part.tokens, self.device_type, trained=False)
            if name in self.roles.trained:
                if settings.checkpoints_encoders:
                    part.checkpoint_layers(part.model)
                self.kept_by_encoders += measure_encoder(
                    part.model, self.shape.batch, part.tokens, self.device_type, trained=True
                )

    def _measure_vae(self) -> None:
        settings, shape, vae = self.settings, self.shape, self.parts.vae
        self.decode_bytes = 0
        self.vae_weights = weight_bytes(vae.model)
        count = settings.vae_batch_size if settings.caches_latents else min(shape.batch, settings.vae_batch_size)
        pixels = (max(1, count), 3, shape.height, shape.width)
        self.encode_bytes = measure_call(
            vae.model, lambda: vae.encode(torch.empty(pixels, device="meta")), self.device_type
        )
        if self.plan.prompts:
            width, height = largest_preview(self.plan.prompts)
            latents = (1, vae.latent_channels, height // VAE_SCALE_FACTOR, width // VAE_SCALE_FACTOR)
            self.decode_bytes = measure_call(
                vae.model, lambda: vae.decode(torch.empty(latents, device="meta")), self.device_type
            )

    # --- put together, with the movable encoder on the device or on the CPU ------------------------------------------

    @property
    def image_bytes(self) -> int:
        """Caching latents: the VAE alone, beside encoders that stay; nothing where images are encoded in each step."""
        return self.vae_weights + self.encode_bytes if self.settings.caches_latents else 0

    def caption_bytes(self, t5_on_cpu: bool) -> int:
        """Caching text: one encoder after another; nothing where captions are encoded in each step."""
        names = self._on_device(self.roles.precomputed, t5_on_cpu)
        return max((self.encoder_weights[name] + self.encoding[name] for name in names), default=0)

    def _on_device(self, names: Sequence[str], t5_on_cpu: bool) -> list[str]:
        parts = self.parts.encoders
        return [name for name in names if parts[name].on_device and not (parts[name].may_move and t5_on_cpu)]

    def live_weights(self, t5_on_cpu: bool) -> int:
        """Encoders that training needs, and the VAE where images are encoded in each step."""
        names = self._on_device(self.roles.live, t5_on_cpu)
        return sum(self.encoder_weights[name] for name in names) + (self.vae_weights if self._vae_stays() else 0)

    def estimator(self, t5_on_cpu: bool) -> StepMemoryEstimator:
        """What estimates a step under any memory options."""
        return StepMemoryEstimator(
            self.models,
            self.trained,
            self.live_weights(t5_on_cpu),
            self.kept_by_encoders,
            self.stream_bytes,
            self.work,
            rounds_pinned=self.device_type == "cuda",
        )

    def other_phases_peak(self, estimator: StepMemoryEstimator) -> int:
        """The most that phases other than a step need beside the denoiser's weights."""
        return max((phase.bytes for phase in self.live_phases(estimator, 0)), default=0)

    def _vae_stays(self) -> bool:
        """Whether the VAE stays on the device between encodings or previews."""
        return not self.settings.caches_latents or (self.settings.highvram and bool(self.plan.prompts))

    def live_phases(self, estimator: StepMemoryEstimator, base: int) -> list[Phase]:
        """The phases of training other than its step, with `base` bytes of the denoiser's weights on the device."""
        resident = base + estimator.trained.kept + estimator.encoder_weights
        phases = []
        if not self.settings.caches_latents:
            phases.append(Phase("images encoded in a step", resident + self.encode_bytes))
        if self.plan.prompts:
            more = 0 if self._vae_stays() else self.vae_weights
            phases.append(Phase("previews: the denoiser", resident + self.preview_bytes))
            phases.append(Phase("previews: the VAE", resident + more + self.decode_bytes))
        return phases


def largest_preview(prompts: Sequence[PreviewPrompt]) -> tuple[int, int]:
    """Width and height of the largest image that is shown."""
    largest = max(prompts, key=lambda prompt: prompt.width * prompt.height)
    return largest.width, largest.height
