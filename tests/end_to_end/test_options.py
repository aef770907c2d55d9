"""The walk over all options: each one's class, and that one that works changes what it says it changes."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from library.options.option import Kind, Option
from library.options.resolve import resolve_options
from library.options.table import BY_NAME, OPTIONS
from library.preflight.plan import plan_run
from library.preflight.run_length import initial_progress
from library.preflight.settings.models import base_weight_files, checkpoint_settings
from library.preflight.settings.monitoring import tracking_settings
from library.preflight.settings.plan import length_settings, plan_settings
from library.preflight.settings.training import flow_settings, loader_settings, loss_settings, scheduler_settings
from sd3_train_network import Sd3NetworkTrainer, main
from tests.end_to_end.conftest import ROOT, Workshop
from tests.end_to_end.option_evidence import ELSEWHERE, IN_METADATA, PEEK, PLANNED, RUN
from tests.end_to_end.runs import UNET, Run, dataset_file, image_folder, train
from tests.sd3.tiny import tiny_model_folder

WORKING = sorted(option.name for option in OPTIONS if option.kind is Kind.WORKS)
TIME = re.compile(r"\d{14}|\d+\.\d+\.\S+\.v2|tfevents.*")


def words_of(row: str, given: dict[str, str]) -> tuple[list[str], list[str]]:
    """The words of a row of the evidence: those of the option itself, and those of both runs."""
    own, _, both = row.partition("|")
    return shlex.split(own.format(**given)), shlex.split(both.format(**given))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("places")
    (folder / "prompts.txt").write_text("a cat --w 32 --h 32 --s 1 --d 1\n", encoding="utf-8")
    (folder / "tracker.toml").write_text("[tensorboard]\nflush_secs = 5\n", encoding="utf-8")
    data = dataset_file(folder / "one.toml", [f"image_dir = {str(image_folder(folder / 'images'))!r}"])
    return {
        "out": str(folder / "out"),
        "prompts": str(folder / "prompts.txt"),
        "toml": str(folder / "tracker.toml"),
        "one": f"--dataset_config {shlex.quote(str(data))}",
    }


def test_every_working_option_has_its_evidence_and_nothing_else_has():
    tables = [set(PLANNED), set(RUN), set(PEEK), set(ELSEWHERE)]
    assert sorted(set().union(*tables)) == WORKING
    assert sum(len(table) for table in tables) == len(WORKING), "an option is in two tables"


@pytest.mark.parametrize("place", sorted(set(ELSEWHERE.values())))
def test_the_tests_that_evidence_names_are_there_and_speak_of_their_options(place: str):
    path, _, name = place.partition("::")
    text = (ROOT / path).read_text(encoding="utf-8")
    functions = {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    assert name in functions
    for option in (option for option, where in ELSEWHERE.items() if where == place):
        assert option in text or option in IN_METADATA or option.endswith("_dropout_rate"), option


def test_every_option_is_read_by_the_program():
    """Its dest is an attribute or a name that some file below the options uses, or its row says that metadata has it."""
    found: set[str] = set()
    for path in [*(ROOT / "library").rglob("*.py"), ROOT / "sd3_train_network.py"]:
        if path.parent.name == "groups" or path.name == "checks.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
    for option in OPTIONS:
        if option.in_metadata and option.name in IN_METADATA:  # a text for metadata alone
            found.add(option.dest)
    silent = [name for name in WORKING if BY_NAME[name].dest not in found]
    assert silent == []


# --- what the plan tells -----------------------------------------------------------------------------------------------


def planned(workshop: Workshop, folder: Path, words: list[str]) -> dict[str, str]:
    """All that is settled before weights are read, by kind, as text."""
    resolved = resolve_options(workshop.arguments(folder, *words, max_train_steps=9))
    trainer = Sd3NetworkTrainer(resolved.args, resolved.problems)
    trainer.start()
    trainer.plan = plan_run(plan_settings(resolved.args), trainer.make_inspector(), trainer.problems)
    args, plan = resolved.args, trainer.plan
    return {
        "length": repr(plan.length),
        "rates": repr(plan.rates),
        "seed": repr(plan.seed),
        "prompts": repr(plan.prompts),
        "precision": repr(trainer.precision),
        "loader": repr(loader_settings(args, plan, 0, trainer.device)),
        "flow": repr(flow_settings(args)),
        "loss": repr(loss_settings(args)),
        "checkpointing": repr(checkpoint_settings(args)),
        "schedule": repr(scheduler_settings(args, plan.length.max_steps)),
        "tracking": TIME.sub("TIME", repr(tracking_settings(args))),
        "start": repr(initial_progress(length_settings(args), plan.length)),
        "base weights": repr(base_weight_files(args)),
        "folder": args.output_dir,
    }


@pytest.fixture(scope="module")
def plans(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What is planned with some words, worked out once for each."""
    folder = tmp_path_factory.mktemp("plan")
    return cache(lambda *words: planned(workshop, folder, list(words)))


