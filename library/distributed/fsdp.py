"""Shares the frozen denoiser's weights out over processes: each holds a part of every block and gathers the whole of one
when its turn comes, in forward and again in backward.

It is PyTorch's FSDP2 (`fully_shard`), one group for each joint block and one for what is around them. The trained network
is not part of it: its layers act by hooks, and their gradients are averaged by library/distributed/gradients.py. Every forward
and backward pass of a sharded model is therefore the work of all its processes together.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from library.common.transformer import BlockRunner, TransformerBlock
from library.sd3.mmdit import MMDiT


@dataclass(frozen=True)
class ShardSettings:
    offload: bool = False  # a process's own part waits in host memory
    reshard_after_forward: bool = True  # False: blocks stay whole until the backward pass, for fewer gathers


def mesh_shape(world_size: int, local_sizes: Sequence[int]) -> tuple[int, int]:
    """(copies of the base, processes that share one copy), their product `world_size`.

    local_sizes: the processes on each process's machine. Frozen weights need no agreement between copies, so each machine
    shares out a copy of its own and the network between machines carries the LoRA's gradients alone. Machines with one
    process, or with different numbers of them, share one copy among all.
    """
    local = local_sizes[0]
    if local > 1 and all(size == local for size in local_sizes):
        return world_size // local, local
    return 1, world_size


class ShardedModel:
    """A denoiser whose weights are shared out. Make it when the network's layers are known, on every process."""

    def __init__(
        self,
        model: MMDiT,
        settings: ShardSettings,
        device: torch.device,
        local_sizes: Sequence[int],
        first_trained: int = 0,
    ):
        """model: frozen, in host memory; it goes to the device a block at a time. first_trained: the first block that gets
        gradients. torch.distributed must be running on all processes."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        # Blocks return views, on which nobody works in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        shape = mesh_shape(dist.get_world_size(), local_sizes)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("copy", "shard"))["shard"]
        in_host_memory = CPUOffloadPolicy(pin_memory=device.type == "cuda")
        options: dict[str, Any] = {
            "mesh": mesh,
            "reshard_after_forward": settings.reshard_after_forward,
            "offload_policy": in_host_memory if settings.offload else OffloadPolicy(),
        }
        self.whole_bytes = weight_bytes(model)
        for block in model.joint_blocks:
            fully_shard(block, **options)
        fully_shard(model, **options)
        model.run_block = with_equal_backward(model.run_block, first_trained)
        self.model, self.device, self.group = model, device, mesh.get_group()
        self.processes = shape[1]
        self.local_bytes = weight_bytes(model)

    def summary(self) -> str:
        return (
            f"The denoiser is shared out over {self.processes} processes: "
            f"{self.local_bytes / 2**20:.1f} MiB of {self.whole_bytes / 2**20:.1f} MiB on each."
        )

    @contextmanager
    def uneven_forwards(self) -> Iterator[None]:
        """Inside it each process may run as many forwards without gradients as it likes: at its end those that have
        finished take part in the others' gathers, with the smallest input there is."""

        def announce(*_: Any) -> None:
            self._anyone(True)

        hook = self.model.register_forward_pre_hook(announce, prepend=True)
        try:
            yield
        finally:
            hook.remove()
        with torch.no_grad():
            while self._anyone(False):
                self.model(*smallest_input(self.model, self.device))

    def _anyone(self, working: bool) -> bool:
        """Whether any process of the group is about to run a forward."""
        said = torch.tensor(float(working), device=self.device)
        dist.all_reduce(said, op=dist.ReduceOp.MAX, group=self.group)
        return bool(said)


def with_equal_backward(run: BlockRunner, first: int) -> BlockRunner:
    """`run`, with gradients through every block from number `first` on, whatever a process's own layers need.

    Module dropout may leave a block without a trained layer on one process alone; the others would wait for it in backward.
    """

    def anchored_run(index: int, block: TransformerBlock, *inputs: Tensor) -> tuple[Tensor, ...]:
        if index == first and torch.is_grad_enabled() and not inputs[1].requires_grad:
            inputs = (inputs[0], inputs[1].detach().requires_grad_(), *inputs[2:])
        return run(index, block, *inputs)

    return anchored_run


def smallest_input(model: MMDiT, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One image of one patch and one token of text, of zeros, as `MMDiT.forward` takes them."""
    config = model.config
    return (
        torch.zeros(1, config.in_channels, config.patch_size, config.patch_size, device=device),
        torch.zeros(1, device=device),
        torch.zeros(1, 1, config.context_size, device=device, dtype=model.dtype),
        torch.zeros(1, config.pooled_size, device=device, dtype=model.dtype),
    )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that this process holds."""
    from torch.distributed.tensor import DTensor

    held = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)
