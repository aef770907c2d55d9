"""Values that ended in a traceback, took the memory or never ended: a message, or a plan, at once."""

from __future__ import annotations

import logging
import time
import tracemalloc
from pathlib import Path

import pytest

from library.common.errors import UserError
from library.common.logging_setup import start_logging
from library.training.optimizers import check_optimizer
from library.training.schedulers import SchedulerSettings, check_schedule
from tests.end_to_end.conftest import Workshop, workshop  # noqa: F401 (a fixture)
from tests.end_to_end.runs import dataset_file
from tests.faults.inputs import plan_of

LITERALS = ["{[]: 1}", "{{}}", "[" * 100_000, "(" * 300 + ")" * 300, "-" * 100_000 + "1", "9" * 10_000]


@pytest.mark.parametrize("literal", LITERALS)
def test_strange_literals(literal: str):
    assert check_optimizer("AdamW", [f"betas={literal}"])
    assert check_schedule(SchedulerSettings(10, "constant", "StepLR", (f"step_size={literal}",)), 1e-3)


@pytest.mark.parametrize("name", ["sys.exit", "os.abort", "..x", ".", "builtins.print", "this.that", "os.path"])
def test_dotted_paths_to_anything(name: str):
    assert check_optimizer(name, None)
    assert check_schedule(SchedulerSettings(10, "constant", name), 1e-3)


@pytest.mark.parametrize("name", ["..x", ".", "", "os", "os.path", "networks", "a\nb", "/", "networks.lora_sd3.x"])
def test_network_modules(workshop: Workshop, tmp_path: Path, name: str):  # noqa: F811
    with pytest.raises(UserError, match="network_module"):
        plan_of(workshop.arguments(tmp_path, network_module=name))


@pytest.mark.parametrize("file", [".", "missing/x.log", "x" * 300, "a\0b"])
def test_a_log_file_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.root, "handlers", list(logging.root.handlers))
    with pytest.raises(UserError, match="--console_log_file"):
        start_logging(file=file)


@pytest.mark.parametrize(
    "options",
    [
        {"output_name": "n" * 240},
        {"output_name": "\udcff"},
        {"output_dir": "/tmp/" + "d" * 300},
        {"output_dir": "/tmp/" + "/".join(["d" * 200] * 30)},
        {"logging_dir": "/dev/null/x"},
        {"logging_dir": "/tmp/" + "d" * 300},
    ],
)
def test_names_that_no_file_can_have(workshop: Workshop, tmp_path: Path, options: dict[str, str]):  # noqa: F811
    with pytest.raises(UserError):
        plan_of(workshop.arguments(tmp_path, **options))


@pytest.mark.parametrize("name", ["max_train_steps", "max_train_epochs", "network_dim", "gradient_accumulation_steps"])
def test_endless_counts(workshop: Workshop, tmp_path: Path, name: str):  # noqa: F811
    with pytest.raises(UserError, match=name):
        plan_of(workshop.arguments(tmp_path, **{name: 10**400}))


@pytest.mark.parametrize(
    ("subset", "dataset"),
    [
        ("num_repeats = 1000000", "batch_size = 1"),
        ("num_repeats = 100000000000", "batch_size = 1"),
        ("", "enable_bucket = true\nmax_bucket_reso = 2147483647"),
        ("", "enable_bucket = true\nmax_bucket_reso = 2147483648"),
        ("", "resolution = 1000000000"),
        ("", "batch_size = 2147483647"),
    ],
)
def test_endless_datasets(workshop: Workshop, tmp_path: Path, subset: str, dataset: str):  # noqa: F811
    file = dataset_file(tmp_path / "d.toml", [f"image_dir = {str(workshop.folder / 'images')!r}\n{subset}"], dataset)
    if "resolution" in dataset:
        file.write_text(file.read_text().replace("resolution = 64\n", ""))
    started = time.perf_counter()
    tracemalloc.start()
    try:
        plan_of(workshop.arguments(tmp_path, dataset_config=file))
    except UserError as error:
        assert "10" in error.as_text() or "214" in error.as_text()
    assert tracemalloc.get_traced_memory()[1] < 300e6
    tracemalloc.stop()
    assert time.perf_counter() - started < 5
