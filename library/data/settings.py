"""What a dataset and its subsets are told to do: resolved values, frozen.

`library.data.config` makes these from the dataset file and the command line. Below it nothing asks where a value came from.
A field is None where the absence of a value has a meaning of its own, and only there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Size = tuple[int, int]
"""Width, height in pixels."""

Interpolation = Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"]


@dataclass(frozen=True)
class CaptionSettings:
    """How a raw caption becomes the text that is fed (see `library.data.captions.CaptionPipeline`)."""

    caption_separator: str = ","
    keep_tokens: int = 0
    keep_tokens_separator: str = ""  # "" = no marker
    secondary_separator: str = ""  # "" = none
    shuffle_caption: bool = False
    enable_wildcard: bool = False
    caption_prefix: str = ""
    caption_suffix: str = ""
    caption_dropout_rate: float = 0.0  # probability, 0..1
    caption_dropout_every_n_epochs: int = 0  # 0 = never
    caption_tag_dropout_rate: float = 0.0  # probability of each flexible piece, 0..1
    token_warmup_min: int = 1  # flexible pieces at step 0
    token_warmup_step: float = 0.0  # steps; below 1 a fraction of the run's steps; 0 = off


@dataclass(frozen=True)
class SubsetSettings:
    """One source of images: a folder, a metadata file, or a folder of images with a folder of masks."""

    name: str
    """How messages call it: its table in the file and its folder."""
    image_dir: Path | None = None  # None: metadata style with absolute paths
    metadata_file: Path | None = None
    conditioning_data_dir: Path | None = None  # masks, one for each image, of the same stem
    caption_extension: str = ".caption"  # begins with a dot
    class_tokens: str | None = None  # the caption of an image without a caption file
    cache_info: bool = False  # keep an index cache beside the images
    is_reg: bool = False
    loss_weight: float = 1.0  # prior_loss_weight where is_reg, else 1
    num_repeats: int = 1  # >= 1
    captions: CaptionSettings = field(default_factory=CaptionSettings)
    color_aug: bool = False
    flip_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None
    alpha_mask: bool = False
    resize_interpolation: Interpolation | None = None  # None: area to shrink, Lanczos to enlarge
    custom_attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def style(self) -> str:
        """ "metadata", "mask" or "folder"."""
        if self.metadata_file is not None:
            return "metadata"
        return "mask" if self.conditioning_data_dir is not None else "folder"


@dataclass(frozen=True)
class DatasetSettings:
    """Subsets that share a resolution, a batch size and buckets. A batch never mixes datasets."""

    name: str
    subsets: tuple[SubsetSettings, ...]
    resolution: Size
    batch_size: int = 1
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False
    network_multiplier: float = 1.0
    validation_split: float = 0.0  # 0..1; 1 makes the whole dataset a validation dataset
    validation_seed: int | None = None  # None: the run's seed
