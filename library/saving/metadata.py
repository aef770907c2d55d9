"""The `ss_` keys of a LoRA file: how it was trained, in sd-scripts' names. Every value is a text, None is "None"."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from library.common.tensor_io import Part
from library.saving.dataset_facts import with_commonest_tags
from library.saving.model_hash import FileHashes, legacy_file_hash, lora_hashes
from library.saving.modelspec import ModelSpec, modelspec_metadata

logger = logging.getLogger(__name__)
LARGEST_TEXT = 16 << 20  # characters; safetensors writes no header of more than 100 MB, and every reader loads it all
MOST_TAGS = 16384  # of a folder, where all of them are too many
KEPT_WITHOUT_METADATA = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)
NOT_FOR_SD3: Mapping[str, object] = MappingProxyType(
    {
        "ss_v2": False,
        "ss_clip_skip": None,
        "ss_max_token_length": None,
        "ss_noise_offset": None,
        "ss_noise_offset_random_strength": None,
        "ss_multires_noise_iterations": None,
        "ss_multires_noise_discount": None,
        "ss_adaptive_noise_scale": None,
        "ss_zero_terminal_snr": False,
        "ss_ip_noise_gamma": None,
        "ss_ip_noise_gamma_random_strength": None,
        "ss_min_snr_gamma": None,
        "ss_debiased_estimation": False,
    }
)
"""Keys that readers may look for, with the value that says "not done": none of these acts on SD3, whatever the options."""


@dataclass(frozen=True)
class FamilyFacts:
    """What a model family adds. options: facts of its own under ss_ names."""

    kind: str  # ss_base_model_version: "medium", "5-medium" or "5-large"
    title: str  # the model's name for people: "Stable Diffusion 3.5 Medium"
    base_file: Path
    vae_file: Path | None  # only where --vae names a file of its own
    options: dict[str, object] = field(default_factory=dict)
    parts: Sequence[Part] = ()  # the models and their files


@dataclass(frozen=True)
class RunFacts:
    """What is known when training starts. training: ss_ names to plain values, those of --no_metadata included."""

    training: dict[str, object]
    spec: ModelSpec
    family: FamilyFacts
    minimal: bool = False  # --no_metadata


@dataclass(frozen=True)
class SaveFacts:
    """What a save adds. epoch: the one that is being trained, or was just completed, from 1."""

    steps: int
    epoch: int
    finished_at: float  # seconds since 1970


class FileMetadata:
    """The metadata of every file of a run. What depends on the run alone is made into text once."""

    def __init__(self, facts: RunFacts):
        self.facts = facts
        files = [path for path in (facts.family.base_file, facts.family.vae_file) if path is not None]
        self.hashes = FileHashes([] if facts.minimal else files)
        self.of_run = {**_fitting(facts.training), **({} if facts.minimal else as_texts(_file_facts(facts.family)))}
        if facts.minimal:
            self.of_run = {key: value for key, value in self.of_run.items() if key in KEPT_WITHOUT_METADATA}

    def at(self, save: SaveFacts) -> dict[str, str]:
        """All but the hashes, which `with_hashes` adds when the file is written."""
        texts = dict(self.of_run)
        if not self.facts.minimal:
            texts |= as_texts(
                {"ss_steps": save.steps, "ss_epoch": save.epoch, "ss_training_finished_at": save.finished_at}
            )
        return texts | modelspec_metadata(self.facts.spec, datetime.fromtimestamp(save.finished_at))

    def with_hashes(self, metadata: Mapping[str, str], tensors: Mapping[str, Tensor], wait: bool) -> dict[str, str]:
        """Add the hashes of the base files, those that are ready or, with `wait`, all; and the LoRA's own."""
        known = self.hashes.all() if wait else self.hashes.ready()
        family = self.facts.family
        keys = {"ss_new_sd_model_hash": family.base_file, "ss_new_vae_hash": family.vae_file}
        hashed = dict(metadata) | {key: known[path] for key, path in keys.items() if path in known}
        return hashed | lora_hashes(tensors, hashed)


def as_texts(values: Mapping[str, object]) -> dict[str, str]:
    """Values as sd-scripts writes them: str() of each, JSON of dictionaries and lists of them.

    Names of folders may hold bytes that are no text; in their place stands "?", as a file's header must be UTF-8.
    """
    return {key: _as_text(value).encode("utf-8", "replace").decode() for key, value in values.items()}


def _fitting(facts: Mapping[str, object]) -> dict[str, str]:
    """The facts as texts of at most LARGEST_TEXT: of very many captions the rarest tags are left out."""
    texts, most = as_texts(facts), MOST_TAGS
    while most and sum(map(len, texts.values())) > LARGEST_TEXT:
        logger.warning(
            "The metadata of the captions is too long for a file; the %d commonest of each folder stay.", most
        )
        texts, most = as_texts(with_commonest_tags(facts, most)), most // 4
    return texts


def _as_text(value: object) -> str:
    is_table = isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict))
    return json.dumps(value, ensure_ascii=False) if is_table else str(value)


def _file_facts(family: FamilyFacts) -> dict[str, object]:
    facts: dict[str, object] = {
        "ss_sd_model_name": family.base_file.name,
        "ss_sd_model_hash": legacy_file_hash(family.base_file),
    }
    if family.vae_file is not None:
        facts |= {"ss_vae_name": family.vae_file.name, "ss_vae_hash": legacy_file_hash(family.vae_file)}
    return facts
