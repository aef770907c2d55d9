"""Fixtures that several folders of tests use."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_hub import FakeHub


def pytest_configure() -> None:
    """Take signals as a terminal's program does: a job in the background, or under nohup, starts with some of them ignored."""
    for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD3.5 Medium checkpoint with its tokenizers beside it, one for all processes of this run of pytest. Not to be written to."""
    from filelock import FileLock

    from tests.sd3.tiny import tiny_model_folder

    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # each worker has a folder of its own in it
    folder, making = root / "tiny_model", root / "tiny_model.unfinished"
    with FileLock(root / "tiny_model.lock"):
        if not folder.exists():
            shutil.rmtree(making, ignore_errors=True)
            tiny_model_folder(making, "5-medium")
            making.rename(folder)
    return folder / "tiny_sd3.safetensors"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A running fake Hub that huggingface_hub's client talks to."""
    from huggingface_hub import constants, hf_api

    server = FakeHub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    init = hf_api.HfApi.__init__
    monkeypatch.setattr(hf_api.HfApi, "__init__", lambda self, *a, **k: init(self, *a, **{"endpoint": server.url, **k}))
    yield server
    server.shutdown()
