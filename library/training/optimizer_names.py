"""Which class an `--optimizer_type` means, and which package it takes. Nothing heavy is imported to answer."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from library.common.errors import UserError


@dataclass(frozen=True)
class OptimizerSource:
    """Where an optimizer comes from.

    package: what pip installs, "" for torch's own. defaults: arguments that the name itself implies.
    adapts_rate: it estimates the step size d itself; rates are factors of d, want to be about 1 and equal in all groups.
    catalogued: its step is known to work here without a closure or a model.
    """

    name: str
    module: str
    class_name: str
    package: str = ""
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    adapts_rate: bool = False
    catalogued: bool = True

    def load(self) -> type:
        """Import the class. Raises UserError when its package is missing or does not import."""
        _require(self.module, self.package, self.name)
        try:
            optimizer_class: object = getattr(importlib.import_module(self.module), self.class_name)
        except AttributeError:
            raise UserError(f"--optimizer_type={self.name}: {self.module} has no {self.class_name}.") from None
        except (Exception, SystemExit) as error:  # the user's own module may raise anything
            raise UserError(f"--optimizer_type={self.name}: {self.module} cannot be imported: {error}.") from error
        if not isinstance(optimizer_class, type):
            raise UserError(f"--optimizer_type={self.name} is no class. Name a subclass of torch.optim.Optimizer.")
        return optimizer_class


# packages whose optimizers step every tensor by itself, whichever others are stepped with it
SHARDABLE_PACKAGES = frozenset(["torch.optim", "bitsandbytes.optim", "lion_pytorch"])


def can_be_sharded(name: str) -> bool:
    """Whether each parameter's step of --optimizer_type `name` is known to depend on that parameter alone."""
    return find_optimizer(name).module in SHARDABLE_PACKAGES


def _entries() -> list[OptimizerSource]:
    nesterov = MappingProxyType({"momentum": 0.9, "nesterov": True})
    bitsandbytes = ("bitsandbytes.optim", "bitsandbytes")
    dadaptation, preprint = "dadaptation", "dadaptation.experimental"
    entries = [
        OptimizerSource("AdamW", "torch.optim", "AdamW"),
        OptimizerSource("SGDNesterov", "torch.optim", "SGD", defaults=nesterov),
        OptimizerSource("SGDNesterov8bit", bitsandbytes[0], "SGD8bit", bitsandbytes[1], nesterov),
        OptimizerSource("Lion", "lion_pytorch", "Lion", "lion-pytorch"),
        OptimizerSource("Adafactor", "transformers.optimization", "Adafactor", "transformers"),
        OptimizerSource("DAdaptation", preprint, "DAdaptAdamPreprint", "dadaptation", adapts_rate=True),
        OptimizerSource("Prodigy", "prodigyopt", "Prodigy", "prodigyopt", adapts_rate=True),
        OptimizerSource(
            "ProdigyPlusScheduleFree", "prodigyplus", "ProdigyPlusScheduleFree", "prodigy-plus-schedule-free"
        ),
    ]
    for name in ("AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit", "Lion8bit", "PagedLion8bit"):
        entries.append(OptimizerSource(name, bitsandbytes[0], name, bitsandbytes[1]))
    for name in ("DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptLion", "DAdaptSGD"):
        entries.append(OptimizerSource(name, dadaptation, name, "dadaptation", adapts_rate=True))
    for name in ("DAdaptAdamPreprint", "DAdaptAdanIP"):
        entries.append(OptimizerSource(name, preprint, name, "dadaptation", adapts_rate=True))
    for name in ("RAdamScheduleFree", "AdamWScheduleFree", "SGDScheduleFree"):
        entries.append(OptimizerSource(name, "schedulefree", name, "schedulefree"))
    return entries


CATALOGUE: Mapping[str, OptimizerSource] = MappingProxyType({entry.name.lower(): entry for entry in _entries()})

# Packages whose import name pip does not know.
_PIP_NAMES = MappingProxyType(
    {
        "lion_pytorch": "lion-pytorch",
        "prodigyplus": "prodigy-plus-schedule-free",
        "pytorch_optimizer": "pytorch-optimizer",
    }
)


def choose_name(optimizer_type: str, use_8bit_adam: bool = False, use_lion_optimizer: bool = False) -> str:
    """The optimizer's name from --optimizer_type and its two old shortcuts; "" means AdamW. Raises UserError on both."""
    shortcuts = [("--use_8bit_adam", "AdamW8bit")] * use_8bit_adam + [
        ("--use_lion_optimizer", "Lion")
    ] * use_lion_optimizer
    given = [("--optimizer_type", optimizer_type)] * bool(optimizer_type) + shortcuts
    if len({name.lower() for _, name in given}) > 1:
        raise UserError(f"{' and '.join(option for option, _ in given)} name different optimizers: keep one of them.")
    return given[0][1] if given else "AdamW"


def find_optimizer(name: str) -> OptimizerSource:
    """Resolve a name, in any case: the catalogue, torch.optim, bitsandbytes (…8bit, …32bit, Paged…), pytorch-optimizer,
    or a dotted path to a class. Raises UserError with the nearest names, or with what to install."""
    name = name.strip() or "AdamW"
    known = CATALOGUE.get(name.lower())
    if known:
        _require(known.module, known.package, known.name)
        return known
    if "." in name:
        module, _, class_name = name.rpartition(".")
        package = _PIP_NAMES.get(module.split(".")[0], module.split(".")[0])
        _require(module, package, name)
        return OptimizerSource(name, module, class_name, package, catalogued=False)
    return _find_in_packages(name)


def _find_in_packages(name: str) -> OptimizerSource:
    lower, candidates = name.lower(), [entry.name for entry in CATALOGUE.values()]
    modules = [("torch.optim", ""), ("pytorch_optimizer", "pytorch-optimizer")]
    if lower.endswith(("8bit", "32bit")) or lower.startswith("paged"):
        _require("bitsandbytes", "bitsandbytes", name)
        modules = [("bitsandbytes.optim", "bitsandbytes")]
    absent = []
    for module, package in modules:
        if not _installed(module):
            absent.append(package)
            continue
        classes = {attribute.lower(): attribute for attribute in _optimizer_classes(module)}
        if lower in classes:
            return OptimizerSource(name, module, classes[lower], package, catalogued=False)
        candidates += classes.values()
    near = difflib.get_close_matches(lower, {candidate.lower(): candidate for candidate in candidates}, n=3, cutoff=0.5)
    spelled = {candidate.lower(): candidate for candidate in candidates}
    hint = f" Did you mean {' or '.join(spelled[match] for match in near)}?" if near else ""
    more = f" More names come with `pip install {' '.join(absent)}`." if absent else ""
    raise UserError(f"--optimizer_type={name} is not known.{hint} A dotted path to a class works too.{more}")


def _optimizer_classes(module: str) -> list[str]:
    import torch

    members = vars(importlib.import_module(module)).items()
    base = torch.optim.Optimizer
    return [
        name for name, member in members if isinstance(member, type) and issubclass(member, base) and member != base
    ]


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module.split(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def _require(module: str, package: str, name: str) -> None:
    if not _installed(module):
        raise UserError(
            f"--optimizer_type={name} needs the Python package {package}, which is not installed: pip install {package}"
        )