@pytest.mark.parametrize("name", sorted(PLANNED))
def test_an_option_changes_the_plan(plans: Any, places: dict[str, str], name: str):
    own, both = words_of(PLANNED[name], places)
    assert f"--{name}" in own
    before, after = (plans(*both, *more) for more in ([], own))
    changed = {kind for kind in before if before[kind] != after[kind]}
    assert changed, "the plan is the same with and without it"
    if name == "mixed_precision":
        assert changed == {"precision"}
    if name.startswith(("huber", "loss_type")):
        assert changed == {"loss"}


# --- what a run leaves, and what is in it --------------------------------------------------------------------------------


def left_behind(run: Run) -> dict[str, Any]:
    """Files, formats, numbers and metadata of a run, without what always differs."""
    files = sorted(str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file())
    lora = next((path for path in run.folder.glob("*.safetensors") if path.stem in ("lora", "other")), None)
    formats, metadata = set(), {}
    if lora is not None:
        with safe_open(str(lora), "pt") as file:
            formats = {str(file.get_tensor(key).dtype) for key in file.keys()}  # noqa: SIM118 (no dict)
            metadata = dict(file.metadata())
    changing = ("session_id", "_at", "hash", "modelspec.date", "ss_output_name")
    lines = next(run.folder.glob("*.metrics.jsonl")).read_text(encoding="utf-8").splitlines()
    lines = [re.sub(r'"(seconds|memory_gib|preview)": [^,}]*', "", line) for line in lines]
    return {
        "files": [TIME.sub("TIME", name) for name in files],
        "formats": formats,
        "lines": lines,
        "metadata": {key: value for key, value in metadata.items() if not any(mark in key for mark in changing)},
    }


