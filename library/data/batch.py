"""A batch as one process trains on it, and where cached latents and text encoder outputs come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from library.common.errors import ReadError, UserError
from library.data.settings import Size


class CacheReadError(ReadError):
    """A cache entry that is missing or damaged: of the cache `kind` ("latents" or "text"), of which record of which dataset."""

    def __init__(self, problems: str | Sequence[str], kind: str = "", dataset: int = 0, number: int = 0):
        super().__init__(problems)
        self.kind, self.dataset, self.number = kind, dataset, number


class LatentSource(Protocol):
    """Latents made before training, by the number of the dataset and of the record in it."""

    @property
    def on_disk(self) -> bool: ...

    def is_damaged(self, dataset: int, number: int) -> bool: ...

    def get(self, dataset: int, number: int, flipped: bool) -> tuple[Tensor, Tensor | None]: ...

    def remake(self, dataset: int, number: int) -> None:
        """Make an entry again that `get` could not read, in the main process. UserError where that fails."""


class TextSource(Protocol):
    """Text encoder outputs made before training, by the number of the dataset and of the record in it."""

    @property
    def on_disk(self) -> bool: ...

    def get(self, dataset: int, number: int, variant: int, dropped: bool) -> tuple[str, dict[str, Tensor]]: ...

    def remake(self, dataset: int, number: int) -> None:
        """Make an entry again that `get` could not read, in the main process. UserError where that fails."""


@dataclass
class Batch:
    """What one process trains on at once. images or latents is None; so is text where captions are encoded live."""

    images: Tensor | None  # [B, 3, H, W] float32 in -1..1
    latents: Tensor | None  # [B, 16, h, w] float32, raw
    captions: list[str]
    text: dict[str, Tensor] | None  # each [B, ...]
    mask: Tensor | None  # [B, 1, h, w] float32 in 0..1
    loss_weights: Tensor  # [B]; 0 in a padding batch, and for an image that is left out
    preserve: Tensor | None  # [B] bool: differential output preservation
    network_multiplier: float
    paths: list[str]
    size: Size  # (W, H) in pixels

    def pin_memory(self) -> Batch:
        """Called by the DataLoader where pinning is on."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def without_weight(self) -> Batch:
        """The same batch with no share in the loss: it stands in for one that cannot be read."""
        return replace(self, loss_weights=torch.zeros_like(self.loss_weights))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with `change` applied to each of its tensors."""

        def changed(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        return replace(
            self,
            images=changed(self.images),
            latents=changed(self.latents),
            text=None if self.text is None else {name: change(tensor) for name, tensor in self.text.items()},
            mask=changed(self.mask),
            loss_weights=change(self.loss_weights),
            preserve=changed(self.preserve),
        )


def stack_texts(texts: Sequence[dict[str, Tensor] | None]) -> dict[str, Tensor] | None:
    """One row a sample -> the batch's outputs by name; None where captions are encoded in the step."""
    rows = [text for text in texts if text is not None]
    try:
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} if rows else None
    except (KeyError, RuntimeError):
        shapes = sorted({str({name: list(tensor.shape) for name, tensor in row.items()}) for row in rows})
        raise UserError(
            f"Cached text encoder outputs of one batch differ in shape: {'; '.join(shapes)}. Delete the cache files;"
            " they will be made again."
        ) from None


def stack_masks(masks: Sequence[Tensor | None]) -> Tensor | None:
    """[B, 1, h, w]; an image without a mask counts fully. None where no image has one."""
    known = next((mask for mask in masks if mask is not None), None)
    if known is None:
        return None
    return torch.stack([torch.ones_like(known) if mask is None else mask for mask in masks])
