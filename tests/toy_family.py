"""A model family of its own, as small as NetworkTrainer lets one be: residual convolutions, no text encoder, no checkpoint parts.

Latents are images shrunk by 8 with their channels repeated; the denoiser is conditioned on nothing. The functions at the end make this
file a network module as well: a LoRA on each convolution of the blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from library.common.transformer import TransformerModel
from library.network_trainer import NetworkTrainer
from library.preflight.inspector import ModelInspector
from library.saving.metadata import FamilyFacts
from networks.lora import LayerSettings, LoRALayer
from networks.network import Network
from networks.parameter_groups import LearningRates


class ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor]:
        return (x + self.conv(F.silu(x + t)),)


class ToyDenoiser(TransformerModel):
    def __init__(self, depth: int = 4):
        super().__init__()
        self.layers = nn.ModuleList(ToyBlock() for _ in range(depth))

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layers

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        t = (timestep / 1000).view(-1, 1, 1, 1)
        for index, block in enumerate(self.layers):
            (x,) = self.run_block(index, block, x, t)
        return x


class ToyInspector(ModelInspector[Path]):
    def __init__(self, path: Path):
        self.path = path

    def locate_models(self) -> Path:
        return self.path

    def meta_models(self, files: Path, rates: LearningRates) -> tuple[list[nn.Module | None], nn.Module | None]:
        with torch.device("meta"):
            return [], ToyDenoiser()


class ToyCodec:
    fingerprint = "eighths"

    def latent_shape(self, images: Tensor) -> tuple[int, int, int, int]:
        return images.shape[0], 16, images.shape[2] // 8, images.shape[3] // 8

    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        return F.avg_pool2d(images, 8).repeat(1, 6, 1, 1)[:, :16]

    def normalize(self, raw: Tensor) -> Tensor:
        return raw

    def decode(self, latents: Tensor) -> Tensor:
        return F.interpolate(latents[:, :3], scale_factor=8)

    def release(self, keep_on_cpu: bool) -> None: ...


class Unconditional:
    def of_batch(self, batch: object, generators: object, training: bool) -> None: ...

    def of_prompt(self, prompt: object, text: str, precomputed: Mapping[str, Tensor]) -> None: ...

    def join(self, first: None, second: None) -> None: ...


class ToyNetworkTrainer(NetworkTrainer[Path, None]):
    def make_inspector(self) -> ToyInspector:
        return ToyInspector(Path(self.args.pretrained_model_name_or_path))

    def make_codec(self, files: Path) -> ToyCodec:
        return ToyCodec()

    def load_denoiser(self, files: Path, device: torch.device) -> ToyDenoiser:
        model = ToyDenoiser()
        model.load_state_dict(load_file(files))
        return model.to(device).requires_grad_(False)

    def make_conditioner(self) -> Unconditional:
        return Unconditional()

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: None) -> Tensor:
        return self.denoiser(noisy, timesteps)

    def metadata_facts(self) -> FamilyFacts:
        return FamilyFacts("toy", "Toy", self.plan.files, None)


# --- the network module -------------------------------------------------------------------------------------------------


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: None,
    text_encoders: Sequence[nn.Module | None],
    denoiser: nn.Module,
    neuron_dropout: float | None = None,
    **kwargs: object,
) -> Network:
    settings = LayerSettings(network_dim or 4, network_alpha)
    convolutions = {
        f"lora_unet_{path.replace('.', '_')}": layer
        for path, layer in denoiser.named_modules()
        if isinstance(layer, nn.Conv2d)
    }
    return Network({name: LoRALayer(layer, settings) for name, layer in convolutions.items()}, multiplier=multiplier)


def create_network_from_weights(*args: object, **kwargs: object) -> tuple[Network, Mapping[str, Tensor]]:
    raise NotImplementedError


def check_network_args(
    args: Iterable[str] | None, depth: int | None = None, max_norm: float | None = None
) -> list[str]:
    return []


def trains_t5xxl(args: Iterable[str] | None) -> bool:
    return False
