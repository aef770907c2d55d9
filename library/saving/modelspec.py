"""The `modelspec.` keys of a LoRA file: Stability AI's model metadata standard, version 1.0.1."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from library.common.errors import UserError
from library.data.settings import Size

if TYPE_CHECKING:
    from PIL.Image import Image

THUMBNAIL_SIDE = 512  # pixels
LARGEST_AS_IT_IS = 256 << 10  # bytes; larger pictures are made smaller, since every reader loads the whole header
MIME_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}


@dataclass(frozen=True)
class ModelSpec:
    """What the file is. extra: values of --metadata_author, _description, _tags … by their names; None is left out."""

    kind: str  # "medium", "5-medium" or "5-large"
    title: str
    resolution: Size
    timestep_range: tuple[int, int] | None = None
    extra: dict[str, str | None] = field(default_factory=dict)


def modelspec_metadata(spec: ModelSpec, date: datetime) -> dict[str, str]:
    """The keys with their prefix. SD3 predicts the velocity of a flow, which the standard's two words do not cover."""
    values: dict[str, str | None] = {
        "sai_model_spec": "1.0.1",
        "architecture": f"stable-diffusion-3-{spec.kind}/lora",
        "implementation": "diffusers",  # sd-scripts' word for LoRA of every kind
        "title": spec.title,
        "resolution": f"{spec.resolution[0]}x{spec.resolution[1]}",
        "date": date.replace(microsecond=0).isoformat(),
        "prediction_type": "flow",
        "timestep_range": None if spec.timestep_range is None else f"{spec.timestep_range[0]},{spec.timestep_range[1]}",
        **spec.extra,
    }
    return {f"modelspec.{key}": value for key, value in values.items() if value is not None}


def thumbnail_url(thumbnail: str) -> str:
    """--metadata_thumbnail as a data URL: a data URL as it is, or a picture's file, made smaller where it is large."""
    if thumbnail.startswith("data:"):
        return thumbnail
    from PIL import Image as images

    try:
        data = Path(thumbnail).read_bytes()
        with images.open(BytesIO(data)) as image:
            mime = MIME_TYPES.get(image.format or "")
            if mime is None or len(data) > LARGEST_AS_IT_IS:
                data, mime = _smaller(image), "image/jpeg"
    except (OSError, images.DecompressionBombError) as error:
        raise UserError(f"--metadata_thumbnail {thumbnail}: the picture cannot be read ({error}).") from error
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _smaller(image: Image) -> bytes:
    """A JPEG of at most THUMBNAIL_SIDE a side."""
    out = BytesIO()
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    small.save(out, format="JPEG", quality=88)
    return out.getvalue()
