"""One training run in the order in which it happens: `NetworkTrainer.train` is the table of contents.

A model family (SD3: sd3_train_network.py) subclasses NetworkTrainer and fills in the hooks at its end: which models there are,
and how the denoiser is called. Everything else is here, or one call away.
"""

from __future__ import annotations

import argparse
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor, nn

from library.caching.fill import texts_of_prompts
from library.caching.outputs import Latents, Texts, cache_latents, cache_texts
from library.common.model_family import LatentCodec, NoTextEncoders, TextEncoders
from library.common.progress import progress_bar
from library.common.seeds import seed_everything
from library.common.transformer import TransformerModel
from library.data.loader import Loader
from library.distributed.consensus import gather
from library.distributed.fsdp import ShardedModel
from library.distributed.launch import ShardingConfig
from library.memory.apply import apply_memory_optimizations
from library.memory.block_swap import BlockSwapper
from library.monitoring.dataset_sheets import draw_dataset
from library.monitoring.session import SessionData, SessionSettings, TrainingSession
from library.monitoring.trackers import tracking_problems
from library.preflight.inspector import ModelInspector
from library.preflight.network import make_network
from library.preflight.plan import RunPlan
from library.preflight.prepare import Prepared, prepare_run
from library.preflight.settings import models, monitoring, plan as plans, saving, training
from library.saving.metadata import FamilyFacts
from library.saving.resume import whole_state
from library.saving.run_lock import RunLock
from library.saving.state import SavedState
from library.training.adapted_model import AdaptedModel, Conditioner
from library.training.callback_settings import TrackingSettings
from library.training.optimization import Optimization, build_optimization
from library.training.precision import Precision
from library.training.runtime import start_runtime, translate_oom
from library.training.step import build_step
from networks.base_weights import BaseWeights
from networks.lora_sd3 import first_block
from networks.network import Network

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)
T = TypeVar("T")
FilesT = TypeVar("FilesT")  # how the family describes the files of its models
ConditioningT = TypeVar("ConditioningT")  # what it conditions its denoiser on


