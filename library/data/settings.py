"""What a dataset and its subsets are told to do: resolved values, frozen; and the declaration of the dataset file's keys.

`library.data.config` makes these from the dataset file and the command line. Below it nothing asks where a value came from.
A field is None where the absence of a value has a meaning of its own, and only there. A field with a `Key` is a key of the
dataset file, declared here alone: its type, its default, where it may be written and the option that is its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field as Valid

from library.data.keys import (
    FaceRange,
    Key,
    NotNegative,
    Positive,
    Probability,
    Repeats,
    Resolution,
    Text,
    declared_keys,
)

Size = tuple[int, int]
"""Width, height in pixels."""

Interpolation = Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"]

ANYWHERE = Key()
IN_DATASETS = Key(levels=("general", "datasets"))


@dataclass(frozen=True)
class CaptionSettings:
    """How a raw caption becomes the text that is fed (see `library.data.captions.CaptionPipeline`)."""

    caption_separator: Annotated[Text, ANYWHERE] = ","
    keep_tokens: Annotated[NotNegative, ANYWHERE] = 0
    keep_tokens_separator: Annotated[str, ANYWHERE] = ""  # "" = no marker
    secondary_separator: Annotated[str, ANYWHERE] = ""  # "" = none
    shuffle_caption: Annotated[bool, ANYWHERE] = False
    enable_wildcard: Annotated[bool, ANYWHERE] = False
    caption_prefix: Annotated[str, ANYWHERE] = ""
    caption_suffix: Annotated[str, ANYWHERE] = ""
    caption_dropout_rate: Annotated[Probability, ANYWHERE] = 0.0
    caption_dropout_every_n_epochs: Annotated[NotNegative, ANYWHERE] = 0  # 0 = never
    caption_tag_dropout_rate: Annotated[Probability, ANYWHERE] = 0.0  # of each flexible piece
    token_warmup_min: Annotated[NotNegative, ANYWHERE] = 1  # flexible pieces at step 0
    token_warmup_step: Annotated[float, Valid(ge=0), ANYWHERE] = 0.0  # below 1 a fraction of the run's steps; 0 = off


@dataclass(frozen=True)
class SubsetSettings:
    """One source of images: a folder, a metadata file, or a folder of images with a folder of masks."""

    name: str
    """How messages call it: its table in the file and its folder."""
    image_dir: Annotated[
        Path | None, Key(levels=("subsets",), required=("folder", "mask"), option=None, written=Text)
    ] = None  # None: metadata style with absolute paths
    metadata_file: Annotated[
        Path | None, Key(("subsets",), ("metadata",), required=("metadata",), option=None, written=Text)
    ] = None
    conditioning_data_dir: Annotated[
        Path | None, Key(("subsets",), ("mask",), required=("mask",), option=None, written=Text)
    ] = None  # masks, one for each image, of the same stem
    caption_extension: Annotated[Text, Key(styles=("folder", "mask"))] = ".caption"  # begins with a dot
    class_tokens: Annotated[str | None, Key(styles=("folder", "mask"), option=None)] = (
        None  # the caption of an image without a caption file
    )
    cache_info: Annotated[bool, ANYWHERE] = False  # keep an index cache beside the images
    is_reg: Annotated[bool, Key(("subsets",), ("folder",), option=None)] = False
    loss_weight: float = 1.0  # prior_loss_weight where is_reg, else 1
    num_repeats: Annotated[Repeats, Key(option="dataset_repeats")] = 1  # a subset with less than 1 is left out
    captions: CaptionSettings = field(default_factory=CaptionSettings)
    color_aug: Annotated[bool, ANYWHERE] = False
    flip_aug: Annotated[bool, ANYWHERE] = False
    random_crop: Annotated[bool, ANYWHERE] = False
    face_crop_aug_range: Annotated[FaceRange | None, ANYWHERE] = None
    alpha_mask: Annotated[bool, Key(styles=("folder", "metadata"))] = False
    resize_interpolation: Annotated[Interpolation | None, ANYWHERE] = None  # None: area to shrink, Lanczos to enlarge
    custom_attributes: Annotated[Mapping[str, Any], Key(option=None, written=dict[str, Any])] = field(
        default_factory=dict
    )

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
    resolution: Annotated[Resolution, IN_DATASETS]
    batch_size: Annotated[Positive, Key(("general", "datasets"), option="train_batch_size")] = 1
    enable_bucket: Annotated[bool, IN_DATASETS] = False
    min_bucket_reso: Annotated[Positive, IN_DATASETS] = 256
    max_bucket_reso: Annotated[Positive, IN_DATASETS] = 1024
    bucket_reso_steps: Annotated[Positive, IN_DATASETS] = 64
    bucket_no_upscale: Annotated[bool, IN_DATASETS] = False
    network_multiplier: Annotated[float, Key(("general", "datasets"), option=None)] = 1.0
    validation_split: Annotated[float, IN_DATASETS] = 0.0  # 0..1; 1 makes the whole dataset a validation dataset
    validation_seed: Annotated[int | None, IN_DATASETS] = None  # None: the run's seed


KEYS = declared_keys((CaptionSettings, SubsetSettings, DatasetSettings))
"""Every key of the dataset file, by name."""
