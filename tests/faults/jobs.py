"""The trainings that are killed: tiny, and together they write every kind of file that a run can write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.end_to_end.conftest import Workshop
from tests.end_to_end.launching import CONFIGS, free_port
from tests.warm_processes import ROOT

STEPS = 5
PROMPTS = "a cat --w 64 --h 64 --s 2 --d 1\na dog --w 64 --h 64 --s 2 --d 2 --l 1.0\n"
EVERY_STEP = ("--save_state", "--save_every_n_steps", "1")
EVERY_OTHER_STEP = ("--save_state", "--save_every_n_steps", "2")
UNET = "--network_train_unet_only"
CACHES = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")
PREVIEWS = ("--sample_every_n_steps", "2", "--sample_at_first")


@dataclass(frozen=True)
class Job:
    """One training. Every run of it starts with no caches and no output."""

    name: str
    options: tuple[str, ...]
    processes: int = 1
    previews: bool = False

    def words(self, workshop: Workshop, folder: Path, launched: bool = False) -> list[str]:
        """The words after `python`, training into folder/output. launched: with accelerate's launcher, also for one process."""
        options = [*self.options, "--resume", "auto", "--cache_dir", str(folder / "cache")]
        if self.previews:
            options += [*PREVIEWS, "--sample_prompts", str(workshop.folder / "fault_prompts.txt")]
        arguments = workshop.arguments(folder / "output", *options, max_train_steps=STEPS)
        script = [str(ROOT / "sd3_train_network.py"), *arguments]
        if self.processes == 1 and not launched:
            return script
        return ["-m", "accelerate.commands.launch", *self._launcher(), *script]

    def _launcher(self) -> list[str]:
        if self.processes == 1:
            return ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        return ["--config_file", str(CONFIGS / "ddp.yaml"), "--main_process_port", str(free_port())]


JOBS = (
    Job("every step", (UNET, *EVERY_STEP, "--save_last_n_steps", "2", "--save_last_n_steps_state", "1")),
    Job("caches, EMA", (UNET, *EVERY_OTHER_STEP, *CACHES, "--ema_decay", "0.9")),
    Job(
        "text encoders",
        (*EVERY_OTHER_STEP, "--text_encoder_lr", "1e-4", "--ema_decay", "0.9", "--cache_latents_to_disk"),
    ),
    Job("previews", (UNET, *EVERY_OTHER_STEP, *CACHES), previews=True),
    Job("epochs, validation", (UNET, "--save_state", "--save_every_n_epochs", "1", "--validation_split", "0.3")),
    Job("accumulation", (UNET, *EVERY_OTHER_STEP, "--gradient_accumulation_steps", "2", "--flip_aug", "--color_aug")),
    Job("two processes", (UNET, *EVERY_OTHER_STEP, *CACHES, "--ema_decay", "0.9"), processes=2),
    Job("two, previews", (UNET, *EVERY_STEP, *CACHES, "--save_last_n_steps", "2"), processes=2, previews=True),
)


def write_prompts(workshop: Workshop) -> None:
    (workshop.folder / "fault_prompts.txt").write_text(PROMPTS, encoding="utf-8")