class NetworkTrainer(ABC, Generic[FilesT, ConditioningT]):
    """A run of sd3_train_network.py, or of another family's script."""

    def __init__(self, args: argparse.Namespace, problems: Sequence[str] = ()):
        """args: resolved options. problems: mistakes in them. What the stages leave is declared here."""
        self.args = args
        self.problems = list(problems)
        self.tracking: TrackingSettings
        self.accelerator: Accelerator
        self.device: torch.device
        self.precision: Precision
        self.sharding: ShardingConfig
        self.inspector: ModelInspector[FilesT]
        self.lock: RunLock | None = None  # tools that only prepare a run take none
        self.prepared: Prepared[FilesT]
        self.plan: RunPlan[FilesT]
        self.state: SavedState | None
        self.base_weights: BaseWeights
        self.encoders: TextEncoders
        self.texts: Texts
        self.codec: LatentCodec
        self.latents: Latents
        self.denoiser: TransformerModel
        self.swapper: BlockSwapper | None
        self.network: Network
        self.sharded: ShardedModel | None
        self.optimization: Optimization

    def train(self) -> Path | None:
        """Run everything; return the path of the LoRA, None for a dry run."""
        with RunLock() as self.lock:
            self.start()
            self.prepare()
            if self.args.dry_run or self.args.debug_dataset:
                self.show_plan()
                return None
            finished = saving.finished_lora(self.args, self.plan, self.state, self.inspector, self.accelerator)
            if finished is not None:
                return finished
            self.fetch_state()
            with self.doing("captions were encoded"):
                self.cache_texts()
            with self.doing("images were encoded"):
                self.cache_latents()
            with self.doing("the denoiser was loaded"):
                self.prepare_denoiser()
                self.create_network()
                self.shard_denoiser()
                self.create_optimizer()
            with self.doing("training"):
                return self.run()

    def start(self) -> None:
        """Find the device and the other processes; choose the number formats."""
        self.tracking = monitoring.tracking_settings(self.args)
        runtime = start_runtime(training.runtime_settings(self.args, self.tracking))
        self.accelerator, self.device = runtime.accelerator, runtime.device
        self.precision, self.sharding = runtime.precision, runtime.sharding
        self.problems += runtime.problems

    def prepare(self) -> None:
        """Work out the run from headers alone. UserError lists every mistake of the user."""
        self.inspector = self.make_inspector()
        settings, problems = plans.prepare_settings(self.args), [*self.problems, *tracking_problems(self.tracking)]
        self.prepared = prepare_run(settings, self.inspector, self.accelerator, self.precision, self.lock, problems)
        self.plan, self.state = self.prepared.plan, self.prepared.state
        if self.prepared.memory is not None:
            self.args = plans.planned_options(self.args, self.prepared.memory)
            if not self.args.dry_run and self.accelerator.is_main_process:
                logger.info("%s", self.prepared.memory.text())

    def show_plan(self) -> None:
        """Print what would be trained, for --dry_run and --debug_dataset, which draws sheets of the images too."""
        if not self.accelerator.is_main_process:
            return
        args, plan = self.args, self.plan
        print(self.prepared.text(args.gradient_accumulation_steps))
        if args.debug_dataset:
            settings = replace(training.loader_settings(args, plan, 0, self.device), workers=0, pin_memory=False)
            folder, name = Path(args.output_dir) / "dataset", args.output_name or "last"
            draw_dataset(plan.training, plan.validation, settings, folder, name)

    def fetch_state(self) -> None:
        """Download the whole of a state on the Hub, of which preparing has read the progress alone."""
        if self.state is not None and self.args.resume_from_huggingface:
            with self.accelerator.local_main_process_first():
                self.state = whole_state(plans.resume_settings(self.args))

    def cache_texts(self) -> None:
        """Encode captions and prompts ahead with the encoders whose outputs are cached; only the others stay loaded."""
        args, plan = self.args, self.plan
        self.base_weights = BaseWeights(models.base_weight_files(args))
        self.encoders = self.make_text_encoders(plan.files)
        self.texts = cache_texts(
            self.encoders,
            dict(zip(self.inspector.encoder_names(), plan.rates.trained_text_encoders)),
            args.cache_text_encoder_outputs,
            plan.index,
            texts_of_prompts(plan.prompts),
            plans.text_cache_settings(args, seed=plan.seed, bytes_each=self.inspector.caption_bytes(plan.files)),
            args.text_encoder_batch_size or 1,
            self.accelerator,
            lambda batches: self._progress(batches, "Encoding captions"),
        )

    def cache_latents(self) -> None:
        """Encode images ahead where latents are cached; the VAE stays loaded only for live encoding and previews."""
        args = self.args
        self.codec, self.latents = self.make_codec(self.plan.files), Latents()
        if not args.cache_latents:
            return
        settings = plans.latent_cache_settings(args, self.codec.fingerprint)
        batch_size, wrap = args.vae_batch_size, self._progress
        self.latents = cache_latents(self.codec, self.plan.index, settings, batch_size, self.accelerator, wrap)
        self.codec.release(keep_on_cpu=bool(args.sample_prompts))

    def prepare_denoiser(self) -> None:
        """The frozen denoiser with --base_weights merged, on its device, with the memory optimizations that were chosen."""
        args, plan, is_sharded = self.args, self.plan, self.sharding.base is not None
        seed_everything(plan.seed)
        # Swapped blocks stay in CPU memory; what is sharded may not be whole on any device.
        loads_to_device = args.lowram and not args.blocks_to_swap and not is_sharded
        self.denoiser = self.load_denoiser(plan.files, self.device if loads_to_device else torch.device("cpu"))
        self.base_weights.merge([], self.denoiser)
        depth = len(self.denoiser.blocks)
        settings = models.memory_settings(args, depth, is_sharded, several_sizes=len(plan.image_sizes()) > 1)
        self.swapper = apply_memory_optimizations(self.denoiser, settings, self.device)

    def create_network(self) -> None:
        """The LoRA, attached to the frozen models."""
        args, names = self.args, self.inspector.encoder_names()
        encoders = [self.encoders.model(name) if name in self.texts.roles.trained else None for name in names]
        denoiser = self.denoiser if self.plan.rates.unet > 0 else None
        seed_everything(self.plan.seed)
        network = make_network(models.network_settings(args), encoders, denoiser)
        self.network = network.to(self.device, self.precision.trained_dtype).train()
        self.network.attach()
        for encoder in encoders:
            if encoder is not None and args.gradient_checkpointing:
                self.checkpoint_text_encoder(encoder)

    def shard_denoiser(self) -> None:
        """Leave each process a shard of the denoiser's weights, where sharding is on."""
        self.sharded = None
        if self.sharding.base is not None:
            local_sizes = gather(self.accelerator, [int(os.environ.get("LOCAL_WORLD_SIZE", "1"))])
            first_trained = first_block(self.network.layers)
            self.sharded = ShardedModel(self.denoiser, self.sharding.base, self.device, local_sizes, first_trained)
            logger.info("%s", self.sharded.summary())

    def create_optimizer(self) -> None:
        settings = training.optimization_settings(self.args, self.plan, self.sharding.optimizer, self.precision)
        groups = self.network.parameter_groups(self.plan.rates)
        self.optimization = build_optimization(settings, self.network, groups, self.accelerator)

    def run(self) -> Path:
        """Train from the start, or from where a state left off, to the end. Returns the path of the LoRA."""
        args, plan, accelerator, family = self.args, self.plan, self.accelerator, self.metadata_facts()
        model = AdaptedModel(self.codec, self.make_conditioner(), self.predict, self.network)
        step = training.step_settings(args, plan, bool(self.texts.roles.trained), self.sharded is not None)
        settings = SessionSettings(
            callbacks=monitoring.callback_settings(args, plan, self.tracking, accelerator),
            saving=saving.saving_settings(args, plan.length.epochs),
            lora_files=saving.lora_file_settings(args),
            start=saving.start_settings(args, plan, self.state),
            uploads_states=bool(args.save_state_to_huggingface),
        )
        return TrainingSession(
            settings=settings,
            data=self.session_data(),
            accelerator=accelerator,
            model=model,
            network=self.network,
            optimization=self.optimization,
            step=build_step(step, accelerator, model, self.optimization, self.network, args.scale_weight_norms),
            family=family,
            facts=saving.run_facts(args, plan, family, self.network, self.optimization, accelerator),
            hub=self.prepared.hub,
            doing=self.doing,
            join_uneven_inputs=nullcontext if self.sharded is None else self.sharded.join_uneven_inputs,
            save_encoders=self.save_text_encoders,
        ).run()

    def session_data(self) -> SessionData:
        """The batches of the run, and its preview prompts."""
        plan, latents, texts = self.plan, self.latents, self.texts
        loading = training.loader_settings(self.args, plan, self.accelerator.process_index, self.device)
        loader = Loader(plan.training, loading, latents.training, texts.training)
        held_out = plan.validation
        validation = Loader(held_out, loading, latents.validation, texts.validation) if held_out else None
        return SessionData(plan.index, loader, plan.training.samples, validation, plan.prompts, texts.prompts)

    def doing(self, what: str) -> AbstractContextManager[None]:
        """Inside it, a full memory is reported with what was being done and what would make it fit."""
        whole_copies = self.accelerator.num_processes > 1 and self.sharding.base is None
        return translate_oom(what, self.device, models.memory_advice(self.args, whole_copies))

    def _progress(self, items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
        return progress_bar(items, title, self.accelerator.is_main_process, total)

    # --- hooks: what a model family provides -----------------------------------------------------------------------

    @abstractmethod
    def make_inspector(self) -> ModelInspector[FilesT]:
        """The family as preflight sees it: the headers of its files, and models on the meta device."""

    @abstractmethod
    def load_denoiser(self, files: FilesT, device: torch.device) -> TransformerModel:
        """The frozen denoiser in the run's dtype on `device`; its `blocks` and `run_block` serve the memory optimizations."""

    @abstractmethod
    def make_codec(self, files: FilesT) -> LatentCodec:
        """The autoencoder between images and latents."""

    @abstractmethod
    def make_conditioner(self) -> Conditioner[ConditioningT]:
        """What makes a batch's and a prompt's conditioning; encoders, texts and denoiser are there."""

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: ConditioningT) -> Tensor:
        """The denoiser's velocity [B, C, h, w] of noisy latents [B, C, h, w] at timesteps [B] in 0..1000."""

    @abstractmethod
    def metadata_facts(self) -> FamilyFacts:
        """What LoRA files and the report say about the base model."""

    def make_text_encoders(self, files: FilesT) -> TextEncoders:
        """The text encoders; none by default."""
        return NoTextEncoders()

    def checkpoint_text_encoder(self, encoder: nn.Module) -> None:
        """Recompute a trained encoder's activations in backward (--gradient_checkpointing)."""

    def save_text_encoders(self, lora: dict[str, Tensor], stem: Path) -> list[Path]:
        """Write the text encoders that are to be saved, with the LoRA merged in; return their paths."""
        return []
