"""A text encoder as far as its layers are concerned: quick to make, since neither weights nor transformers are loaded."""

from __future__ import annotations

import torch
from torch import nn

from library.sd3.parts import Part
from library.sd3.text_encoder_sizes import sizes_of


def encoder_outline(part: Part) -> nn.Module:
    """Every matrix of the encoder as an nn.Linear on the meta device, under the path that it has in transformers' model."""
    root, shapes = nn.Module(), sizes_of(part).tensors
    for key, shape in shapes.items():
        path, _, kind = key.rpartition(".")
        if kind != "weight" or len(shape) != 2:
            continue
        *above, name = path.split(".")
        place = root
        for step in above:
            if step not in dict(place.named_children()):
                place.add_module(step, nn.Module())
            place = place.get_submodule(step)
        rows, columns = shape
        place.add_module(name, nn.Linear(columns, rows, bias=f"{path}.bias" in shapes, device=torch.device("meta")))
    return root
