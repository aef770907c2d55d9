#!/usr/bin/env python3
"""Draw which package of library/ and networks/ imports which, as a mermaid graph: the picture in docs/architecture.md.

python tools/import_graph.py
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENTRY = "sd3_train_network"


def main(arguments: list[str] | None = None) -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    print(mermaid(package_imports(ROOT)))
    return 0


def package_imports(root: Path) -> set[tuple[str, str]]:
    """Pairs (importing package, imported package) of all import statements, those under TYPE_CHECKING included."""
    pairs = set()
    files = [*(root / "library").rglob("*.py"), *(root / "networks").rglob("*.py"), root / f"{ENTRY}.py"]
    for file in files:
        package = package_of(".".join(file.relative_to(root).with_suffix("").parts))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            pairs |= {(package, package_of(name)) for name in names if name.startswith(("library.", "networks"))}
    return {(importer, imported) for importer, imported in pairs if importer != imported}


def package_of(module: str) -> str:
    """The package that a dotted name belongs to: "training" of "library.training.step", "networks" of "networks.lora"."""
    parts = module.split(".")
    return parts[1] if parts[0] == "library" else parts[0]


def mermaid(pairs: set[tuple[str, str]]) -> str:
    """A graph without the arrows that follow from others, so that the layers can be seen."""
    arrows = sorted(pair for pair in pairs if not _is_implied(pair, pairs))
    return "\n".join(["graph TD", *(f"    {importer} --> {imported}" for importer, imported in arrows)])


def _is_implied(pair: tuple[str, str], pairs: set[tuple[str, str]]) -> bool:
    """Whether the imported package is reached through another one as well."""
    importer, imported = pair
    waiting, seen = [each for first, each in pairs if first == importer and each != imported], set()
    while waiting:
        package = waiting.pop()
        if package == imported:
            return True
        if package not in seen:
            seen.add(package)
            waiting += [each for first, each in pairs if first == package]
    return False


if __name__ == "__main__":
    sys.exit(main())
