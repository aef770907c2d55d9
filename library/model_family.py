"""What a model family provides to the trainer: its files, encoders, denoiser and how they are called."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from library.common.seeds import StepGenerators
from library.data.loader import Batch
from library.distributed.fsdp import ShardedModel, ShardSettings
from library.monitoring.previews import Previewer
from library.preflight.inspector import ModelInspector
from library.saving.metadata import FamilyFacts


class ModelFamily(ABC):
    @abstractmethod
    def make_inspector(self) -> ModelInspector[Any]:
        """What the plan of the run asks of the family before any weight is read."""

    @abstractmethod
    def make_text_stage(self) -> Any: ...

    @abstractmethod
    def checkpoint_encoder(self, encoder: nn.Module) -> None:
        """Let a trained encoder keep less for the backward pass."""

    @abstractmethod
    def save_encoders(self, lora: dict[str, Tensor], stem: Path) -> list[Path]:
        """Write the text encoders that are to be saved, the LoRA merged in; their paths."""

    @abstractmethod
    def make_previewer(self) -> Previewer | None:
        """The previews that are asked for, or None."""

    @abstractmethod
    def load_vae(self) -> Any: ...

    @abstractmethod
    def vae_fingerprint(self) -> str: ...

    @abstractmethod
    def encode_images(self, images: Tensor, noise: Tensor) -> Tensor:
        """images [B, 3, H, W] in -1..1 and noise [B, 16, H/8, W/8], both on the device -> raw latents: a draw of the posterior."""

    @abstractmethod
    def normalise_latents(self, raw: Tensor) -> Tensor: ...

    @abstractmethod
    def make_denoiser(self) -> nn.Module: ...

    @abstractmethod
    def shard(self, settings: ShardSettings, local_sizes: list[int]) -> ShardedModel:
        """Share the denoiser's weights out over all processes. local_sizes: how many run on each one's machine."""

    @abstractmethod
    def conditioning(self, batch: Batch, generators: StepGenerators, training: bool) -> Any:
        """A batch's text as the denoiser wants it; dropout acts where `training`."""

    @abstractmethod
    def metadata_facts(self) -> FamilyFacts:
        """What the LoRA file tells about the base model and the family's own options."""

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Any) -> Tensor:
        """The denoiser's velocity."""
