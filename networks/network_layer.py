"""What every network layer is, of whatever kind: a trained change of one frozen layer, added by a forward hook."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from networks.frozen_layers import FrozenLayer


class NetworkLayer(nn.Module, ABC):
    """Holds the frozen layer without owning it: its weights are no part of this module's state or parameters."""

    def __init__(self, layer: FrozenLayer):
        super().__init__()
        self._layer = (layer,)  # in a tuple, so that the frozen layer is no submodule of this one
        self._handles: list[RemovableHandle] = []
        self.multiplier = 1.0
        self.enabled = True

    @property
    def layer(self) -> FrozenLayer:
        return self._layer[0]

    def attach(self) -> None:
        """Hook onto the frozen layer, once."""
        if not self._handles:
            self._handles.append(self.layer.register_forward_hook(self._after_layer))

    def detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    @abstractmethod
    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """The frozen layer's input and output, [B, ..., in] and [B, ..., out] or images -> the changed output."""

    @abstractmethod
    def file_tensors(self, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """This layer's tensors in a LoRA file, by suffix, as trained.

        values: parameters by name to take in place of this layer's own (an EMA's, say).
        """

    @abstractmethod
    def misfit(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Why a file's tensors, of the right names and shapes, can't be this layer's, or None."""

    @abstractmethod
    def load_file_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over tensors in the form and shapes of `file_tensors`. A missing alpha means strength 1."""

    @abstractmethod
    def cap_norm(self, max_norm: float) -> tuple[Tensor, Tensor]:
        """Shrink the change D so that its Frobenius norm n is at most max_norm: D * min(n, max_norm) / n.

        Returns 0-dim tensors on the device, unread: the norm afterwards, and whether it was shrunk. UserError where the kind
        of layer can't.
        """

    def summary(self) -> tuple[str, str]:
        """Rank and alpha as the table of layers shows them."""
        return "", ""

    def _after_layer(self, layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        return self(args[0], out) if self.enabled else None
