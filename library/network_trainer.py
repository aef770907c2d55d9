"""One training run in the order in which it happens: `NetworkTrainer.train` is the table of contents.

A model family (SD3: sd3_train_network.py) subclasses NetworkTrainer and fills in the hooks at its end: which models there are,
and how the denoiser is called. Everything else is here, or one call away.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor, nn

from library.caching.fill import EncoderRoles, encoder_roles, texts_of_prompts
from library.caching.outputs import Latents, Texts, cache_latents, cache_texts
from library.common.errors import UserError, collect_errors
from library.common.model_family import LatentCodec, NoTextEncoders, TextEncoders
from library.common.progress import progress_bar
from library.common.seeds import StepGenerators, seed_everything
from library.common.transformer import TransformerModel
from library.data.loader import Batch, Loader, LoaderSettings, preserves
from library.data.settings import Size
from library.distributed.consensus import Agreement
from library.distributed.fsdp import ShardedModel
from library.distributed.gradients import GradientReducer
from library.distributed.launch import (
    ShardingConfig,
    check_resume_consistency,
    make_accelerator,
    requested_sharding,
    sharding_problems,
    sharding_warnings,
    start_processes,
)
from library.flow.samplers import SAMPLERS
from library.flow.timesteps import validation_timesteps
from library.memory.apply import apply_memory_optimizations
from library.memory.block_swap import BlockSwapper, swap_limit
from library.monitoring.async_scalars import AsyncScalars
from library.monitoring.contact_sheet import PreviewRecord
from library.monitoring.dataset_sheets import draw_dataset
from library.monitoring.metrics import LossAverages, MetricsSettings, RunMetrics
from library.monitoring.preview_callback import Previews, PreviewSchedule
from library.monitoring.previews import Previewer, PreviewSettings
from library.monitoring.report.html_page import RunDescription
from library.monitoring.report.run_report import RunReport, versions
from library.monitoring.trackers import TrackingSettings, chosen_trackers, log_folder, tracking_problems
from library.monitoring.validation import Validation, ValidationSettings
from library.options.values import metadata_options, resume_command, secret_values, shared_options, split_options
from library.preflight.inspector import ModelInspector
from library.preflight.memory import memory_budget, plan_memory, smallest_budget
from library.preflight.network import make_network
from library.preflight.plan import RunPlan, plan_run
from library.preflight.run_length import initial_progress
from library.preflight.settings import (
    accelerator_settings,
    base_weight_files,
    flow_settings,
    hub_settings,
    latent_cache_settings,
    length_settings,
    lora_file_settings,
    loss_settings,
    memory_advice,
    memory_settings,
    network_facts,
    network_settings,
    path_or_none,
    plan_settings,
    planned_options,
    planner_settings,
    resume_settings,
    saving_settings,
    scheduler_settings,
    sharding_options,
    spec_settings,
    state_options,
    text_cache_settings,
)
from library.saving.checkpoints import Checkpoints, EpochCheckpoints, StepCheckpoints
from library.saving.dataset_facts import facts_of_datasets
from library.saving.hub import HubUploader
from library.saving.lora_files import LoraFileWriter, TrainedWeights
from library.saving.metadata import FamilyFacts, FileMetadata, RunFacts
from library.saving.restore import override_start, restore
from library.saving.resume import resume_problems, state_to_resume, whole_state
from library.saving.run_facts import TrainingFacts, training_facts
from library.saving.saver import BackgroundSaver, translate_write_errors
from library.saving.state import SavedState, Stateful
from library.saving.state_writer import StateWriter
from library.training.adapted_model import AdaptedModel, Conditioner
from library.training.ema import WeightEma
from library.training.loop import Callback, TrainingLoop
from library.training.optimizer_names import can_be_sharded
from library.training.optimizers import OptimizerBundle, build_optimizer, build_sharded_optimizer, logged_rates
from library.training.out_of_memory import told_clearly
from library.training.precision import DTYPES, LossScaler, Precision, choose_precision
from library.training.schedulers import Schedule, build_schedule
from library.training.signals import StopSignals
from library.training.step import BatchLosses, StepSettings, TrainingStep
from library.training.stop_control import StopControl
from library.training.train_progress import NormReport, TrainProgress
from networks.base_weights import BaseWeights
from networks.lora_sd3 import first_block
from networks.network import Network

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)
T = TypeVar("T")
FilesT = TypeVar("FilesT")
"""How the family describes the files of its models."""
ConditioningT = TypeVar("ConditioningT")
"""What the family conditions its denoiser on."""


class NetworkTrainer(ABC, Generic[FilesT, ConditioningT]):
    """A run of sd3_train_network.py, or of another family's script."""

    def __init__(self, args: argparse.Namespace, problems: Sequence[str] = ()):
        """args: resolved options. problems: known mistakes in them, reported with all others."""
        self.args = args
        self.problems = list(problems)
        # What the stages of `train` leave, in their order.
        self.tracking: TrackingSettings
        self.precision: Precision
        self.accelerator: Accelerator
        self.device: torch.device
        self.sharding: ShardingConfig
        self.hub: HubUploader | None
        self.state: SavedState | None
        self.inspector: ModelInspector[FilesT]
        self.plan: RunPlan[FilesT]
        self.memory: str  # table of the memory plan
        self.base_weights: BaseWeights
        self.encoders: TextEncoders
        self.roles: EncoderRoles
        self.texts: Texts
        self.codec: LatentCodec
        self.latents: Latents
        self.denoiser: TransformerModel
        self.swapper: BlockSwapper | None
        self.network: Network
        self.groups: list[dict[str, object]]
        self.parameters: list[nn.Parameter]
        self.sharded: ShardedModel | None
        self.reducer: GradientReducer
        self.optimizer: OptimizerBundle
        self.schedule: Schedule
        self.ema: WeightEma | None
        self.scaler: LossScaler | None
        self.loader: Loader
        self.validation_loader: Loader | None
        self.conditioner: Conditioner[ConditioningT]
        self.step: TrainingStep[ConditioningT]

    def train(self) -> Path | None:
        """The whole run. Returns the path of the LoRA; None for a dry run."""
        self.prepare()
        if self.args.dry_run or self.args.debug_dataset:
            self.show_plan()
            return None
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
        self.make_loaders()
        with self.doing("training"):
            return self.run()

    def prepare(self) -> None:
        """Find the devices and work out the run. Headers alone are read, and every mistake of the user is told."""
        self.start_processes()
        self.hub = collect_errors(self.problems, self.start_uploads)
        with self.accelerator.local_main_process_first():  # one process of each machine downloads
            self.state = collect_errors(self.problems, lambda: state_to_resume(resume_settings(self.args)))
        self.problems += check_resume_consistency(
            self.gather([None if self.state is None else self.state.position]), self.args.resume
        )
        self.problems += tracking_problems(self.tracking)
        self.inspector = self.make_inspector()
        self.plan = plan_run(
            plan_settings(self.args),
            self.inspector,
            self.problems,
            self.accelerator.num_processes,
            lambda seed: self.gather([seed])[0],
            self.state,
        )
        self.memory = self.plan_memory()

    def plan_memory(self) -> str:
        """Choose the memory options that are left to the trainer, and report which and why; "" where none are."""
        settings, processes = planner_settings(self.args), self.accelerator.num_processes
        if not settings.is_active:
            return ""
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        budget = smallest_budget(self.gather([memory_budget(settings.vram, self.device, local_processes)]))
        chosen = plan_memory(settings, self.plan, self.inspector, self.device, self.precision, processes, budget)
        self.args = planned_options(self.args, chosen)
        if not self.args.dry_run and self.accelerator.is_main_process:
            logger.info("%s", chosen.text())
        return chosen.text()

    def start_processes(self) -> None:
        """Find the device and the other processes; choose the number formats."""
        args = self.args
        self.tracking = tracking_settings(args)
        self.precision = choose_precision(
            args.mixed_precision, args.full_fp16, args.full_bf16, start_processes(args.ddp_timeout)
        )
        self.accelerator = make_accelerator(
            accelerator_settings(args, self.precision, self.tracking.names, self.tracking.folder)
        )
        self.device = self.accelerator.device
        options = sharding_options(args)
        request = requested_sharding(options, os.environ)
        self.problems += sharding_problems(request, options, self.accelerator.num_processes)
        self.sharding = request.sharding if self.accelerator.num_processes > 1 else ShardingConfig()
        for warning in (*sharding_warnings(request, self.accelerator.num_processes), *self.precision.warnings):
            logger.warning(warning)

    def gather(self, items: list[T]) -> list[T]:
        """The items of all processes, on all processes."""
        if self.accelerator.num_processes == 1:
            return items
        from accelerate.utils import gather_object

        return gather_object(items)

    def fetch_state(self) -> None:
        """The whole of a state on the Hub, of which preparing has read the position alone."""
        if self.state is not None and self.args.resume_from_huggingface:
            with self.accelerator.local_main_process_first():
                self.state = whole_state(resume_settings(self.args))

    def start_uploads(self) -> HubUploader | None:
        """Reach the Hub repository now, if files are to be uploaded to one."""
        settings, only_shown = hub_settings(self.args), self.args.dry_run or self.args.debug_dataset
        if settings is None or only_shown or not self.accelerator.is_main_process:
            return None
        return HubUploader(settings)

    def show_plan(self) -> None:
        """Print what would be trained, for `--dry_run` and `--debug_dataset`, which draws sheets of the images too."""
        if not self.accelerator.is_main_process:
            return
        args, plan = self.args, self.plan
        print(plan.text(args.gradient_accumulation_steps))
        if self.memory:
            print(f"\n{self.memory}")
        if not args.debug_dataset:
            return
        settings = replace(self.loader_settings(), workers=0, pin_memory=False)
        folder, name = Path(args.output_dir) / "dataset", args.output_name or "last"
        with translate_write_errors(folder):
            draw_dataset(plan.training, plan.validation, settings, folder, name)

    def cache_texts(self) -> None:
        """Encode captions and prompts ahead with the encoders whose outputs are cached; only the others stay loaded."""
        args, plan = self.args, self.plan
        self.base_weights = BaseWeights(base_weight_files(args))
        self.encoders = self.make_text_encoders(plan.files)
        trains = dict(zip(self.inspector.encoder_names(), plan.rates.trained_text_encoders))
        self.roles = encoder_roles(self.encoders.present, trains, args.cache_text_encoder_outputs)
        fingerprint = self.encoders.fingerprint(self.roles.ahead) if self.roles.ahead else ""
        self.texts = cache_texts(
            self.encoders,
            self.roles,
            plan.index,
            texts_of_prompts(plan.prompts),
            text_cache_settings(args, fingerprint, plan.seed, self.inspector.caption_bytes(plan.files)),
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
        settings = latent_cache_settings(args, self.codec.fingerprint)
        self.latents = cache_latents(
            self.codec, self.plan.index, settings, args.vae_batch_size, self.accelerator, self._progress
        )
        if args.sample_prompts:
            self.codec.offload()
        else:
            self.codec.unload()

    def prepare_denoiser(self) -> None:
        """The frozen denoiser with --base_weights merged, on its device, with the memory optimizations that were chosen."""
        args, is_sharded = self.args, self.sharding.base is not None
        seed_everything(self.plan.seed)
        # Swapped blocks stay in CPU memory; what is sharded may not be whole on any device.
        loads_to_device = args.lowram and not args.blocks_to_swap and not is_sharded
        self.denoiser = self.load_denoiser(self.plan.files, self.device if loads_to_device else torch.device("cpu"))
        self.base_weights.merge([], self.denoiser)
        depth = len(self.denoiser.blocks)
        blocks = min(int(args.blocks_to_swap or 0), swap_limit(depth))
        if int(args.blocks_to_swap or 0) > blocks:
            logger.warning(
                "blocks_to_swap %d is lowered to %d: this model has %d blocks.", args.blocks_to_swap, blocks, depth
            )
        settings = memory_settings(args, blocks, is_sharded, len(self.image_sizes()) > 1)
        self.swapper = apply_memory_optimizations(self.denoiser, settings, self.device)

    def create_network(self) -> None:
        """The LoRA, attached to the frozen models."""
        args, rates = self.args, self.plan.rates
        encoders = [
            self.encoders.model(name) if name in self.roles.trained else None for name in self.inspector.encoder_names()
        ]
        seed_everything(self.plan.seed)
        network = make_network(network_settings(args), encoders, self.denoiser if rates.unet > 0 else None)
        self.network = network.to(self.device, self.precision.trained_dtype).train()
        self.network.attach()
        if args.gradient_checkpointing:
            for encoder in encoders:
                if encoder is not None:
                    self.checkpoint_text_encoder(encoder)
        groups = self.network.parameter_groups(rates)
        self.group_names = [group["name"] for group in groups]
        self.groups = groups
        self.parameters = [parameter for group in groups for parameter in group["params"]]

    def shard_denoiser(self) -> None:
        """Leave a share of the denoiser's weights on each process, where that is wanted."""
        self.sharded: ShardedModel | None = None
        if self.sharding.base is None:
            return
        local_sizes = self.gather([int(os.environ.get("LOCAL_WORLD_SIZE", "1"))])
        self.sharded = ShardedModel(
            self.denoiser, self.sharding.base, self.device, local_sizes, first_block(self.network.layers)
        )
        logger.info("%s", self.sharded.summary())

    def join_uneven_inputs(self) -> AbstractContextManager[None]:
        """Inside it processes may call the denoiser different numbers of times."""
        return nullcontext() if self.sharded is None else self.sharded.join_uneven_inputs()

    def create_optimizer(self) -> None:
        args = self.args
        given = (args.optimizer_type, self.groups, args.learning_rate, args.optimizer_args)
        self.reducer = GradientReducer(self.parameters, self.accelerator.num_processes)
        if self.sharding.optimizer and can_be_sharded(args.optimizer_type):
            self.optimizer = build_sharded_optimizer(*given, self.reducer, self.accelerator.process_index)
        else:
            if self.sharding.optimizer:
                logger.warning(
                    "A step of %s may look at all weights at once: every process keeps its whole state.",
                    args.optimizer_type,
                )
            self.optimizer = build_optimizer(*given)
        self.schedule = build_schedule(
            scheduler_settings(args, self.plan.length.max_steps),
            self.optimizer.optimizer,
            self.optimizer.is_schedule_free,
            self.optimizer.forced_schedule,
        )
        self.optimizer.train()
        self.ema = WeightEma(dict(self.network.named_parameters()), args.ema_decay) if args.ema_decay else None
        self.scaler = LossScaler(self.device) if self.precision.scale_loss else None

    def loader_settings(self) -> LoaderSettings:
        args, plan = self.args, self.plan
        return LoaderSettings(
            seed=plan.seed,
            steps_per_epoch=plan.length.steps_per_epoch,
            accumulation=args.gradient_accumulation_steps,
            max_train_steps=plan.length.max_steps,
            rank=self.accelerator.process_index,
            workers=min(args.max_data_loader_n_workers, (os.cpu_count() or 1) - 1),
            pin_memory=self.device.type == "cuda",
            persistent=args.persistent_data_loader_workers,
            skip_bad_images=args.skip_bad_images,
        )

    def make_loaders(self) -> None:
        args, plan, settings = self.args, self.plan, self.loader_settings()
        self.loader = Loader(plan.training, settings, self.latents.training, self.texts.training)
        self.validation_loader = (
            Loader(plan.validation, settings, self.latents.validation, self.texts.validation)
            if plan.validation
            else None
        )
        self.validation_timesteps = validation_timesteps(flow_settings(args))
        self.validation_seed = plan.seed if args.validation_seed is None else args.validation_seed

    def make_step(self) -> TrainingStep[ConditioningT]:
        """One optimizer step of the run."""
        args, plan = self.args, self.plan
        datasets = (*plan.index.training, *plan.index.validation)
        any_preserved = any(preserves(subset) for dataset in datasets for subset in dataset.settings.subsets)
        settings = StepSettings(
            accumulation=args.gradient_accumulation_steps,
            max_grad_norm=args.max_grad_norm,
            seed=plan.seed,
            flow=flow_settings(args),
            loss=loss_settings(args),
            trains_conditioning=bool(self.roles.trained),
            base_on_all_ranks=self.sharded is not None and any_preserved,
        )
        return TrainingStep(
            settings=settings,
            accelerator=self.accelerator,
            model=AdaptedModel(self.codec, self.conditioner, self.predict, self.network),
            parameters=self.parameters,
            optimizer=self.optimizer,
            schedule=self.schedule,
            reducer=self.reducer,
            scaler=self.scaler,
            ema=self.ema,
            post_step_hook=self._clip_norms if args.scale_weight_norms else None,
        )

    def run(self) -> Path:
        """Train from the start, or from where a state left off, to the end."""
        args, plan = self.args, self.plan
        self.conditioner = self.make_conditioner()
        self.step = self.make_step()
        scalars = AsyncScalars(self.device, lockstep=self.accelerator.num_processes > 1)
        averages = LossAverages(plan.length.steps_per_epoch, scalars)
        components = self.components(averages)
        saver, signals, records = BackgroundSaver(), StopSignals(), []  # type: ignore[var-annotated]
        checkpoints = self.make_checkpoints(saver, components)
        metrics = self.make_metrics(scalars, averages, checkpoints)
        stop = StopControl(signals, Agreement(self.accelerator.num_processes), checkpoints.minutes_are_up)
        report = self.make_report(metrics, records, lambda: signals.received is not None)
        validation = self.make_validation(metrics, stop)
        previews = self.make_previews(metrics, stop, saver, records)
        steps = StepCheckpoints(checkpoints, stop.should_save)
        callbacks: list[Callback | None] = [
            report, metrics, stop, steps, validation, EpochCheckpoints(checkpoints), previews
        ]  # fmt: skip
        with ExitStack() as stack:
            for context in (report, self.hub, saver, signals, metrics):  # closed in reverse order
                if context is not None:
                    stack.enter_context(context)
            progress = self.starting_progress(checkpoints.names.folder, components)
            records += metrics.start(progress)
            if report is not None:
                report.start(progress)
            if previews is not None:
                previews.start(progress)
            active = [callback for callback in callbacks if callback is not None]
            accumulation, max_steps = args.gradient_accumulation_steps, plan.length.max_steps
            loop = TrainingLoop(self.step, accumulation, max_steps, active, stop.should_stop)
            progress = loop.run(progress, self.loader.batches, plan.training.samples)
            if stop.should_stop() and progress.step < plan.length.max_steps:
                checkpoints.save_stopped(progress)
                checkpoints.flush()
                stop.exit(progress.step)
            path = checkpoints.save_final(progress, self.save_text_encoders)
            checkpoints.flush()
            return path

    # --- what happens between steps --------------------------------------------------------------------------------

    def components(self, averages: LossAverages) -> dict[str, Stateful]:
        """What a training state holds beside the weights, by the names of its files."""
        parts: dict[str, Stateful | None] = {
            "optimizer": self.optimizer,
            "scheduler": self.schedule,
            "averages": averages,
            "scaler": self.scaler,
            "ema": self.ema,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def make_checkpoints(self, saver: BackgroundSaver, components: Mapping[str, Stateful]) -> Checkpoints:
        """The saves of LoRA files and states."""
        args, weights = self.args, self.trained_weights
        metadata = FileMetadata(self.run_facts()) if self.accelerator.is_main_process else None
        files = LoraFileWriter(weights, lora_file_settings(args), metadata, saver, self.hub)
        hub = self.hub if args.save_state_to_huggingface else None
        options = partial(state_options, args, self.plan)
        states = StateWriter(self.network, components, options, saver, self.accelerator, hub)
        return Checkpoints(saving_settings(args, self.plan.length.epochs), files, states)

    @property
    def trained_weights(self) -> TrainedWeights:
        return TrainedWeights(self.network, self.optimizer, self.ema)

    def run_facts(self) -> RunFacts:
        """What the metadata of LoRA files says about the run."""
        args, plan, optimizer = self.args, self.plan, self.optimizer
        family, processes = self.metadata_facts(), self.accelerator.num_processes
        schedule = optimizer.forced_schedule or args.lr_scheduler_type or args.lr_scheduler
        training = TrainingFacts(
            unet_lr=plan.rates.unet or None,
            text_encoder_lr=list(plan.rates.text_encoders) if any(plan.rates.text_encoders) else None,
            num_batches_per_epoch=plan.training.batches_per_epoch,
            num_epochs=plan.length.epochs,
            max_train_steps=plan.length.max_steps,
            lr_scheduler=None if optimizer.is_schedule_free else schedule,
            optimizer=optimizer.name_for_metadata,
            mixed_precision=next(name for name, dtype in DTYPES.items() if dtype == self.precision.dtype),
            seed=plan.seed,
            num_processes=processes,
            base_weights=[Path(path).name for path in args.base_weights or ()] or None,
            base_weights_multiplier=args.base_weights_multiplier,
        )
        batches_per_step = None if args.dataset_config else processes * args.gradient_accumulation_steps
        datasets = facts_of_datasets(plan.index, batches_per_step)
        network = network_facts(args, self.network.layers)
        facts = training_facts(metadata_options(args), family, network, training, datasets, time.time())
        return RunFacts(facts, spec_settings(args, family.kind, plan.index.training), family, args.no_metadata)

    def make_metrics(self, scalars: AsyncScalars, averages: LossAverages, checkpoints: Checkpoints) -> RunMetrics:
        args = self.args
        settings = MetricsSettings(
            file=checkpoints.names.folder / f"{args.output_name or 'last'}.metrics.jsonl",
            max_steps=self.plan.length.max_steps,
            max_nonfinite_steps=args.max_nonfinite_steps,
            has_validation=self.validation_loader is not None,
            tracking=self.tracking,
            config=shared_options(args) if args.log_config else None,
        )
        rates = partial(logged_rates, self.optimizer.optimizer, self.group_names)
        save = checkpoints.save_stopped
        return RunMetrics(settings, self.accelerator, scalars, averages, self.schedule, rates, save)

    def make_validation(self, metrics: RunMetrics, stop: StopControl) -> Validation | None:
        args = self.args
        if self.validation_loader is None or self.plan.validation is None:
            return None
        settings = ValidationSettings(
            timesteps=self.validation_timesteps,
            seed=self.validation_seed,
            batches=self.plan.validation.batches_per_epoch,
            max_batches=args.max_validation_steps,
            every_steps=args.validate_every_n_steps,
            every_epochs=args.validate_every_n_epochs,
        )
        contexts = (partial(self.doing, "validating"), self.trained_weights.evaluation)
        given = (self.validation_loader, self.validation_losses, self.network, self.accelerator)
        return Validation(settings, *given, metrics, stop.should_stop, contexts)

    def make_previews(
        self, metrics: RunMetrics, stop: StopControl, saver: BackgroundSaver, records: list[PreviewRecord]
    ) -> Previews | None:
        args, previewer = self.args, self.make_previewer()
        if previewer is None:
            return None
        schedule = PreviewSchedule(
            sheet=Path(args.output_dir) / f"{args.output_name or 'last'}_contact_sheet.png",
            at_first=args.sample_at_first,
            every_steps=args.sample_every_n_steps,
            every_epochs=args.sample_every_n_epochs,
        )
        contexts = (partial(self.doing, "drawing previews"), self.trained_weights.evaluation, self.join_uneven_inputs)
        network, gather = self.network, self.gather
        return Previews(schedule, previewer, network, metrics, saver, gather, stop.should_stop, records, contexts)

    def make_report(
        self, metrics: RunMetrics, records: Sequence[PreviewRecord], interrupted: Callable[[], bool]
    ) -> RunReport | None:
        args, length, family = self.args, self.plan.length, self.metadata_facts()
        if not (args.report and self.accelerator.is_main_process):
            return None
        changed, defaults = split_options(args)
        parameters = sum(parameter.numel() for parameter in self.parameters)
        network = f"{args.network_module}, {parameters:,} parameters"
        description = RunDescription(
            title=args.output_name or "LoRA training",
            max_steps=length.max_steps,
            epochs=length.epochs,
            about=[family.title, family.base_file.name, network, self.optimizer.name_for_metadata],
            options=changed,
            other_options=defaults,
            versions=versions(self.device),
            resume_command=resume_command(args, self.accelerator.num_processes),
        )
        path = Path(args.output_dir) / "report.html"
        return RunReport(path, description, self.plan.index, metrics, records, interrupted)

    def starting_progress(self, folder: Path, components: Mapping[str, Stateful]) -> TrainProgress:
        """Load the state to resume from, if any. Returns where training begins."""
        args, state, progress = self.args, self.state, TrainProgress()
        length, start = length_settings(args), initial_progress(length_settings(args), self.plan.length)
        if state is not None:
            last = None if length.sets_start else self.plan.length.max_steps
            # again: memory options may have been chosen since
            problems = resume_problems(state, state_options(args, self.plan), last)
            if problems:
                raise UserError(problems)
            progress = restore(state, self.network, components)
        elif args.resume:
            logger.info("--resume auto: there is no state in %s yet; starting anew.", folder)
        return progress if start is None else override_start(start, state, self.schedule)

    def validation_losses(self, batch: Batch, generators: StepGenerators, timestep: int) -> BatchLosses:
        """The losses of a validation micro-batch at one timestep."""
        return self.step.losses(batch, generators, timestep)

    def doing(self, what: str) -> AbstractContextManager[None]:
        """Inside it, a full memory is told with what was being done and what would make it fit."""
        whole_copies = self.accelerator.num_processes > 1 and self.sharding.base is None
        return told_clearly(what, self.device, memory_advice(self.args, whole_copies))

    def _progress(self, items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
        """A progress bar on the main process."""
        return progress_bar(items, title, self.accelerator.is_main_process, total)

    def _clip_norms(self) -> NormReport:
        return self.network.scale_weight_norms(self.args.scale_weight_norms)

    def make_previewer(self) -> Previewer[ConditioningT] | None:
        """The previews that are asked for, or None."""
        args, plan = self.args, self.plan
        if not plan.prompts or not (args.sample_at_first or args.sample_every_n_steps or args.sample_every_n_epochs):
            return None
        settings = PreviewSettings(
            Path(args.output_dir),
            args.output_name or "",
            SAMPLERS.get(args.sample_sampler, "euler"),
            self.accelerator.process_index,
            self.accelerator.num_processes,
            max(w * h * d.settings.batch_size for d in plan.index.training for w, h in d.buckets),
        )
        conditioner = self.conditioner
        return Previewer(
            plan.prompts,
            settings,
            lambda prompt, text: conditioner.of_prompt(prompt, text, self.texts.prompts[text]),
            self.predict,
            self.codec.decode,
            self.device,
            conditioner.join,
        )

    def image_sizes(self) -> set[Size]:
        """All sizes (W, H) that the denoiser will see."""
        datasets = (*self.plan.index.training, *self.plan.index.validation)
        prompts = {(prompt.width, prompt.height) for prompt in self.plan.prompts}
        return prompts.union(*(dataset.buckets for dataset in datasets))

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


def tracking_settings(args: argparse.Namespace) -> TrackingSettings:
    """Which trackers log what, and where."""
    return TrackingSettings(
        chosen_trackers(args.log_with, args.logging_dir),
        log_folder(args.logging_dir, args.log_prefix),
        args.log_tracker_name or "network_train",
        args.wandb_run_name,
        path_or_none(args.log_tracker_config),
        args.wandb_api_key,
        secret_values(args),
    )
