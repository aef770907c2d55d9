"""The facts of a run as they go into its LoRA files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.training.state import Position

if TYPE_CHECKING:
    from library.network_trainer import NetworkTrainer


def run_metadata(trainer: NetworkTrainer, position: Position, started_at: float) -> dict[str, str]:
    args, plan = trainer.args, trainer.plan
    return {
        "ss_network_module": str(args.network_module),
        "ss_network_dim": str(args.network_dim),
        "ss_network_alpha": str(args.network_alpha),
        "ss_steps": str(position.step),
        "ss_epoch": str(position.epoch),
        "ss_max_train_steps": str(plan.length.max_steps),
    }
