"""One training step, followed from batches to new weights.

    each micro-batch:  latents, conditioning, timesteps, noise -> predict the velocity -> losses -> backward
    once a step:       mean over all processes -> unscale -> clip -> optimizer step -> schedule -> moving average

Nothing here waits for the device: losses and norms stay tensors until somebody logs them. accelerate counts the micro-batches and
runs the backward pass; docs/architecture.md ("accelerate") gives the reason and a measurement for each thing that is not left to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from library.common.seeds import StepGenerators, fold_seed
from library.data.batch import Batch
from library.distributed.gradients import GradientReducer
from library.flow.loss import LossSettings, training_loss
from library.flow.timesteps import FlowSettings, add_noise, sample_timesteps, sigmas, velocity_target
from library.training.ema import WeightEma
from library.training.optimization import Optimization
from library.training.optimizers import OptimizerBundle
from library.training.precision import LossScaler
from library.training.schedulers import Schedule
from library.training.train_progress import NormReport, StepReport, TrainProgress

if TYPE_CHECKING:
    from accelerate import Accelerator

C = TypeVar("C")  # what a model family conditions its denoiser on


class DiffusionModel(Protocol[C]):
    """A model family with its adapters, as a training step uses it."""

    def batch_latents(self, batch: Batch, generators: StepGenerators) -> Tensor:
        """Normalized latents [B, C, h, w] float32: the batch's own, or its images encoded now."""
        ...

    def conditioning(self, batch: Batch, generators: StepGenerators, training: bool) -> C:
        """The batch's captions as the denoiser takes them; with `training` the text encoders' dropout acts."""
        ...

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: C) -> Tensor:
        """noisy [B, C, h, w], timesteps [B] float32 in 0..1000 -> velocity [B, C, h, w]."""
        ...

    def set_multiplier(self, multiplier: float) -> None:
        """The strength of the adapters in the forwards that follow."""

    def base_model(self) -> AbstractContextManager[object]:
        """A context in which the adapters are off: `predict` and `conditioning` are the base model's."""
        ...


@dataclass(frozen=True)
class StepSettings:
    accumulation: int  # micro-batches of one step
    max_grad_norm: float  # 0: gradients are not clipped
    seed: int
    flow: FlowSettings
    loss: LossSettings
    trains_conditioning: bool = False  # text encoders have adapters: the base model's conditioning is another
    base_on_all_ranks: bool = False  # ranks share the base model's weights: where one asks for its prediction, all do


@dataclass(frozen=True)
class BatchLosses:
    """The result of one micro-batch."""

    losses: Tensor  # [B] float32, with graph
    timesteps: Tensor  # [B] float32 on the CPU


@dataclass(frozen=True)
class WeightUpdate:
    """What `TrainingStep.update_weights` did; tensors on the device."""

    gradient_norm: Tensor  # 0-dim float32, before clipping
    nonfinite: Tensor  # 0-dim bool: the optimizer's step was skipped
    norm_report: NormReport | None


