"""The Hugging Face Hub: saved files are uploaded beside training, and a state can be fetched from there.

An upload never fails a run: it is tried again, and in the end only logged.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from library.common.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)
TRIES = 3
SECONDS_BEFORE_RETRY = 5.0


@dataclass(frozen=True)
class HubSettings:
    repo_id: str  # user/name
    repo_type: str = "model"
    path_in_repo: str = ""  # folder in the repository
    private: bool = True
    token: str | None = field(default=None, repr=False)
    in_background: bool = False
    seconds_before_retry: float = SECONDS_BEFORE_RETRY

    def target(self, path: Path) -> str:
        """Where a file or folder goes in the repository."""
        folder = self.path_in_repo.strip("/")
        return f"{folder}/{path.name}" if folder else path.name


class HubUploader:
    """Uploads files and folders one after another. Use it as a context: leaving it waits for what is under way."""

    def __init__(self, settings: HubSettings):
        """Make the repository if it is not there. UserError where that fails: better now than in hour three."""
        from huggingface_hub import HfApi

        self.settings = settings
        self.api: HfApi = HfApi(token=settings.token)
        try:
            self.api.create_repo(
                settings.repo_id, repo_type=settings.repo_type, private=settings.private, exist_ok=True
            )
        except Exception as error:  # no network, no token, no right: the remedy is one
            raise UserError(
                f"--huggingface_repo_id {settings.repo_id}: the repository cannot be reached or made ({_first_line(error)}). "
                "Check the name and --huggingface_token, or log in with `hf auth login`."
            ) from error
        self._pending: queue.Queue[Path | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="hub", daemon=True)
        self._thread.start()

    def __enter__(self) -> HubUploader:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._pending.put(None)
        self._thread.join()

    def submit(self, path: Path) -> None:
        """Upload a file or a folder: now, or beside training with --async_upload."""
        self._pending.put(path)
        if not self.settings.in_background:
            self._pending.join()

    def flush(self) -> None:
        self._pending.join()

    def _work(self) -> None:
        while True:
            path = self._pending.get()
            try:
                if path is None:
                    return
                self._upload(path)
            finally:
                self._pending.task_done()

    def _upload(self, path: Path) -> None:
        target = self.settings.target(path)
        for attempt in range(1, TRIES + 1):
            try:
                self._send(path, target)
                logger.info("Uploaded %s to %s as %s", path.name, self.settings.repo_id, target)
                return
            except Exception as error:
                if not path.exists():
                    logger.info("%s was removed before it was uploaded", path.name)
                    return
                last = attempt == TRIES
                logger.warning(
                    "Upload of %s failed (%s)%s",
                    path.name,
                    _first_line(error),
                    "; given up." if last else "; once more.",
                )
                if not last:
                    time.sleep(self.settings.seconds_before_retry * attempt)

    def _send(self, path: Path, target: str) -> None:
        repo_id, repo_type = self.settings.repo_id, self.settings.repo_type
        if path.is_dir():
            self.api.upload_folder(folder_path=str(path), repo_id=repo_id, repo_type=repo_type, path_in_repo=target)
        else:
            self.api.upload_file(path_or_fileobj=str(path), repo_id=repo_id, repo_type=repo_type, path_in_repo=target)


def fetch_state(address: str, folder: Path, token: str | None, files: str = "*") -> Path:
    """Download a state: `user/repo/path[:revision[:type]]` -> the local state folder, under `folder`.

    files: a pattern for the names of the files to download. UserError says what is wrong with the address, or why the
    download failed.
    """
    name, _, rest = address.partition(":")
    revision, _, repo_type = rest.partition(":")
    user, _, rest = name.partition("/")
    repo, _, path = rest.partition("/")
    if not (user and repo and path):
        raise UserError(
            f"--resume {address}: with --resume_from_huggingface it must be user/repo/path[:revision[:type]]."
        )
    from huggingface_hub import snapshot_download

    try:
        root = snapshot_download(
            f"{user}/{repo}",
            repo_type=repo_type or "model",
            revision=revision or None,
            allow_patterns=f"{path.strip('/')}/{files}",
            local_dir=str(folder),
            token=token,
        )
    except Exception as error:
        raise UserError(
            f"--resume {address}: the state cannot be downloaded ({_first_line(error)}). "
            "Check the name and --huggingface_token, or download the folder and give its path."
        ) from error
    state = Path(root) / path.strip("/")
    if not state.is_dir():
        raise UserError(f"--resume {address}: the repository {user}/{repo} holds no folder {path.strip('/')}.")
    return state


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0][:300]
