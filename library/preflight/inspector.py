"""What a run needs to know of a model family before any weight is read. A family's entry script hands in its inspector."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor, nn

from library.common.transformer import BlockFlops, StepShape, TransformerModel
from library.data.settings import Size
from networks.parameter_groups import LearningRates

Files = TypeVar("Files")
"""How the family describes the files of its parts."""


@dataclass(frozen=True)
class EncoderPart:
    """A text encoder on the meta device, in the dtype and the storage in which it runs."""

    model: nn.Module
    tokens: int  # of a caption
    on_device: bool = True  # False: an option has put it on the CPU
    may_move: bool = False  # whether the planner may put it on the CPU
    checkpoint_layers: Callable[[nn.Module], None] = lambda model: None  # --gradient_checkpointing, where it is trained


@dataclass(frozen=True)
class VaePart:
    """The autoencoder on the meta device, in the dtype in which it runs."""

    model: nn.Module
    latent_channels: int
    encode: Callable[[Tensor], object]  # images [B, 3, H, W] -> latents, or their distribution
    decode: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MemoryParts:
    """The models of a run on the meta device, for the memory planner."""

    denoiser: Callable[
        [str | None], TransformerModel
    ]  # a frozen one, its weights stored as "fp8", "int8", "nf4" or None
    inputs: Callable[[StepShape], tuple[Tensor, ...]]  # of its forward
    block_flops: Callable[[StepShape], Iterable[BlockFlops]]
    block_of: Callable[[str], int | None]  # a trained tensor's name -> the number of its block
    stream_tokens: Callable[[StepShape], int]  # of all residual streams
    hidden_size: int  # of its residual streams
    text_tokens: int  # of a caption, as the denoiser takes it
    vae: VaePart
    encoders: Mapping[str, EncoderPart] = field(default_factory=dict)  # by name, those that the files hold


class ModelInspector(ABC, Generic[Files]):
    """A model family, seen from its files' headers. A family without text encoders defines `locate_models` and `meta_models`."""

    @abstractmethod
    def locate_models(self) -> Files:
        """Find the files of every part. UserError lists what is wrong."""

    @abstractmethod
    def meta_models(self, files: Files, rates: LearningRates) -> tuple[list[nn.Module | None], nn.Module | None]:
        """Text encoders and denoiser on the meta device; None for each that is not trained."""

    def model_problems(self, files: Files, sizes: Sequence[Size]) -> list[str]:
        """What would fail later: missing or wrongly shaped tensors, images (W, H) that are too large for the model."""
        return []

    def network_problems(self, files: Files) -> list[str]:
        """What is wrong with --network_module, its arguments and the LoRA files that are read."""
        return []

    def encoder_names(self) -> list[str]:
        """All text encoders of the family, in the order of --text_encoder_lr."""
        return []

    def present_encoders(self, files: Files) -> list[str]:
        """The text encoders that the files hold, in that order."""
        return []

    def trains_t5xxl(self) -> bool:
        """Whether the network arguments ask for LoRA of a third encoder, which the others do not imply."""
        return False

    def caption_bytes(self, files: Files) -> int:
        """Bytes of the text encoders' outputs for one caption, as they are cached."""
        return 0

    def saved_encoder_bytes(self, files: Files) -> int:
        """Bytes of the text encoders that are to be saved beside the LoRA."""
        return 0

    def memory_parts(self, files: Files) -> MemoryParts:
        """The models for --memory_plan auto and --blocks_to_swap auto, which need them defined."""
        raise NotImplementedError(type(self).__name__)
