"""Fixtures that several folders of tests use."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.fake_hub import FakeHub


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
