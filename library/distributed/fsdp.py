"""Shards the frozen denoiser's weights over processes: each holds a part of every block and gathers a whole block when it runs,
in forward and again in backward.

It is PyTorch's FSDP2 (`fully_shard`), one group for each block and one for what is around them. The trained network is not
part of it: its layers act by hooks, and their gradients are averaged by library/distributed/gradients.py. All processes of a
sharded model must therefore run the same forward and backward passes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from library.common.transformer import BlockRunner, TransformerBlock, TransformerModel


@dataclass(frozen=True)
class ShardSettings:
    offload: bool = False  # a process keeps its own part in host memory
    reshard_after_forward: bool = True  # False: blocks stay whole until the backward pass, for fewer gathers


def mesh_shape(world_size: int, local_sizes: Sequence[int]) -> tuple[int, int]:
    """(copies of the base, processes that shard one copy), their product `world_size`.

    local_sizes: the number of processes on each process's machine. Frozen weights are never synchronized, so each machine shards a
    copy of its own, and the network between machines carries the LoRA's gradients alone. Machines with one process, or with
    different numbers of them, shard one copy among all.
    """
    local = local_sizes[0]
    if local > 1 and all(size == local for size in local_sizes):
        return world_size // local, local
    return 1, world_size


class ShardedModel:
    """A denoiser whose weights are sharded. Make it when the network's layers are known, on every process."""

    def __init__(
        self,
        model: TransformerModel,
        settings: ShardSettings,
        device: torch.device,
        local_sizes: Sequence[int],
        first_trained: int = 0,
    ):
        """model: frozen, in host memory; it goes to the device a block at a time. local_sizes: see `mesh_shape`.
        first_trained: the first block that gets gradients. torch.distributed must be
        running on all processes.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        # Blocks return views, on which nobody works in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        shape = mesh_shape(dist.get_world_size(), local_sizes)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("copy", "shard"))["shard"]
        policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if settings.offload else OffloadPolicy()
        self.whole_bytes = weight_bytes(model)
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh, reshard_after_forward=settings.reshard_after_forward, offload_policy=policy)
        model.run_block = force_backward(model.run_block, first_trained)
        self.model, self.device, self.group = model, device, mesh.get_group()
        self.processes = shape[1]
        self.local_bytes = weight_bytes(model)

    def summary(self) -> str:
        return (
            f"The denoiser is shared out over {self.processes} processes: "
            f"{self.local_bytes / 2**20:.1f} MiB of {self.whole_bytes / 2**20:.1f} MiB on each."
        )

    @contextmanager
    def join_uneven_inputs(self) -> Iterator[None]:
        """Let each process run any number of forwards without gradients inside the block: at its end, processes that have finished
        take part in the others' gathers, with the smallest input there is."""

        def announce(*_: object) -> None:
            self._any_rank(True)

        hook = self.model.register_forward_pre_hook(announce, prepend=True)
        try:
            yield
        finally:
            hook.remove()
        with torch.no_grad():
            while self._any_rank(False):
                self.model(*self.model.smallest_input(self.device))

    def _any_rank(self, working: bool) -> bool:
        """Whether any process of the group is about to run a forward."""
        flag = torch.tensor(float(working), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
        return bool(flag)


def force_backward(run: BlockRunner, first: int) -> BlockRunner:
    """`run`, with gradients through every block from number `first` on, whatever a process's own layers need.

    Module dropout may leave a block without a trained layer on one process alone; the others would wait for it in backward.
    """

    def anchored_run(index: int, block: TransformerBlock, *inputs: Tensor) -> tuple[Tensor, ...]:
        if index == first and torch.is_grad_enabled() and not any(each.requires_grad for each in inputs):
            inputs = (inputs[0].detach().requires_grad_(), *inputs[1:])
        return run(index, block, *inputs)

    return anchored_run


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that this process holds."""
    from torch.distributed.tensor import DTensor

    held = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)
