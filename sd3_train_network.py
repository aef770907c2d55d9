#!/usr/bin/env python3
"""Train LoRA for Stable Diffusion 3 Medium, 3.5 Medium and 3.5 Large. See docs/sd3_train_network.md, or --help."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from library.common.errors import RunInterrupted, UserError
from library.common.logging_setup import process_rank, start_logging
from library.options.config_file import write_config
from library.options.parser import build_parser
from library.options.resolve import ResolvedOptions, resolve_options


def setup_parser() -> argparse.ArgumentParser:
    """The parser of all options, for programs that show or fill them in."""
    return build_parser()


def read_options(argv: Sequence[str] | None = None) -> ResolvedOptions | int:
    """Read the command line (None: this process's own) and its config file; return the exit code where there is nothing to train."""
    try:
        options = resolve_options(argv)
        if options.args.output_config:
            print(f"Options written to {write_config(options.as_given)}")
            return 0
    except UserError as error:
        print(error.as_text(), file=sys.stderr)
        return 2
    return options


# Run as a script, the options are read before torch is imported: --help and mistakes in them answer at once.
COMMAND_LINE = read_options() if __name__ == "__main__" else None
if isinstance(COMMAND_LINE, int):
    sys.exit(COMMAND_LINE)

import torch
from torch import Tensor, nn

from library.distributed.consensus import has_lost_peer
from library.memory.quantization import quantize
from library.network_trainer import NetworkTrainer
from library.preflight.sd3_inspector import Sd3Inspector, mmdit_config
from library.preflight.settings.models import network_settings, sd3_settings
from library.saving.metadata import FamilyFacts
from library.saving.text_encoders import encoders_to_save, write_encoders
from library.sd3.checkpoint import ENCODERS, ModelFiles
from library.sd3.codec import CodecSettings, LatentCodec
from library.sd3.conditioner import (
    Conditioning,
    EncoderUse,
    PositionEmbedding,
    Sd3Conditioner,
    build_text_encoders,
)
from library.sd3.conditioning import ContextSizes, DropoutRates, TextSettings
from library.sd3.mmdit import MMDiT
from library.sd3.models import load_mmdit
from library.sd3.pos_embed import ScaledPosEmbed
from library.sd3.text_encoder_manager import EncoderPlacement, TextEncoderManager, WeightChange, parse_t5_dtype
from library.sd3.text_encoders import checkpoint_layers
from library.training.signals import ignore_early_save_requests
from networks.weight_files import group_by_layer

logger = logging.getLogger(__name__)


class Sd3NetworkTrainer(NetworkTrainer[ModelFiles, Conditioning]):
    """Trains networks on Stable Diffusion 3: names its models and how they are called."""

    encoders: TextEncoderManager
    denoiser: MMDiT

    def make_inspector(self) -> Sd3Inspector:
        network = network_settings(self.args)
        return Sd3Inspector(sd3_settings(self.args), network, self.precision.dtype, self.device)

    def make_text_encoders(self, files: ModelFiles) -> TextEncoderManager:
        args, dtype = self.args, self.precision.dtype
        t5_dtype, t5_storage = parse_t5_dtype(args.t5xxl_dtype, dtype)
        if args.fp8_base and not args.fp8_base_unet and t5_storage is None:
            t5_storage = "fp8"
        present = [name for name, part in files.encoders().items() if part is not None]
        placement = EncoderPlacement(
            device=self.device,
            dtype=dtype,
            t5_device=torch.device(args.t5xxl_device) if args.t5xxl_device else self.device,
            t5_dtype=t5_dtype,
            t5_quantization=t5_storage,
            quantize=partial(quantize, within=lambda path: True),
            mmap=not args.disable_mmap_load_safetensors,  # not for encoders that stay on the CPU
            change={
                name: WeightChange(*merge)
                for name, merge in self.base_weights.encoder_merges(ENCODERS, present).items()
            },
            keep_freed_memory=args.highvram,
        )
        settings = TextSettings(args.t5xxl_max_token_length, args.apply_lg_attn_mask, args.apply_t5_attn_mask)
        return build_text_encoders(files, args.tokenizer_cache_dir, settings, placement)

    def checkpoint_text_encoder(self, encoder: nn.Module) -> None:
        checkpoint_layers(encoder)

    def make_codec(self, files: ModelFiles) -> LatentCodec:
        args = self.args
        assert files.vae is not None  # preflight has refused files without one
        settings = CodecSettings(
            torch.float32 if args.no_half_vae else self.precision.dtype,
            args.vae_batch_size,
            mmap=self._maps_files(),
            keep_on_device=args.highvram or not args.cache_latents,
        )
        return LatentCodec(files.vae, settings, self.device)

    def load_denoiser(self, files: ModelFiles, device: torch.device) -> MMDiT:
        return load_mmdit(files.mmdit, device, self.precision.dtype, self._maps_files())

    def _maps_files(self) -> bool:
        """Weights that train on the CPU are read instead of mapped: a mapped file that is cut short kills the process."""
        return self.device.type != "cpu" and not self.args.disable_mmap_load_safetensors

    def make_conditioner(self) -> Sd3Conditioner:
        args, model = self.args, self.denoiser
        resolutions = [dataset.settings.resolution for dataset in self.plan.index.training]
        scaled = (
            ScaledPosEmbed(resolutions, model.config.hidden_size, self.device) if args.enable_scaled_pos_embed else None
        )
        return Sd3Conditioner(
            self.encoders,
            EncoderUse(self.texts.roles.live, self.texts.roles.trained),
            ContextSizes.from_files(self.plan.files, args.t5xxl_max_token_length),
            DropoutRates(args.clip_l_dropout_rate, args.clip_g_dropout_rate, args.t5_dropout_rate),
            PositionEmbedding(model, self.device, args.pos_emb_random_crop_rate, scaled),
            self.precision.dtype,
        )

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        context, pooled, pos_embed = conditioning
        velocity: Tensor = self.denoiser(noisy, timesteps, context, pooled, pos_embed)
        return velocity

    def save_text_encoders(self, lora: dict[str, Tensor], stem: Path) -> list[Path]:
        names = encoders_to_save(self.args.save_clip, self.args.save_t5xxl)
        changes = [*self.base_weights.changes, (1.0, group_by_layer(lora, "the LoRA"))]
        return write_encoders(self.plan.files, names, changes, stem.parent, stem.name) if names else []

    def metadata_facts(self) -> FamilyFacts:
        files = self.plan.files
        vae = files.vae.path if self.args.vae and files.vae is not None else None
        config = mmdit_config(files)
        parts = [part for part in (files.mmdit, *files.encoders().values(), files.vae) if part is not None]
        return FamilyFacts(config.kind, config.title, files.mmdit.path, vae, parts=parts)


def main(argv: Sequence[str] | None = None) -> int:
    """0: done. 1: interrupted in training and saved. 2: something for the user to correct, which has been printed. 130: Ctrl-C. Anything else is a bug, with its traceback.

    A run that a signal stops in training saves everything and raises SystemExit with 128 and the signal's number.
    """
    options = read_options(argv) if COMMAND_LINE is None else COMMAND_LINE
    if isinstance(options, int):
        return options
    ignore_early_save_requests()
    try:
        args = options.args
        start_logging(args.console_log_level, None if args.dry_run else args.console_log_file, args.console_log_simple)
        for warning in options.warnings if process_rank() == 0 else ():
            logger.warning(warning)
        Sd3NetworkTrainer(options.args, options.problems).train()
    except UserError as error:
        print(error.as_text(), file=sys.stderr)
        return 1 if isinstance(error, RunInterrupted) else 2
    except RuntimeError as error:
        if os.environ.get("WORLD_SIZE", "1") == "1" or not has_lost_peer(error):
            raise
        print(
            f"Process {process_rank()}: another process of this run has ended; its own message says why. "
            "Resume with the same command and --resume auto if a state was saved.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:  # in training it is caught, and everything is saved
        print("Stopped before training: nothing was lost, and caches that are written stay.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
