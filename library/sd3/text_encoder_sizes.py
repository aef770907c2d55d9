"""The sizes of CLIP and T5 text encoders, read from tensor shapes, and the exact tensors that such an encoder must have.

Kept apart from the models themselves so that a file can be checked by its header alone, without loading transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from library.common.tensor_io import Part
from library.sd3.checkpoint_checks import core_problems, count_layers, shapes_of, shard_hint

CLIP_TOKENS = 77
HEAD_SIZE = 64  # of every attention head in CLIP-L, CLIP-G and T5-XXL
Shapes = Mapping[str, Sequence[int]]

# What files hold beside the encoder and is of no use here: the other half of a whole CLIP or T5, buffers, ComfyUI's extras.
_HARMLESS = re.compile(
    r"text_model\.embeddings\.position_ids|logit_scale|vision_model\..*|visual_projection\..*"  # CLIP
    r"|decoder\..*|lm_head\..*|spiece_model|encoder\.embed_tokens\.weight|shared\.weight"  # T5
)


@dataclass(frozen=True)
class ClipSizes:
    """CLIP's text model (Radford et al. 2021, section 2.4)."""

    vocabulary: int
    positions: int
    width: int
    mlp_width: int
    layers: int
    projection: int  # channels of the pooled output
    has_projection: bool  # else the pooled output is not projected, as by an identity matrix

    @property
    def heads(self) -> int:
        return self.width // HEAD_SIZE

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> ClipSizes:
        """shapes by key, `text_projection` bare or as a layer. KeyError where a tensor that tells a size is absent."""
        vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
        if "text_projection.weight" in shapes:
            projection = shapes["text_projection.weight"][0]
        else:
            projection = shapes.get("text_projection", (width, width))[-1]
        return cls(
            vocabulary=vocabulary,
            positions=shapes["text_model.embeddings.position_embedding.weight"][0],
            width=width,
            mlp_width=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
            layers=count_layers(r"text_model\.encoder\.layers\.(\d+)\.", shapes),
            projection=projection,
            has_projection="text_projection.weight" in shapes or "text_projection" in shapes,
        )

    @cached_property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape of every tensor of transformers' CLIPTextModelWithProjection."""
        width, mlp_width = self.width, self.mlp_width
        shapes: dict[str, tuple[int, ...]] = {
            "text_model.embeddings.token_embedding.weight": (self.vocabulary, width),
            "text_model.embeddings.position_embedding.weight": (self.positions, width),
            "text_projection.weight": (self.projection, width),
        }
        norms = ["text_model.final_layer_norm"]
        for i in range(self.layers):
            layer = f"text_model.encoder.layers.{i}"
            norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
            for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
                shapes |= _linear(f"{layer}.self_attn.{name}", width, width)
            shapes |= _linear(f"{layer}.mlp.fc1", width, mlp_width) | _linear(f"{layer}.mlp.fc2", mlp_width, width)
        for norm in norms:
            shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
        return shapes


@dataclass(frozen=True)
class T5Sizes:
    """The encoder of T5 v1.1 (Raffel et al. 2020; gated GELU of Shazeer 2020)."""

    vocabulary: int
    width: int
    mlp_width: int
    heads: int
    layers: int
    buckets: int  # of relative positions

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> T5Sizes:
        """shapes by key. KeyError where a tensor that tells a size is absent."""
        embedding = shapes.get("shared.weight") or shapes["encoder.embed_tokens.weight"]
        buckets, heads = shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        return cls(
            vocabulary=embedding[0],
            width=shapes["encoder.block.0.layer.0.SelfAttention.q.weight"][1],
            mlp_width=shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
            heads=heads,
            layers=count_layers(r"encoder\.block\.(\d+)\.", shapes),
            buckets=buckets,
        )

    @cached_property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape of every tensor of transformers' T5EncoderModel but the second name of the embedding."""
        width, inner = self.width, self.heads * HEAD_SIZE
        shapes: dict[str, tuple[int, ...]] = {
            "shared.weight": (self.vocabulary, width),
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (self.buckets, self.heads),
            "encoder.final_layer_norm.weight": (width,),
        }
        for i in range(self.layers):
            attention, mlp = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
            shapes |= {f"{attention}.SelfAttention.{name}.weight": (inner, width) for name in "qkv"}
            shapes |= {f"{mlp}.DenseReluDense.{name}.weight": (self.mlp_width, width) for name in ("wi_0", "wi_1")}
            shapes[f"{attention}.SelfAttention.o.weight"] = (width, inner)
            shapes[f"{mlp}.DenseReluDense.wo.weight"] = (width, self.mlp_width)
            shapes |= {f"{attention}.layer_norm.weight": (width,), f"{mlp}.layer_norm.weight": (width,)}
        return shapes


def sizes_of(part: Part) -> ClipSizes | T5Sizes:
    """The sizes of the encoder in a part that `check_text_encoder` finds nothing wrong with."""
    shapes = shapes_of(part.tensors)
    return T5Sizes.from_shapes(shapes) if part.name == "t5xxl" else ClipSizes.from_shapes(shapes)


def source_keys(part: Part) -> dict[str, str]:
    """Model key -> the part's key, for every tensor that the encoder needs and the part has under one name or another."""
    needed = sizes_of(part).tensors
    sources = {key: key for key in needed if key in part.tensors}
    for key, other in (("text_projection.weight", "text_projection"), ("shared.weight", "encoder.embed_tokens.weight")):
        if key in needed and key not in sources and other in part.tensors:
            sources[key] = other
    return sources


def check_text_encoder(part: Part) -> list[str]:
    """All that keeps a part from being a whole CLIP or T5 encoder, a sentence each; empty when it is one. Reads no tensor data."""
    problems = core_problems(part)
    if part.name == "t5xxl" and not part.tensors.keys() & {"shared.weight", "encoder.embed_tokens.weight"}:
        problems.append(f"{part.path}: the T5 has no token embedding (shared.weight){shard_hint(part.path)}.")
    if problems:
        return problems
    sizes, sources = sizes_of(part), source_keys(part)
    if isinstance(sizes, ClipSizes) and sizes.width % HEAD_SIZE:
        problems.append(f"{part.path}: {part.name} is {sizes.width} wide, which is no multiple of {HEAD_SIZE}.")
    if isinstance(sizes, ClipSizes) and sizes.positions < CLIP_TOKENS:
        problems.append(f"{part.path}: {part.name} has {sizes.positions} positions, {CLIP_TOKENS} are needed.")
    missing = sizes.tensors.keys() - sources.keys()
    if isinstance(sizes, ClipSizes) and part.name == "clip_l" and not sizes.has_projection:
        missing -= {"text_projection.weight"}  # a CLIP-L file without one means the identity
    unknown = [key for key in part.tensors if key not in sources.values() and not _HARMLESS.fullmatch(key)]
    wrong = []
    for key, source in sources.items():
        shape = part.tensors[source].shape
        if (shape[::-1] if source == "text_projection" else shape) != sizes.tensors[key]:
            wrong.append(f"{source} is {list(shape)}, not {list(sizes.tensors[key])}")
    for what, names in (("missing", missing), ("not known", unknown), ("of the wrong shape", wrong)):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            listed = ", ".join(sorted(names)[:8])
            problems.append(f"{part.path}: tensors of {part.name} {what}: {listed}{more}{shard_hint(part.path)}.")
    return problems


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