@dataclass
class TrainingStep(Generic[C]):
    settings: StepSettings
    accelerator: Accelerator
    model: DiffusionModel[C]
    parameters: list[nn.Parameter]  # all that is trained, on one device
    optimizer: OptimizerBundle
    schedule: Schedule
    reducer: GradientReducer
    scaler: LossScaler | None = None  # float16
    ema: WeightEma | None = None
    post_step_hook: Callable[[], NormReport] | None = None  # clips the norms of the weights

    def __post_init__(self) -> None:
        self.device = self.parameters[0].device
        self.generators = StepGenerators(self.device)
        self.accelerator.scaler = self.scaler  # accelerator.backward multiplies the loss by its scale
        # accelerator.backward divides the loss by the accumulation; this gradient takes that back, exactly
        self.accumulation = torch.full((), float(self.settings.accumulation), device=self.device)

    # --- a step ----------------------------------------------------------------------------------------------------

    def __call__(self, progress: TrainProgress, batches: Iterable[Batch], samples: Sequence[int]) -> StepReport:
        """Accumulate the gradients of some micro-batches, then update the weights.

        The loss is the mean over all samples of all these micro-batches of all processes, however they are distributed. samples: how
        many there are in each micro-batch, summed over the processes.
        """
        accelerator, processes = self.accelerator, self.accelerator.num_processes
        accelerator.step = self.settings.accumulation - len(samples)  # so that the last one sets sync_gradients
        losses: list[Tensor] = []
        timesteps: list[Tensor] = []
        paths: list[str] = []
        for number, batch in enumerate(batches, progress.batch):
            with accelerator.accumulate():
                # Numbered over all processes: two of them draw what one would with twice the accumulation.
                batch_index = number * processes + accelerator.process_index
                self.generators.seed(fold_seed(self.settings.seed, progress.epoch, batch_index))
                result = self.losses(batch, self.generators)
                loss = result.losses.sum() * (processes / sum(samples))  # the reducer takes the mean over processes
                accelerator.backward(loss, gradient=self.accumulation)
                losses.append(result.losses.detach())
                timesteps.append(result.timesteps)
                paths += batch.paths
                if accelerator.sync_gradients:
                    update = self.update_weights()
        all_losses = torch.cat(losses)
        return StepReport(
            progress=TrainProgress(progress.epoch, progress.batch + len(losses), progress.step + 1),
            loss=all_losses.mean(),
            gradient_norm=update.gradient_norm,
            nonfinite=update.nonfinite,
            losses=all_losses,
            timesteps=torch.cat(timesteps),
            paths=paths,
            norm_report=update.norm_report,
        )

    # --- a micro-batch ---------------------------------------------------------------------------------------------

    def losses(self, batch: Batch, generators: StepGenerators, timestep: int | None = None) -> BatchLosses:
        """The losses of a micro-batch at drawn timesteps, or in validation with every sample at `timestep`."""
        model, flow, training = self.model, self.settings.flow, timestep is None
        batch = batch.to(self.device)
        model.set_multiplier(batch.network_multiplier)
        latents = model.batch_latents(batch, generators)  # [B, C, h, w]
        base_conditioning = self._base_conditioning(batch, generators, training)
        conditioning = model.conditioning(batch, generators, training)

        count, size = len(latents), (latents.shape[-2], latents.shape[-1])
        if timestep is None:
            on_cpu = sample_timesteps(flow, count, generators.cpu, size)  # [B] 0..1000
        else:
            on_cpu = torch.full((count,), float(timestep))
        timesteps = on_cpu.to(self.device, non_blocking=True)
        noise = torch.randn(latents.shape, generator=generators.device, device=self.device)
        sigma = sigmas(timesteps)
        noisy = add_noise(latents, noise, sigma)
        target = velocity_target(latents, noise)
        preserve = self._preserved(batch)
        if preserve is not None:  # differential output preservation: these samples keep what the base model predicts
            base = conditioning if base_conditioning is None else base_conditioning
            with torch.no_grad(), model.base_model():
                base_velocity = model.predict(noisy, timesteps, base).float()
            target = torch.where(preserve.view(-1, 1, 1, 1), base_velocity, target)

        velocity = model.predict(noisy, timesteps, conditioning)  # [B, C, h, w]
        losses = training_loss(velocity, target, sigma, flow, self.settings.loss, batch.mask, batch.loss_weights)
        return BatchLosses(losses, on_cpu)

    def _base_conditioning(self, batch: Batch, generators: StepGenerators, training: bool) -> C | None:
        """The base model's own conditioning, with the same dropout; None where it is not needed or the trained model's is the same."""
        if batch.preserve is None or not self.settings.trains_conditioning:
            return None
        with generators.fork(), torch.no_grad(), self.model.base_model():
            return self.model.conditioning(batch, generators, training)

    def _preserved(self, batch: Batch) -> Tensor | None:
        """[B] bool: the samples whose target is the base model's prediction; None where no forward of the base model is needed."""
        if batch.preserve is not None or not self.settings.base_on_all_ranks:
            return batch.preserve
        return torch.zeros(len(batch.paths), dtype=torch.bool, device=self.device)

    # --- the weights -----------------------------------------------------------------------------------------------

    def update_weights(self) -> WeightUpdate:
        """Step on the accumulated gradients. A step whose gradients are not finite leaves weights and optimizer state alone."""
        self.reducer.reduce()
        if self.scaler:
            self.scaler.unscale_(self.parameters)
        norm = clip_gradients(self.parameters, self.settings.max_grad_norm)
        nonfinite = ~torch.isfinite(norm)
        step_if_finite(self.optimizer.optimizer, nonfinite)
        if self.scaler:
            self.scaler.update(nonfinite)
        self.schedule.step()
        self.optimizer.optimizer.zero_grad(set_to_none=True)
        for parameter in self.parameters:  # those too that another process steps
            parameter.grad = None
        norm_report = self.post_step_hook() if self.post_step_hook else None
        if self.ema:
            self.ema.update()
        return WeightUpdate(norm, nonfinite, norm_report)


class NormClipping(Protocol):
    """A network whose layers' norms can be clipped."""

    def scale_weight_norms(self, max_norm: float) -> NormReport: ...


def build_step(
    settings: StepSettings,
    accelerator: Accelerator,
    model: DiffusionModel[C],
    optimization: Optimization,
    network: NormClipping,
    max_weight_norm: float | None,
) -> TrainingStep[C]:
    """One optimizer step of a run. max_weight_norm: to which each layer's change is shrunk after a step; None: not."""

    def clip_norms() -> NormReport:
        return network.scale_weight_norms(max_weight_norm or 0.0)

    return TrainingStep(
        settings=settings,
        accelerator=accelerator,
        model=model,
        parameters=optimization.parameters,
        optimizer=optimization.optimizer,
        schedule=optimization.schedule,
        reducer=optimization.reducer,
        scaler=optimization.scaler,
        ema=optimization.ema,
        post_step_hook=clip_norms if max_weight_norm else None,
    )


def clip_gradients(parameters: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients so that their common 2-norm is at most `max_norm` (0: leave them); return the norm before.

    The norm is a float32 scalar on the device, inf or NaN where any gradient is. torch's clip_grad_norm_ is the same for float32;
    of half-precision gradients it takes the norm in half precision, with 3 digits and an overflow at 65504 in float16.
    """
    gradients = [parameter.grad.float() for parameter in parameters if parameter.grad is not None]
    norm = get_total_norm(gradients)
    if max_norm > 0:
        clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def step_if_finite(optimizer: Optimizer, nonfinite: Tensor) -> None:
    """optimizer.step(), skipped when `nonfinite` (a bool scalar on the device) is true.

    torch's fused optimizers skip on the device, through the attributes that torch.amp.GradScaler sets for them. For any
    other the flag has to be read, which waits for the backward pass.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, nonfinite.float()  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    elif not bool(nonfinite):
        optimizer.step()
