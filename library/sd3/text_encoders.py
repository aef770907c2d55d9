"""CLIP-L, CLIP-G and T5 as frozen transformers models, sized by their tensors and filled with one copy of them.

Models are made without memory for their weights. Non-persistent buffers (CLIP's position_ids) are made for real: on the meta
device they would stay there after a load that reports success.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.common.errors import UserError
from library.common.tensor_io import Part, load_tensors
from library.sd3.text_encoder_sizes import ClipSizes, T5Sizes, check_text_encoder, sizes_of, source_keys

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

ACTIVATIONS = {"clip_l": "quick_gelu", "clip_g": "gelu"}
Quantize = Callable[[nn.Module], None]
Model = TypeVar("Model", bound=nn.Module)


def load_clip(
    part: Part, device: torch.device | str, dtype: torch.dtype, mmap: bool = True
) -> CLIPTextModelWithProjection:
    """CLIP-L or CLIP-G (by the part's name), frozen, in eval mode. UserError names every tensor that is amiss."""
    _raise_if_amiss(part)
    sizes = cast(ClipSizes, sizes_of(part))
    model = _empty_clip(sizes, ACTIVATIONS[part.name])
    weights = _load(part, sizes.tensors, device, dtype, mmap)
    if not sizes.has_projection:
        weights["text_projection.weight"] = torch.eye(sizes.width, device=device, dtype=dtype)
    model.load_state_dict(weights, strict=True, assign=True)
    return _frozen(nn.Module.to(model, device))  # the buffers: the weights are there already


def load_t5(
    part: Part, device: torch.device | str, dtype: torch.dtype, mmap: bool = True, quantize: Quantize | None = None
) -> T5EncoderModel:
    """The T5 encoder, frozen, in eval mode. UserError names every tensor that is amiss.

    In float16 the last layer of each MLP (`wo`) stays in float32, since its output passes 65504 in T5-XXL.
    quantize replaces the linear layers of the block that it is given; each block is quantized as soon as it is loaded, so
    that the peak is the quantized model and one block in `dtype`.
    """
    _raise_if_amiss(part)
    sizes = cast(T5Sizes, sizes_of(part))
    model = _empty_t5(sizes)
    for index, block in enumerate(cast(Any, model.encoder.block)):
        prefix = f"encoder.block.{index}."
        weights = _load(part, [key for key in sizes.tensors if key.startswith(prefix)], device, dtype, mmap)
        block.load_state_dict({key[len(prefix) :]: value for key, value in weights.items()}, strict=True, assign=True)
        block.requires_grad_(False)
        if quantize is not None:
            _quantize_t5_block(block, quantize)
    rest = _load(part, ["shared.weight", "encoder.final_layer_norm.weight"], device, dtype, mmap)
    model.shared.load_state_dict({"weight": rest["shared.weight"]}, strict=True, assign=True)
    model.encoder.final_layer_norm.load_state_dict(
        {"weight": rest["encoder.final_layer_norm.weight"]}, strict=True, assign=True
    )
    model.set_input_embeddings(model.shared)  # the encoder's embedding is the same module: one copy
    return _frozen(model)


def empty_encoder(part: Part) -> nn.Module:
    """The text encoder of a part on the meta device: its shapes, for estimates."""
    sizes = sizes_of(part)
    model: nn.Module = _empty_clip(sizes, ACTIVATIONS[part.name]) if isinstance(sizes, ClipSizes) else _empty_t5(sizes)
    return model.requires_grad_(False).eval().to("meta")


def meta_text_encoder(part: Part) -> nn.Module:
    """Every matrix of the encoder as an nn.Linear on the meta device, under the path that it has in transformers' model.

    Quick to make: neither weights nor transformers are loaded.
    """
    root, shapes = nn.Module(), sizes_of(part).tensors
    for key, shape in shapes.items():
        path, _, kind = key.rpartition(".")
        if kind != "weight" or len(shape) != 2:
            continue
        *above, name = path.split(".")
        parent = root
        for step in above:
            if step not in dict(parent.named_children()):
                parent.add_module(step, nn.Module())
            parent = parent.get_submodule(step)
        rows, columns = shape
        parent.add_module(name, nn.Linear(columns, rows, bias=f"{path}.bias" in shapes, device=torch.device("meta")))
    return root


def quantize_t5(model: nn.Module, quantize: Quantize) -> None:
    """What load_t5 does with `quantize`, for a T5 that was loaded wide."""
    for block in cast(Any, model).encoder.block:
        _quantize_t5_block(block, quantize)


def checkpoint_layers(model: nn.Module) -> None:
    """Keep only the inputs of each layer for the backward pass and compute the rest again (Chen et al. 2016).

    transformers' own switch works in training mode alone; this one leaves the frozen encoder in eval mode.
    """
    inner = cast(Any, model)
    layers = inner.encoder.block if hasattr(model, "encoder") else inner.text_model.encoder.layers
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def _quantize_t5_block(block: Any, quantize: Quantize) -> None:
    quantize(block)
    mlp = block.layer[1].DenseReluDense
    mlp.forward = MethodType(_gated_mlp, mlp)


def _raise_if_amiss(part: Part) -> None:
    problems = check_text_encoder(part)
    if problems:
        raise UserError(problems)


def _empty_clip(sizes: ClipSizes, activation: str) -> CLIPTextModelWithProjection:
    from accelerate import init_empty_weights
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp_width,
        projection_dim=sizes.projection,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=sizes.positions,
        hidden_act=activation,
        bos_token_id=0,  # not used by the encoder
        eos_token_id=2,  # means: pool at the highest id, which is the real end token's
    )
    with init_empty_weights(include_buffers=False):
        return CLIPTextModelWithProjection(config)


