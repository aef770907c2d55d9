"""The memory plan as people read it: what the run takes, what was chosen, and what else was possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from library.memory.block_swap import swap_limit
from library.memory.estimator.planner import MemoryOptions, StepMemoryEstimator

GIB = 2**30


def size_text(size: int) -> str:
    """Bytes in GiB, small ones in MiB."""
    return f"{size / GIB:.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.2f} MiB"


@dataclass(frozen=True)
class Phase:
    """A moment of the run and its peak in bytes on the device."""

    title: str
    bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    options: MemoryOptions
    t5_on_cpu: bool
    fits: bool
    estimator: StepMemoryEstimator
    phases: Sequence[Phase]  # beside the training step
    budget: int  # bytes
    budget_source: str
    batch: str

    @property
    def depth(self) -> int:
        return self.estimator.depth

    @property
    def peak(self) -> int:
        return max(self.estimator.step_bytes(self.options).total, *(phase.bytes for phase in self.phases))

    def flags(self) -> list[str]:
        """As on the command line."""
        return self.options.flags(self.depth) + ["--t5xxl_device cpu"] * self.t5_on_cpu

    def text(self) -> str:
        """Tables of the peaks, of the training step's parts and of the choices."""
        step = self.estimator.step_bytes(self.options)
        rows = [*self.phases, Phase("training step", step.total)]
        parts = [
            Phase("  base weights", step.base),
            Phase("  LoRA, optimizer, averages", step.trained),
            Phase("  text encoders, VAE", step.encoders),
            Phase("  activations and gradients", step.activations),
        ]
        chosen = " ".join(self.flags()) or "no memory option is needed"
        host = self.estimator.host_bytes(self.options)
        return "\n".join(
            [
                f"Memory plan for {self.batch}: {size_text(self.budget)} can be used ({self.budget_source}).",
                *(_row(row.title, row.bytes) for row in rows if row.bytes),
                *(_row(part.title, part.bytes) for part in parts if part.bytes),
                _row("pinned host memory", host),
                f"{'Chosen' if self.fits else 'The least'}: {chosen}",
                *self._others(),
            ]
        )

    def _others(self) -> list[str]:
        """Why: each simpler choice with its peak and its time beside the chosen one's."""
        seconds = self.estimator.seconds(self.options)
        lines = []
        for options in self._simpler():
            total = self.estimator.step_bytes(options).total
            fits = "fits" if total <= self.budget else "does not fit"
            time = self.estimator.seconds(options) / seconds
            name = " ".join(options.flags(self.depth)) or "no memory option"
            lines.append(f"  {size_text(total):>11}  {time:5.2f} x the time  {fits:12}  {name}")
        return ["The training step with other choices (times by a rough model):", *lines] if lines else []

    def _simpler(self) -> list[MemoryOptions]:
        depth, limit = self.depth, swap_limit(self.depth)
        exact = MemoryOptions(quantization=self.options.quantization)
        every = [
            exact,
            replace(exact, recompute_pointwise=True),
            replace(exact, policy="selective", checkpointed=depth),
            replace(exact, policy="full", checkpointed=depth),
            replace(exact, policy="full", checkpointed=depth, offload=True),
            replace(exact, swap=limit // 2),
            replace(exact, policy="full", checkpointed=depth, swap=limit // 2),
            replace(exact, policy="full", checkpointed=depth, swap=limit),
        ]
        return [options for options in dict.fromkeys(every) if options != self.options]


def _row(title: str, size: int) -> str:
    return f"  {title:40} {size_text(size):>11}"
