"""--network_module leads to the right module or to a clear error."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from library.common.errors import UserError
from networks import lora_sd3, lycoris_kohya
from networks.network_modules import FUNCTIONS, network_module


def test_names_of_the_original_lead_to_sd3s_modules():
    assert network_module("networks.lora") is lora_sd3
    assert network_module("networks.lora_sd3") is lora_sd3
    assert network_module("lycoris.kohya") is lycoris_kohya


def test_any_module_with_the_functions_is_taken(monkeypatch):
    module = ModuleType("my_network")
    for name in FUNCTIONS:
        setattr(module, name, lambda: None)
    monkeypatch.setitem(sys.modules, "my_network", module)
    assert network_module("my_network") is module


@pytest.mark.parametrize("name", ["networks.lora_flux", "no.such.module", "networks.weight_files", ""])
def test_other_names_are_errors_that_say_what_to_use(name: str):
    with pytest.raises(UserError, match=r"networks\.lora_sd3.*lycoris\.kohya"):
        network_module(name)


def test_a_module_whose_own_import_fails_names_the_missing_package(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import a_package_that_is_absent\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="needs the package a_package_that_is_absent"):
        network_module("half_installed")