def _empty_t5(sizes: T5Sizes) -> T5EncoderModel:
    from accelerate import init_empty_weights
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=sizes.vocabulary,
        d_model=sizes.width,
        d_kv=64,
        d_ff=sizes.mlp_width,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        relative_attention_num_buckets=sizes.buckets,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6,
        dropout_rate=0.0,  # a frozen encoder never drops anything, whatever mode someone puts it in
    )
    with init_empty_weights(include_buffers=False):
        return T5EncoderModel(config)


def _load(
    part: Part, keys: Iterable[str], device: torch.device | str, dtype: torch.dtype, mmap: bool
) -> dict[str, Tensor]:
    """The tensors that the model calls `keys`, where the part has them."""
    expected = set(keys)
    sources = {key: source for key, source in source_keys(part).items() if key in expected}
    wide = {key for key in sources if dtype == torch.float16 and key.endswith("DenseReluDense.wo.weight")}
    loaded: dict[str, Tensor] = {}
    for group, group_dtype in ((sources.keys() - wide, dtype), (wide, torch.float32)):
        infos = {sources[key]: part.tensors[sources[key]] for key in group}
        if infos:
            tensors = load_tensors(replace(part, tensors=infos), device, group_dtype, mmap)
            loaded |= {key: tensors[sources[key]] for key in group}
    if sources.get("text_projection.weight") == "text_projection":
        loaded["text_projection.weight"] = loaded["text_projection.weight"].t().contiguous()
    return loaded


def _gated_mlp(mlp: Any, hidden: Tensor) -> Tensor:
    """T5's gated MLP without transformers' cast to the dtype of `wo`'s weight, which for a quantized weight is an integer's."""
    hidden = mlp.act(mlp.wi_0(hidden)) * mlp.wi_1(hidden)
    out: Tensor = mlp.wo(hidden.float() if hidden.dtype == torch.float16 else hidden)  # see load_t5
    return out


def _frozen(model: Model) -> Model:
    stranded = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if stranded:
        raise RuntimeError(f"tensors without content after loading: {stranded}")
    return model.requires_grad_(False).eval()