@pytest.fixture(scope="module")
def runs(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A short run with some words, made once for each."""

    def run(*words: str) -> Run:
        return train(workshop, tmp_path_factory.mktemp("run"), *words, text_encoder_lr="0")

    return cache(run)


@pytest.mark.parametrize("name", sorted(RUN))
def test_an_option_changes_what_a_run_leaves(runs: Any, places: dict[str, str], name: str):
    own, both = words_of(RUN[name], places)
    assert f"--{name}" in own
    before, after = (left_behind(runs(*both, *more)) for more in ([], own))
    changed = {kind for kind in before if before[kind] != after[kind]}
    if name.startswith(("save_", "sample_", "output_", "report", "no_report")):
        assert changed & {"files", "formats"}
    elif name == "no_metadata":
        assert changed == {"metadata"}
    else:
        assert "lines" in changed


@pytest.mark.parametrize("name", sorted(PEEK))
def test_an_option_changes_what_is_in_a_run(runs: Any, places: dict[str, str], name: str, workshop: Workshop, tmp_path):
    row, look = PEEK[name]
    own, both = words_of(row, places)
    assert f"--{name}" in own
    if name == "network_train_unet_only":
        before = look(train(workshop, tmp_path, max_train_steps=1).trainer)
    else:
        before = look(runs(*both).trainer)
    assert before != look(runs(*both, *own).trainer)


# --- options that are in no plan and in no file --------------------------------------------------------------------------


def test_what_is_told_of_the_lora_stands_in_its_metadata(workshop: Workshop, tmp_path: Path):
    words = [word for name in IN_METADATA for word in (f"--{name}", f"words of {name}")]
    train(workshop, tmp_path, UNET, *words, max_train_steps=1)
    with safe_open(str(tmp_path / "lora.safetensors"), "pt") as file:
        metadata = file.metadata()
    assert {name: metadata[key] for name, key in IN_METADATA.items()} == {
        name: f"words of {name}" for name in IN_METADATA
    }


def test_the_old_spelling_of_caption_extension_finds_captions(workshop: Workshop, tmp_path: Path):
    folder = image_folder(tmp_path / "train" / "1_x")
    (folder / "0.words").write_text("words of its own", encoding="utf-8")
    words = ("--train_data_dir", str(folder.parent), "--resolution", "64", "--caption_extention", ".words")
    run = train(workshop, tmp_path / "out", UNET, *words, dataset_config="", max_train_steps=1)
    assert run.trainer.plan.index.training[0].records[0].caption == "words of its own"


@pytest.mark.parametrize("word", ["--dry_run", "--debug_dataset"])
def test_a_dry_run_and_a_look_at_the_dataset_train_nothing(workshop: Workshop, tmp_path: Path, capsys, word: str):
    assert main(workshop.arguments(tmp_path, word, "--validation_split", "0.3")) == 0
    assert "8 images in 4 batches an epoch" in capsys.readouterr().out
    files = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    if word == "--dry_run":
        assert files == []
    else:
        kinds = ("training", "validation")
        assert files == [f"lora-{kind}-{end}" for kind in kinds for end in ("1-64x64.png", "captions.txt")]
        sheet = Image.open(tmp_path / "dataset" / "lora-training-1-64x64.png")
        colours = {sheet.getpixel((x, 100)) for x in range(20, 1000, 20)}
        assert len(colours) >= 3  # pictures and the paper between them


@pytest.mark.parametrize(
    ("words", "out", "error"),
    [
        ("", r"\d\d:\d\d:\d\d INFO    told\n", r"\d\d:\d\d:\d\d ERROR   alas\n"),
        ("--console_log_simple", r"told\n", r"alas\n"),
        ("--console_log_level ERROR", r"", r"\d\d:\d\d:\d\d ERROR   alas\n"),
        ("--console_log_file {log}", r"", r""),
    ],
)
def test_console_options(tmp_path: Path, words: str, out: str, error: str):
    """In a process of its own: pytest has the log of this one."""
    log = tmp_path / "log.txt"
    script = (
        "import logging, sys; from library.common.logging_setup import start_logging; from library.options.resolve import resolve_options;"
        "a = resolve_options(sys.argv[1:]).args; start_logging(a.console_log_level, a.console_log_file, a.console_log_simple); logging.info('told'); logging.error('alas')"
    )
    arguments = shlex.split(words.format(log=log.as_posix()))
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert re.fullmatch(out, done.stdout) and re.fullmatch(error, done.stderr), (done.stdout, done.stderr)
    assert log.exists() == ("--console_log_file" in words)
    if log.exists():
        assert log.read_text(encoding="utf-8").count("\n") == 2


def test_of_several_processes_the_first_has_the_log_and_the_others_tell_what_goes_wrong(tmp_path: Path):
    log = tmp_path / "log.txt"
    script = (
        "import logging; from library.common.logging_setup import start_logging;"
        f"start_logging(None, {str(log)!r}, True); logging.info('told'); logging.error('alas')"
    )
    environment = {**os.environ, "RANK": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.stderr == "[process 1] alas\n" and not log.exists()


def test_encoders_get_as_many_at_once_as_asked(workshop: Workshop, tmp_path: Path, monkeypatch):
    """While caching: images by --vae_batch_size, captions by --text_encoder_batch_size."""
    images, captions = [], []
    from library.sd3 import text_encoder_manager, vae

    encode, encode_captions = vae.Vae.encode, text_encoder_manager.encode_captions

    def count_images(self, pixels: torch.Tensor) -> Any:
        images.append(len(pixels))
        return encode(self, pixels)

    def count_captions(texts: list[str], *rest: Any, **more: Any) -> Any:
        captions.append(len(texts))
        return encode_captions(texts, *rest, **more)

    monkeypatch.setattr(vae.Vae, "encode", count_images)
    monkeypatch.setattr(text_encoder_manager, "encode_captions", count_captions)
    words = (UNET, "--cache_latents", "--cache_text_encoder_outputs")
    train(workshop, tmp_path, *words, vae_batch_size=4, text_encoder_batch_size=3, max_train_steps=1)
    assert images == [4, 2] and captions == [3, 3] * 3


def test_lowram_reads_the_denoiser_onto_its_device(workshop: Workshop, tmp_path: Path, monkeypatch):
    import sd3_train_network

    asked: list[str] = []
    load, start = sd3_train_network.load_mmdit, Sd3NetworkTrainer.start

    def note_device(part: Any, device: Any, *rest: Any) -> Any:
        asked.append(str(device))
        return load(part, device, *rest)

    def on_first_processor(self: Sd3NetworkTrainer) -> None:
        start(self)
        self.device = torch.device("cpu", 0)  # the training device, told from host memory by its number

    monkeypatch.setattr(sd3_train_network, "load_mmdit", note_device)
    monkeypatch.setattr(Sd3NetworkTrainer, "start", on_first_processor)
    plain = train(workshop, tmp_path / "a", UNET, max_train_steps=1)
    spared = train(workshop, tmp_path / "b", UNET, "--lowram", max_train_steps=1)
    assert asked == ["cpu", "cpu:0"] and plain.losses == spared.losses


def test_blocks_to_swap_changes_where_blocks_are_and_no_loss(workshop: Workshop, tmp_path: Path):
    model = tiny_model_folder(tmp_path / "deep", depth=4)
    deep = partial(train, workshop, pretrained_model_name_or_path=model, learning_rate="1e-2")
    plain, swapped = deep(tmp_path / "a", UNET), deep(tmp_path / "b", UNET, blocks_to_swap=2)
    limit = deep(tmp_path / "c", UNET, blocks_to_swap=32)
    assert plain.trainer.swapper is None and swapped.trainer.swapper.copies > 0
    assert swapped.trainer.swapper.order == limit.trainer.swapper.order
    assert plain.losses == swapped.losses == limit.losses
    whole = ("--network_train_text_encoder_only",)
    a, b = deep(tmp_path / "d", *whole), deep(tmp_path / "e", *whole, "--gradient_checkpointing", blocks_to_swap=2)
    assert a.losses == pytest.approx(b.losses) and a.moved() == pytest.approx(b.moved(), rel=1e-2)


def test_options_go_to_the_trackers_only_when_asked(workshop: Workshop, tmp_path: Path, monkeypatch):
    from library.monitoring import metrics as run_metrics

    told: list[Any] = []

    class Told(run_metrics.Trackers):
        def __init__(self, accelerator: Any, settings: Any, config: Any = None):
            told.append(config)
            super().__init__(accelerator, settings, None)

    monkeypatch.setattr(run_metrics, "Trackers", Told)
    for words in ((), ("--log_config",)):
        words = (UNET, "--logging_dir", str(tmp_path / "logs"), "--wandb_api_key", "hush", *words)
        train(workshop, tmp_path / "out", *words, max_train_steps=1)
    assert told[0] is None and told[1]["learning_rate"] == 0.001 and "wandb_api_key" not in told[1]


def test_a_tracker_is_the_one_that_is_asked_for(workshop: Workshop, tmp_path: Path):
    for given, meant in ((None, ("tensorboard",)), ("wandb", ("wandb",)), ("all", ("tensorboard", "wandb"))):
        words = [] if given is None else ["--log_with", given]
        args = resolve_options(workshop.arguments(tmp_path, "--logging_dir", str(tmp_path), *words)).args
        assert tracking_settings(args).names == meant


def test_hub_options_reach_the_uploader(workshop: Workshop, tmp_path: Path, monkeypatch):
    from library.preflight import prepare

    made: list[Any] = []

    class Uploader:
        def __init__(self, settings: Any):
            made.append(settings)

    monkeypatch.setattr(prepare, "HubUploader", Uploader)
    words = ["--huggingface_repo_id", "me/lora"]
    for more in (
        [],
        ["--huggingface_repo_type", "dataset", "--huggingface_path_in_repo", "a", "--async_upload"],
        ["--huggingface_repo_visibility", "public", "--huggingface_token", "hf_x"],
    ):
        resolved = resolve_options(workshop.arguments(tmp_path, *words, *more))
        trainer = Sd3NetworkTrainer(resolved.args)
        trainer.start()
        trainer.prepare()
    plain, placed, public = made
    assert (plain.repo_type, plain.path_in_repo, plain.in_background) == ("model", "", False)
    assert (placed.repo_type, placed.path_in_repo, placed.in_background) == ("dataset", "a", True)
    assert (plain.private, public.private, public.token) == (True, False, "hf_x")


# --- options that do not work ----------------------------------------------------------------------------------------------


def value_of(option: Option) -> list[str]:
    if option.is_switch:
        return []
    return [str(option.choices[-1])] if option.choices else ["3"]


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.kind is Kind.NO_EFFECT], ids=lambda option: option.name)
def test_an_option_without_effect_is_told_once_and_changes_nothing(
    workshop: Workshop, tmp_path: Path, plans: Any, option: Option
):
    words = workshop.arguments(tmp_path, option.flag, *value_of(option))
    resolved, plain = resolve_options(words), resolve_options(workshop.arguments(tmp_path))
    assert resolved.problems == plain.problems == []
    told = [warning for warning in resolved.warnings if option.flag in warning]
    assert len(told) == 1 and option.reason in told[0] and plain.warnings == []
    assert plans(option.flag, *value_of(option)) == plans()


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.kind is Kind.REFUSED], ids=lambda option: option.name)
def test_a_refused_option_stops_the_command_with_its_reason(workshop: Workshop, tmp_path: Path, capsys, option: Option):
    assert main(workshop.arguments(tmp_path, option.flag, *value_of(option))) == 2
    assert f"{option.flag} is refused: {option.reason}" in capsys.readouterr().err
