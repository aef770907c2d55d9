"""The sizes of an MMDiT, read off a checkpoint's tensor shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from library.sd3.checkpoint_checks import count_layers

HEAD_SIZE = 64
PATCH_SIZE = 2


@dataclass(frozen=True)
class MMDiTConfig:
    """Every size of the model; `from_shapes` reads them off a checkpoint."""

    depth: int
    hidden_size: int
    patch_size: int
    in_channels: int
    out_channels: int
    context_size: int  # channels of a text token, 4096 in released models
    pooled_size: int  # channels of the pooled text vector, 2048 in released models
    mlp_hidden_size: int
    pos_embed_max_size: int  # the position table is this many patches wide and high
    qk_norm: bool
    dual_attention_blocks: tuple[int, ...]

    @property
    def num_heads(self) -> int:
        return self.hidden_size // HEAD_SIZE

    @property
    def kind(self) -> str:
        """The model's name as training metadata spell it: "medium", "5-medium" or "5-large"."""
        if not self.qk_norm:
            return "medium"
        return "5-medium" if self.dual_attention_blocks else "5-large"

    @property
    def title(self) -> str:
        """The released model of this size, or the size."""
        released = {
            ("medium", 24, 1536): "Stable Diffusion 3 Medium",
            ("5-medium", 24, 1536): "Stable Diffusion 3.5 Medium",
            ("5-large", 38, 2432): "Stable Diffusion 3.5 Large",
        }
        size = f"MMDiT, {self.depth} blocks, hidden {self.hidden_size}"
        return released.get((self.kind, self.depth, self.hidden_size), size)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> MMDiTConfig:
        """Read the sizes from tensor shapes keyed by name (without `model.diffusion_model.`). KeyError where one is absent."""
        hidden_size, in_channels, patch_size, _ = shapes["x_embedder.proj.weight"]
        depth = count_layers(r"joint_blocks\.(\d+)\.", shapes)
        dual = [i for i in range(depth) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes]
        return cls(
            depth=depth,
            hidden_size=hidden_size,
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=shapes["final_layer.linear.weight"][0] // patch_size**2,
            context_size=shapes["context_embedder.weight"][1],
            pooled_size=shapes["y_embedder.mlp.0.weight"][1],
            mlp_hidden_size=shapes["joint_blocks.0.x_block.mlp.fc1.weight"][0],
            pos_embed_max_size=math.isqrt(shapes["pos_embed"][1]),
            qk_norm="joint_blocks.0.x_block.attn.ln_k.weight" in shapes,
            dual_attention_blocks=tuple(dual),
        )

    def problems(self, shapes: Mapping[str, Sequence[int]]) -> list[str]:
        """Why no model can be made of these sizes, read from `shapes`: a sentence each, for the file's user."""
        problems = []
        patches, outputs = shapes["pos_embed"][1], shapes["final_layer.linear.weight"][0]
        if self.hidden_size % HEAD_SIZE:
            problems.append(f"the model is {self.hidden_size} wide, which is no multiple of {HEAD_SIZE}.")
        if self.patch_size != PATCH_SIZE or outputs != PATCH_SIZE**2 * self.in_channels:
            problems.append(
                f"x_embedder.proj and final_layer.linear are not those of patches of {PATCH_SIZE} x {PATCH_SIZE}."
            )
        if self.pos_embed_max_size**2 != patches:
            problems.append(f"the position table pos_embed has {patches} places, which make no square.")
        absent = [i for i in range(self.depth) if f"joint_blocks.{i}.x_block.attn.qkv.weight" not in shapes]
        if absent:
            problems.append(f"it has keys of {self.depth} joint_blocks, but number {absent[0]} is missing.")
        return problems
