"""From a dataset file and the command line to settings: read, check, and take each value from the innermost table that has one.

The order is subset, dataset, [general], command line, built-in default. All problems are reported together.
"""

from __future__ import annotations

import logging
import os
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from library.common.errors import Problems, UserError
from library.data import schema
from library.data.buckets import bucket_limits, check_sides
from library.data.command_line import CommandLineData, dataset_keys, dataset_tables, mask_folder
from library.data.config_file import Source, TablePath, read_source
from library.data.headers import EXTENSIONS, OPTIONAL_EXTENSIONS
from library.data.settings import CaptionSettings, DatasetSettings, SubsetSettings

logger = logging.getLogger(__name__)

Values = Mapping[str, Any]
_CAPTION_KEYS = tuple(field.name for field in fields(CaptionSettings))
_SUBSET_KEYS = (
    "is_reg",
    *(field.name for field in fields(SubsetSettings) if field.name in schema.GENERAL_TABLE.model_fields),
)
_DATASET_KEYS = tuple(
    field.name for field in fields(DatasetSettings) if field.name in schema.GENERAL_TABLE.model_fields
)


def read_datasets(config_path: str | Path | None, command_line: CommandLineData) -> list[DatasetSettings]:
    """Return the settings of all datasets: those of the file at `config_path` (.toml or .json), or those of the command line.

    Raises UserError with every problem of the file and of the command line's data options.
    """
    problems = Problems()
    fallback = _command_line_values(command_line, problems)
    if config_path is None:
        source = Source("the command line", dataset_tables(command_line), {})
    else:
        _warn_of_ignored(command_line)
        source = read_source(Path(config_path))
    reader = _Reader(source, fallback, command_line, problems)
    datasets = reader.read()
    problems.raise_if_any()
    return datasets


def _command_line_values(command_line: CommandLineData, problems: Problems) -> Values:
    """The command line's share of the values, checked by the rules of [general]."""
    values, wrong = schema.check(schema.GENERAL_TABLE, dataset_keys(command_line, problems))
    for _, sentence in wrong:
        problems.add(f"The command line: {sentence}.")
    return values


def _warn_of_ignored(command_line: CommandLineData) -> None:
    names = ("train_data_dir", "reg_data_dir", "in_json")
    ignored = [f"--{name}" for name in names if getattr(command_line, name)]
    if ignored:
        logger.warning("--dataset_config is given, so %s is ignored", " and ".join(ignored))


