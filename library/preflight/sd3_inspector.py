"""Stable Diffusion 3 as the preflight sees it: its files' headers and its models on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from library.common.tensor_io import Part
from library.data.settings import Size
from library.memory.compilation import backend_problems
from library.memory.quantization import META_KINDS, fp8_matmul_problems, replace_linears
from library.preflight.inspector import EncoderPart, MemoryParts, ModelInspector, VaePart
from library.preflight.network import NetworkSettings
from library.sd3.checkpoint import ModelFiles, locate_parts
from library.sd3.conditioning import CLIP_TOKENS, ContextSizes
from library.sd3.mmdit import MMDiT
from library.sd3.mmdit_config import MMDiTConfig
from library.sd3.models import empty_mmdit, empty_vae, mmdit_problems, shapes_of, vae_problems
from library.sd3.pos_embed import LATENT_AND_PATCH
from library.sd3.step_inputs import block_flops, block_of, meta_inputs, stream_tokens
from library.sd3.text_encoder_manager import ENCODERS, parse_t5_dtype
from library.sd3.text_encoder_sizes import check_text_encoder
from library.sd3.text_encoders import checkpoint_layers, empty_encoder, meta_text_encoder
from library.sd3.tokenizers import tokenizer_problems
from networks import lora_sd3
from networks.lora_file import check_lora_file
from networks.network_modules import network_module
from networks.parameter_groups import LearningRates

T5 = "t5xxl"


@dataclass(frozen=True)
class Sd3Settings:
    """The options that decide which files are read and how the models run."""

    checkpoint: str
    clip_l: str | None = None
    clip_g: str | None = None
    t5xxl: str | None = None
    vae: str | None = None
    tokenizer_cache_dir: str | None = None
    t5_tokens: int = 256
    t5_device: str | None = None  # None: the training device
    t5_dtype: str | None = None
    fp8_t5: bool = False  # --fp8_base without --fp8_base_unet
    whole_vae: bool = False  # --no_half_vae
    scaled_pos_embed: bool = False
    compile_backend: str | None = None  # None: eager
    fp8_matmul: bool = False
    train_unet_only: bool = False
    scale_weight_norms: float | None = None
    base_weights: tuple[str, ...] = ()
    saved_encoders: tuple[str, ...] = ()  # their names


class Sd3Inspector(ModelInspector[ModelFiles]):
    def __init__(self, settings: Sd3Settings, network: NetworkSettings, dtype: torch.dtype, device: torch.device):
        """dtype: that the models compute in. device: for training."""
        self.settings, self.network, self.dtype, self.device = settings, network, dtype, device

    def encoder_names(self) -> list[str]:
        return list(ENCODERS)

    def present_encoders(self, files: ModelFiles) -> list[str]:
        return [name for name, part in files.encoders().items() if part is not None]

    def trains_t5xxl(self) -> bool:
        name = self.network.module
        return bool(name) and bool(network_module(name).trains_t5xxl(self.network.args))

    def locate_models(self) -> ModelFiles:
        settings = self.settings
        return locate_parts(settings.checkpoint, settings.clip_l, settings.clip_g, settings.t5xxl, settings.vae)

    # --- problems --------------------------------------------------------------------------------------------------

    def model_problems(self, files: ModelFiles, sizes: Sequence[Size]) -> list[str]:
        problems = [*mmdit_problems(files.mmdit), *self._device_problems()]
        if files.vae is None:
            problems.append(f"{files.mmdit.path} holds no VAE. Give one with --vae.")
        else:
            problems += vae_problems(files.vae)
        for part in files.encoders().values():
            if part is not None:
                problems += check_text_encoder(part)
        tokenizers = self.settings.tokenizer_cache_dir
        problems += tokenizer_problems(tokenizers, files.mmdit.path, self.present_encoders(files))
        return problems or self._size_problems(files, sizes)

    def _size_problems(self, files: ModelFiles, sizes: Sequence[Size]) -> list[str]:
        """Images that are larger than the position table."""
        table = mmdit_config(files).pos_embed_max_size * LATENT_AND_PATCH
        too_large = [f"{w}x{h}" for w, h in sizes if max(w, h) > table]
        if not too_large or self.settings.scaled_pos_embed:
            return []
        return [
            f"Buckets or previews of {', '.join(too_large)} are larger than the model's position table, {table} pixels a side. "
            "Lower --resolution or --max_bucket_reso, or the size in --sample_prompts."
        ]

    def _device_problems(self) -> list[str]:
        """What --t5xxl_device, --torch_compile and --fp8_matmul ask for and this machine or build lacks."""
        settings, t5_device = self.settings, self.settings.t5_device
        problems = backend_problems(settings.compile_backend) if settings.compile_backend else []
        problems += fp8_matmul_problems(self.device) if settings.fp8_matmul else []
        try:
            device = torch.device(t5_device or "cpu")
            torch.empty(1, device=device).tolist()
        except (RuntimeError, ValueError, AssertionError, NotImplementedError):  # each backend of torch has its own
            problems.append(f"--t5xxl_device {t5_device}: there is no such device here. cpu always works.")
        else:
            elsewhere = device.type != self.device.type or device.index not in (None, self.device.index)
            if t5_device and elsewhere and self.trains_t5xxl() and not settings.train_unet_only:
                problems.append(
                    f"--t5xxl_device {t5_device} can't be combined with train_t5xxl in --network_args: a trained "
                    "T5 must be on the training device. Leave one out."
                )
        return problems

    def network_problems(self, files: ModelFiles) -> list[str]:
        network = self.network
        problems = []
        for path in [network.weights, *self.settings.base_weights]:
            if path:
                problems += check_lora_file(path)
        if network.module:
            check = network_module(network.module).check_network_args
            problems += check(network.args or [], mmdit_config(files).depth, self.settings.scale_weight_norms)
        return problems

    # --- sizes -----------------------------------------------------------------------------------------------------

    def meta_models(self, files: ModelFiles, rates: LearningRates) -> tuple[list[nn.Module | None], nn.Module | None]:
        parts = zip(files.encoders().values(), rates.trained_text_encoders)
        # LyCORIS chooses layers by the classes of transformers, which take seconds to load
        make = meta_text_encoder if network_module(self.network.module) is lora_sd3 else empty_encoder
        encoders = [make(part) if part is not None and trained else None for part, trained in parts]
        return encoders, empty_mmdit(files.mmdit) if rates.unet > 0 else None

    def caption_bytes(self, files: ModelFiles) -> int:
        sizes = ContextSizes.from_files(files, self.settings.t5_tokens)
        numbers = sizes.clip_tokens * sizes.pooled + sizes.t5_tokens * sizes.context + sizes.pooled
        return numbers * self.dtype.itemsize

    def saved_encoder_bytes(self, files: ModelFiles) -> int:
        parts = [files.encoders()[name] for name in self.settings.saved_encoders]
        spans = [info.offsets for part in parts if part is not None for info in part.tensors.values()]
        return sum(end - start for start, end in spans)

    def memory_parts(self, files: ModelFiles) -> MemoryParts:
        def denoiser(quantization: str | None) -> MMDiT:
            model = empty_mmdit(files.mmdit).to(self.dtype).requires_grad_(False)
            if quantization is not None:
                for block in model.blocks:
                    replace_linears(block, META_KINDS[quantization])
            return model

        assert files.vae is not None
        config = mmdit_config(files)
        vae = empty_vae(files.vae).to(torch.float32 if self.settings.whole_vae else self.dtype)
        return MemoryParts(
            denoiser,
            partial(meta_inputs, config, self.dtype),
            partial(block_flops, empty_mmdit(files.mmdit)),
            block_of,
            stream_tokens,
            config.hidden_size,
            CLIP_TOKENS + self.settings.t5_tokens,
            VaePart(vae, vae.config.latent_channels, vae.encode, vae.decode),
            {name: self._encoder(name, part) for name, part in files.encoders().items() if part is not None},
        )

    def _encoder(self, name: str, part: Part) -> EncoderPart:
        model, t5_device = empty_encoder(part), self.settings.t5_device
        if name != T5:
            return EncoderPart(model.to(self.dtype), CLIP_TOKENS, checkpoint_layers=checkpoint_layers)
        dtype, storage = parse_t5_dtype(self.settings.t5_dtype, self.dtype)
        if storage is None and self.settings.fp8_t5:
            storage = "fp8"
        model = model.to(dtype)
        if storage is not None:
            replace_linears(model, META_KINDS[storage], lambda path: ".block." in path)
        on_device = not (t5_device or "").startswith("cpu")
        return EncoderPart(model, self.settings.t5_tokens, on_device, not t5_device, checkpoint_layers)


def mmdit_config(files: ModelFiles) -> MMDiTConfig:
    """The denoiser's sizes, from its tensors' shapes."""
    return MMDiTConfig.from_shapes(shapes_of(files.mmdit))
