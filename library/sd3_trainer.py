"""The parts of Stable Diffusion 3, named for the generic trainer.

It stands beside the entry script, not in it, so that `--help` and option errors answer without importing torch.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from library.common.errors import UserError
from library.common.seeds import StepGenerators
from library.common.tensor_io import fingerprint
from library.data.loader import Batch
from library.data.prompts import PreviewPrompt
from library.data.settings import Size
from library.distributed.fsdp import ShardedModel, ShardSettings
from library.flow.samplers import SAMPLERS
from library.memory.apply import apply_memory_optimizations
from library.memory.block_swap import swap_limit
from library.memory.offload import onload
from library.memory.quantization import quantize
from library.monitoring.previews import Previewer, PreviewSettings
from library.network_trainer import NetworkTrainer
from library.preflight.sd3_inspector import Sd3Inspector
from library.preflight.settings import memory_settings, network_settings, sd3_settings
from library.saving.metadata import FamilyFacts
from library.saving.text_encoders import encoders_to_save, write_encoders
from library.sd3.conditioning import (
    ContextSizes,
    DropoutRates,
    TextEncoding,
    TextSettings,
    apply_dropout,
    missing_encoder_notes,
    to_context,
)
from library.sd3.mmdit import MMDiT
from library.sd3.mmdit_config import MMDiTConfig
from library.sd3.models import load_mmdit, load_vae, shapes_of, smallest_input
from library.sd3.pos_embed import LATENT_AND_PATCH, ScaledPosEmbed, crop_pos_embed, random_offset
from library.sd3.text_encoder_manager import (
    ENCODERS,
    EncoderPlacement,
    TextEncoderManager,
    WeightChange,
    parse_t5_dtype,
)
from library.sd3.text_encoder_sizes import sizes_of
from library.sd3.text_encoders import checkpoint_layers
from library.sd3.tokenizers import load_tokenizers, vocabulary_problems
from library.sd3.vae import Vae, denormalize, normalize, sample_posterior
from networks.lora_sd3 import TEXT_ENCODER_PREFIXES, first_block
from networks.weight_files import group_by_layer

logger = logging.getLogger(__name__)
Conditioning = tuple[Tensor, Tensor, Tensor | None]
"""context [B, 77 + T, 4096], pooled [B, 2048], position embedding [1, patches, D] or None for the centred crop"""


class Sd3NetworkTrainer(NetworkTrainer):
    def make_inspector(self) -> Sd3Inspector:
        network = network_settings(self.args)
        return Sd3Inspector(sd3_settings(self.args), network, self.precision.dtype, self.device)

    def metadata_facts(self) -> FamilyFacts:
        args, files = self.args, self.plan.files
        vae = files.vae.path if args.vae and files.vae is not None else None
        kind = MMDiTConfig.from_shapes(shapes_of(files.mmdit)).kind
        return FamilyFacts(kind, files.mmdit.path, vae)

    # --- text ------------------------------------------------------------------------------------------------------

    def make_text_stage(self) -> TextEncoderManager:
        args, files = self.args, self.plan.files
        for note in missing_encoder_notes(files):
            logger.warning(note)
        present = self.inspector.present_encoders(files)
        t5_dtype, t5_format = parse_t5_dtype(args.t5xxl_dtype, self.precision.dtype)
        if args.fp8_base and not args.fp8_base_unet and t5_format is None:
            t5_format = "fp8"
        placement = EncoderPlacement(
            device=self.device,
            dtype=self.precision.dtype,
            t5_device=torch.device(args.t5xxl_device) if args.t5xxl_device else self.device,
            t5_dtype=t5_dtype,
            t5_quantization=t5_format,
            quantize=partial(quantize, within=lambda path: True),
            mmap=not args.disable_mmap_load_safetensors,
            change=self._encoder_changes(present),
            keep_freed_memory=args.highvram,
        )
        settings = TextSettings(args.t5xxl_max_token_length, args.apply_lg_attn_mask, args.apply_t5_attn_mask)
        tokenizers = load_tokenizers(args.tokenizer_cache_dir, files.mmdit.path, present)
        rows = {name: sizes_of(part).vocabulary for name, part in files.encoders().items() if part is not None}
        foreign = vocabulary_problems(tokenizers, rows)
        if foreign:
            raise UserError(foreign)
        self.context_sizes = ContextSizes.from_files(files, args.t5xxl_max_token_length)
        self.dropout = DropoutRates(args.clip_l_dropout_rate, args.clip_g_dropout_rate, args.t5_dropout_rate)
        return TextEncoderManager(files, tokenizers, settings, placement)

    def _encoder_changes(self, present: Sequence[str]) -> dict[str, WeightChange]:
        """What --base_weights do to each encoder that there is."""
        base, changes = self.base_weights, {}
        for place, (name, part) in enumerate(zip(ENCODERS, TEXT_ENCODER_PREFIXES)):
            if part in base.parts and name not in present:
                logger.warning("--base_weights has a LoRA for %s, which is missing: it is left out.", name)
            elif part in base.parts:

                def apply(model: nn.Module, place: int = place) -> None:
                    base.merge([model if index == place else None for index in range(len(ENCODERS))], None)

                changes[name] = WeightChange(apply, base.fingerprint(part))
        return changes

    def checkpoint_encoder(self, encoder: nn.Module) -> None:
        checkpoint_layers(encoder)

    def encoding_of(self, captions: Sequence[str], cached: dict[str, Tensor] | None) -> TextEncoding:
        """What the encoders say: from the cache, and live from those that are not cached."""
        encoding = TextEncoding.from_dict(cached) if cached else TextEncoding()
        if not self.live_encoders:
            return encoding
        return encoding.merged(self.text_stage.encode(captions, self.live_encoders, self.trained_encoders))

    def conditioning(self, batch: Batch, generators: StepGenerators, training: bool) -> Conditioning:
        encoding = self.encoding_of(batch.captions, batch.text)
        if training:
            encoding = apply_dropout(encoding, self.dropout, generators.cpu)
        context, pooled = to_context(encoding, self.context_sizes, self.device, self.precision.dtype)
        return context, pooled, self.position_embedding(batch.size, training)

    def save_encoders(self, lora: dict[str, Tensor], stem: Path) -> list[Path]:
        names = encoders_to_save(self.args.save_clip, self.args.save_t5xxl)
        changes = [*self.base_weights.changes, (1.0, group_by_layer(lora, "the LoRA"))]
        return write_encoders(self.plan.files, names, changes, stem.parent, stem.name) if names else []

    # --- images ----------------------------------------------------------------------------------------------------

    def load_vae(self) -> Vae:
        dtype = torch.float32 if self.args.no_half_vae else self.precision.dtype
        return load_vae(self.plan.files.vae, self.device, dtype, not self.args.disable_mmap_load_safetensors)

    def vae_fingerprint(self) -> str:
        return f"{fingerprint(self.plan.files.vae)};{'float32' if self.args.no_half_vae else self.precision.dtype}"

    @torch.no_grad()
    def encode_images(self, images: Tensor, noise: Tensor) -> Tensor:
        size = max(1, self.args.vae_batch_size)
        raw = []
        for some, part in zip(images.split(size), noise.split(size)):
            mean, log_variance = self.vae.encode(some)
            raw.append(sample_posterior(mean, log_variance, part))
        return torch.cat(raw)

    def normalise_latents(self, raw: Tensor) -> Tensor:
        return normalize(raw)

    # --- the denoiser ----------------------------------------------------------------------------------------------

    def make_denoiser(self) -> MMDiT:
        args = self.args
        mmap = not args.disable_mmap_load_safetensors
        # swapped blocks stay in host memory; what is shared out is not to be whole on any device
        waits = bool(args.blocks_to_swap) or self.sharding.base is not None
        first = self.device if args.lowram and not waits else torch.device("cpu")
        model = load_mmdit(self.plan.files.mmdit, first, self.precision.dtype, mmap)
        self.base_weights.merge([], model)
        depth, shared_out = len(model.joint_blocks), self.sharding.base is not None
        settings = memory_settings(args, self.blocks_to_swap(depth), shared_out, len(self.image_sizes()) > 1)
        self.swapper = apply_memory_optimizations(model, settings, self.device)
        resolutions = [dataset.settings.resolution for dataset in self.plan.index.training]
        self.scaled_pos_embed = (
            ScaledPosEmbed(resolutions, model.config.hidden_size, self.device) if args.enable_scaled_pos_embed else None
        )
        return model

    def image_sizes(self) -> set[Size]:
        """All sizes (W, H) that the denoiser will see."""
        datasets = (*self.plan.index.training, *self.plan.index.validation)
        prompts = {(prompt.width, prompt.height) for prompt in self.plan.prompts}
        return prompts.union(*(dataset.buckets for dataset in datasets))

    def shard(self, settings: ShardSettings, local_sizes: list[int]) -> ShardedModel:
        denoiser = cast(MMDiT, self.denoiser)
        smallest = partial(smallest_input, denoiser, self.device)
        first = first_block(self.network.layers)
        return ShardedModel(denoiser, settings, self.device, local_sizes, smallest, first)

    def blocks_to_swap(self, depth: int) -> int:
        wanted = int(self.args.blocks_to_swap or 0)
        if wanted > swap_limit(depth):
            logger.warning(
                "blocks_to_swap %d is lowered to %d: this model has %d blocks.", wanted, swap_limit(depth), depth
            )
        return min(wanted, swap_limit(depth))

    def position_embedding(self, size: Size, training: bool) -> Tensor | None:
        """The crop of the position table for images of `size` (W, H); None is the centred crop of the model's own table."""
        width, height = size[0] // LATENT_AND_PATCH, size[1] // LATENT_AND_PATCH
        table = self.scaled_pos_embed.table_for(height, width) if self.scaled_pos_embed else None
        # Python's generator was placed for this micro-batch, like torch's.
        moved = training and self.args.pos_emb_random_crop_rate > random.random()
        if not moved:
            return None if table is None else crop_pos_embed(table, height, width)
        table = cast(Tensor, self.denoiser.pos_embed) if table is None else table
        side = int(table.shape[1] ** 0.5 + 0.5)
        return crop_pos_embed(table, height, width, random_offset(side, height, width, random.Random(random.random())))

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        context, pooled, pos_embed = conditioning
        return self.denoiser(noisy, timesteps, context, pooled, pos_embed)

    # --- previews --------------------------------------------------------------------------------------------------

    def make_previewer(self) -> Previewer | None:
        args = self.args
        if not self.plan.prompts or not (
            args.sample_at_first or args.sample_every_n_steps or args.sample_every_n_epochs
        ):
            return None
        settings = PreviewSettings(
            Path(args.output_dir),
            args.output_name or "",
            SAMPLERS.get(args.sample_sampler, "euler"),
            self.accelerator.process_index,
            self.accelerator.num_processes,
            max(w * h * d.settings.batch_size for d in self.plan.index.training for w, h in d.buckets),
        )
        return Previewer(
            self.plan.prompts,
            settings,
            self.prompt_conditioning,
            self.predict,
            self.decode,
            self.device,
            joined_conditioning,
        )

    def prompt_conditioning(self, prompt: PreviewPrompt, text: str) -> Conditioning:
        """A prompt's text as the denoiser wants it: trained encoders speak for themselves, the others did so before."""
        encoding = TextEncoding.stack([self.prompt_rows[text]])
        if self.trained_encoders:
            encoding = encoding.merged(self.text_stage.encode([text], self.trained_encoders))
        context, pooled = to_context(encoding, self.context_sizes, self.device, self.precision.dtype)
        return context, pooled, self.position_embedding((prompt.width, prompt.height), training=False)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents -> images. A VAE that previews alone need is in host memory between them, unless --highvram."""
        if self.vae is None:
            self.vae = self.load_vae()
        with onload(self.vae, self.device, keep_resident=self.latents is None or self.args.highvram):
            return self.vae.decode(denormalize(latents))


def joined_conditioning(first: Conditioning, second: Conditioning) -> Conditioning:
    """Two conditionings of images of one size as one batch; the position embedding is the same."""
    return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]), first[2]