class _Reader:
    """Walks one source and collects problems on the way."""

    def __init__(self, source: Source, fallback: Values, command_line: CommandLineData, problems: Problems):
        self.source, self.fallback, self.command_line, self.problems = source, fallback, command_line, problems

    def read(self) -> list[DatasetSettings]:
        tables = self.source.tables
        for key in tables:
            if key not in ("general", "datasets"):
                self._add((), _misplaced(key), key)
        general_table = tables.get("general")
        if general_table is not None and not isinstance(general_table, dict):
            self._add(("general",), "general must be one table, [general]")
            general_table = None
        general = self._checked(schema.GENERAL_TABLE, general_table or {}, ("general",))
        datasets = self._tables(tables.get("datasets"), (), "datasets", "[[datasets]]")
        if not datasets and not self.problems.problems:
            self._add((), "there is no dataset; write a [[datasets]] table with a [[datasets.subsets]] table below it")
        made = [self._dataset(number, table, general) for number, table in enumerate(datasets)]
        return [dataset for dataset in made if dataset is not None]

    def _dataset(self, number: int, table: Values, general: Values) -> DatasetSettings | None:
        at = ("datasets", str(number))
        subset_tables = self._tables(table.get("subsets"), at, "subsets", "[[datasets.subsets]]")
        subset_tables = self._with_masks(subset_tables, at)
        style = self._style(subset_tables, at)
        own = {key: value for key, value in table.items() if key != "subsets"}
        dataset = self._checked(schema.DATASET_TABLES[style], own, at)
        if not subset_tables:
            self._add(at, "the dataset has no subset; write a [[datasets.subsets]] table below it")
        values = ChainMap(dict(dataset), dict(general), dict(self.fallback))
        subsets: list[SubsetSettings] = []
        for subset_number, subset_table in enumerate(subset_tables):
            subset_at = (*at, "subsets", str(subset_number))
            subset = self._subset(subset_table, style, values, subset_at)
            if subset is not None and not self._is_twice(subset, subsets, subset_at):
                subsets.append(subset)
        if "resolution" not in values:
            if not self._says_resolution(table):  # a faulty one is told already
                self._add(at, "resolution is not set; put it here or in [general], or give --resolution")
            return None
        if not subsets and subset_tables:
            self._add(at, "no subset is left (see the warnings); num_repeats must be at least 1 somewhere")
        chosen = {key: values[key] for key in _DATASET_KEYS if key in values}
        settings = DatasetSettings(name=f"dataset {number + 1}", subsets=tuple(subsets), **chosen)
        limits = values.get("min_bucket_reso"), values.get("max_bucket_reso")
        return self._finished(settings, limits, at)

    def _says_resolution(self, dataset: Values) -> bool:
        """Whether anyone gave a resolution, good or bad."""
        general = self.source.tables.get("general")
        in_general = isinstance(general, dict) and "resolution" in general
        return "resolution" in dataset or in_general or bool(self.command_line.key_options.get("resolution"))

    def _finished(
        self, settings: DatasetSettings, limits: tuple[int | None, int | None], at: TablePath
    ) -> DatasetSettings:
        """The settings with bucket limits that were set or follow the resolution; wrong sides and splits are told."""
        low, high = bucket_limits(settings.resolution, settings.bucket_reso_steps, *limits)
        split = settings.validation_split
        if not 0 <= split <= 1:
            logger.warning(
                "%s: validation_split = %s is outside 0..1, so nothing is held out", self.source.where(at), split
            )
            split = 0.0
        finished = replace(settings, min_bucket_reso=low, max_bucket_reso=high, validation_split=split)
        try:
            check_sides(finished)
        except UserError as error:
            for problem in error.problems:
                self._add(at, problem.rstrip("."))
        return finished

    def _subset(self, table: Values, style: str, outer: ChainMap[str, Any], at: TablePath) -> SubsetSettings | None:
        """The settings of one subset; None where num_repeats drops it."""
        own = self._checked(schema.SUBSET_TABLES[style], table, at)
        values = outer.new_child(own)
        chosen = {key: values[key] for key in _SUBSET_KEYS if key in values}
        if style == "mask":
            chosen["alpha_mask"] = False
            if values.get("random_crop"):
                self._add(at, "random_crop can't be used with conditioning_data_dir; set random_crop = false here")
        if style == "metadata":
            chosen = {key: value for key, value in chosen.items() if key not in ("caption_extension", "class_tokens")}
        elif "caption_extension" in chosen:
            extension = "." + chosen["caption_extension"].removeprefix(".")
            chosen["caption_extension"] = extension
            if extension.lower() in EXTENSIONS | OPTIONAL_EXTENSIONS:
                self._add(at, f'caption_extension = "{extension}" is that of images', "caption_extension")
        if chosen.get("num_repeats", 1) < 1:
            logger.warning("%s: num_repeats is below 1, so the subset is left out", self.source.where(at))
            return None
        name = own.get("metadata_file") or own.get("image_dir", "?")
        return SubsetSettings(
            name=f"dataset {int(at[1]) + 1}, subset {int(at[3]) + 1} ({name})",
            image_dir=_path(own.get("image_dir")),
            metadata_file=_path(own.get("metadata_file")),
            conditioning_data_dir=_path(own.get("conditioning_data_dir")),
            loss_weight=self.command_line.prior_loss_weight if own.get("is_reg") else 1.0,
            captions=CaptionSettings(**{key: values[key] for key in _CAPTION_KEYS if key in values}),
            **chosen,
        )

    def _with_masks(self, subsets: list[Values], at: TablePath) -> list[Values]:
        """The subsets' tables with the masks of `--conditioning_data_dir`, where they have none of their own."""
        masks = self.command_line.conditioning_data_dir
        if not masks or not self.command_line.masked_loss:
            return subsets
        if any(table.get("metadata_file") is not None for table in subsets):
            logger.warning("%s: --conditioning_data_dir has no effect on metadata files", self.source.where(at))
            return subsets
        return [{"conditioning_data_dir": mask_folder(masks, table.get("image_dir")), **table} for table in subsets]

    def _style(self, subsets: list[Values], at: TablePath) -> str:
        """ "metadata", "mask" or "folder", the same for all subsets of a dataset."""
        if subsets and all(table.get("metadata_file") is not None for table in subsets):
            return "metadata"
        if any(table.get("metadata_file") is not None for table in subsets):
            self._add(at, "subsets with and without metadata_file are mixed; put them in datasets of their own")
        if self.command_line.masked_loss and subsets and all("conditioning_data_dir" in table for table in subsets):
            return "mask"
        return "folder"

    def _is_twice(self, subset: SubsetSettings, earlier: list[SubsetSettings], at: TablePath) -> bool:
        def identity(one: SubsetSettings) -> tuple[str, str]:
            return (_real(one.image_dir), _real(one.metadata_file))

        twice = any(identity(one) == identity(subset) for one in earlier)
        if twice:
            logger.warning("%s: listed before in this dataset, so it is left out here", self.source.where(at))
        return twice

    def _tables(self, value: object, at: TablePath, key: str, header: str) -> list[Values]:
        """`value` as a list of tables; anything else is a problem and counts as none."""
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(table, dict) for table in value):
            self._add(at or (key,), f"{key} must be an array of tables: write {header}")
            return []
        return value

    def _checked(self, model: type[schema.Keys], table: Values, at: TablePath) -> dict[str, Any]:
        values, wrong = schema.check(model, table)
        for key, sentence in wrong:
            self._add(at, sentence, key)
        return values

    def _add(self, at: TablePath, sentence: str, key: str = "") -> None:
        end = "" if sentence.endswith("?") else "."
        self.problems.add(f"{self.source.where(at, key)}: {sentence}{end}")


def _misplaced(key: str) -> str:
    """Why a key can't stand at the top of the file."""
    if key in schema.GENERAL_TABLE.model_fields:
        return f'key "{key}" stands outside of all tables; put it in [general] or in a [[datasets]] table'
    if key == "subsets":
        return "write [[datasets.subsets]] below a [[datasets]] table"
    return f'unknown table or key "{key}"' + schema.nearest(key, ["general", "datasets"])


def _path(text: str | None) -> Path | None:
    return Path(text).expanduser() if text is not None else None


def _real(path: Path | None) -> str:
    return os.path.normcase(os.path.realpath(path)) if path is not None else ""
