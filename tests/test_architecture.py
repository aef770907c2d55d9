"""The layers of docs/architecture.md, read from the source: imports, what takes whom, and sizes.

    python -m tests.test_architecture    # lists what breaks them

Imports under `if TYPE_CHECKING:` and inside functions count as all others do.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS = (
    ("common",),
    ("data", "flow", "options"),
    ("training", "networks", "memory", "distributed", "caching", "sd3"),
    ("preflight", "monitoring", "saving"),
    ("network_trainer",),
    ("sd3_train_network", "tools", "benchmarks"),
)
LAYER = {package: number for number, packages in enumerate(LAYERS) for package in packages}
WITHIN_A_LAYER = {
    ("networks", "memory"),
    ("training", "distributed"),
    ("preflight", "saving"),
    ("monitoring", "saving"),
    ("tools", "sd3_train_network"),
    ("benchmarks", "sd3_train_network"),
    ("benchmarks", "tools"),
}
KNOW_NO_SD3 = ("memory", "distributed", "training", "networks", "flow")
TAKE_ARGUMENTS = ("library/options/", "library/preflight/settings/", "library/network_trainer.py")
LONGEST_FILE, LONGEST_FUNCTION = 300, 60  # lines
OURS = ("library", "networks", "tools", "benchmarks", "sd3_train_network")


@dataclass(frozen=True)
class Module:
    """A source file and its tree."""

    path: str  # from the root of the repository, with "/"
    text: str = field(repr=False)

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def name(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def imports(self) -> Iterator[tuple[int, str]]:
        """(line, full name) of each module of ours that is imported, wherever the import is written."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(node)  # a name may be a module of the package
                names = [f"{base}.{alias.name}" for alias in node.names]
            else:
                continue
            yield from ((node.lineno, name) for name in names if name.split(".")[0] in OURS)

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        package = parts if self.path.endswith("__init__.py") else parts[:-1]
        kept = package[: len(package) - node.level + 1]
        return ".".join([*kept, node.module] if node.module else kept)

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield node


def package_of(name: str) -> str:
    """The package of a module by its dotted name: "library.sd3.mmdit" -> "sd3", "networks.lora" -> "networks"."""
    parts = name.split(".")
    return parts[1] if parts[0] == "library" and len(parts) > 1 else parts[0]


def read_modules(root: Path = ROOT) -> list[Module]:
    """Every source file but the tests'."""
    paths = [path for folder in OURS[:-1] for path in sorted((root / folder).rglob("*.py"))]
    paths.append(root / "sd3_train_network.py")
    return [Module(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


def against_the_layers(modules: list[Module]) -> list[str]:
    problems = []
    for module in modules:
        importer = package_of(module.name)
        for line, name in module.imports():
            imported = package_of(name)
            if imported == importer or (importer, imported) in WITHIN_A_LAYER:
                continue
            if LAYER.get(imported, 99) >= LAYER.get(importer, 99):
                problems.append(f"{module.path}:{line}: {importer} imports {name}")
    return sorted(set(problems))


def circles(modules: list[Module]) -> list[str]:
    """Packages that import one another, by whatever way round."""
    imported = {package_of(module.name): set[str]() for module in modules}
    for module in modules:
        own = package_of(module.name)
        imported[own] |= {package_of(name) for _, name in module.imports()} - {own}

    def reach(package: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(imported.get(package, ()))
        while waiting:
            following = waiting.pop()
            if following not in seen:
                seen.add(following)
                waiting += imported.get(following, ())
        return seen

    reached = {package: reach(package) for package in imported}
    groups = {frozenset(b for b in imported if b in reached[a] and a in reached[b]) for a in imported}
    return [f"a circle: {', '.join(sorted(group))}" for group in sorted(groups, key=sorted) if group]


def strangers_at_the_root(modules: list[Module]) -> list[str]:
    """Files of library/ itself beside network_trainer.py, and packages that design knows nothing of."""
    allowed = {"library/network_trainer.py", "library/__init__.py"}
    files = [m.path for m in modules if m.path.startswith("library/") and m.path.count("/") == 1]
    packages = {m.path.split("/")[1] for m in modules if m.path.startswith("library/") and m.path.count("/") > 1}
    return [f"{path}: only network_trainer.py stands there" for path in files if path not in allowed] + [
        f"library/{package}: a package of no layer" for package in sorted(packages - LAYER.keys())
    ]


def too_long(modules: list[Module]) -> list[str]:
    problems = []
    for module in modules:
        if not module.path.startswith(("library/", "networks/")):
            continue
        lines = module.text.count("\n")
        if lines > LONGEST_FILE:
            problems.append(f"{module.path}: {lines} lines")
        for function in module.functions():
            length = (function.end_lineno or function.lineno) - function.lineno + 1
            if length > LONGEST_FUNCTION:
                problems.append(f"{module.path}:{function.lineno}: {function.name} has {length} lines")
    return problems


def parameters_of(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> Iterator[ast.arg]:
    given = function.args
    yield from (*given.posonlyargs, *given.args, *given.kwonlyargs)


def take_the_trainer(modules: list[Module]) -> list[str]:
    """Parameters and attributes that are a trainer."""
    problems = []
    for module in modules:
        if not module.path.startswith(("library/", "networks/", "sd3_train_network")):
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.arg) and (node.arg == "trainer" or "NetworkTrainer" in annotation(node)):
                problems.append(f"{module.path}:{node.lineno}: the parameter {node.arg} is a trainer")
            if isinstance(node, ast.AnnAssign) and "NetworkTrainer" in ast.unparse(node.annotation):
                problems.append(f"{module.path}:{node.lineno}: {ast.unparse(node.target)} is a trainer")
    return problems


def take_the_arguments(modules: list[Module]) -> list[str]:
    """Parameters that are argparse's Namespace, outside of the places that may have it. A tool has a parser of its own."""
    problems = []
    for module in modules:
        if not module.path.startswith(("library/", "networks/")) or module.path.startswith(TAKE_ARGUMENTS):
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                name = getattr(node, "name", "lambda")
                problems += [
                    f"{module.path}:{parameter.lineno}: {name} takes {parameter.arg}"
                    for parameter in parameters_of(node)
                    if (parameter.arg == "args" and not annotation(parameter)) or "Namespace" in annotation(parameter)
                ]
            elif isinstance(node, ast.AnnAssign) and "Namespace" in ast.unparse(node.annotation):
                problems.append(f"{module.path}:{node.lineno}: {ast.unparse(node.target)} holds the Namespace")
    return problems


def mutate_the_arguments(modules: list[Module]) -> list[str]:
    """Assignments to an attribute of `args` once it is parsed."""
    problems = []
    for module in modules:
        if module.path.startswith(("tools/", "benchmarks/", "library/options/")):
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Delete)):
                targets = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else [node.target]
                changed = [ast.unparse(target) for target in targets if isinstance(target, ast.Attribute)]
                changed = [name for name in changed if name.startswith(("args.", "self.args."))]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr") and node.args:
                changed = [ast.unparse(node)] if ast.unparse(node.args[0]) in ("args", "self.args") else []
            else:
                continue
            problems += [f"{module.path}:{node.lineno}: {name} is changed" for name in changed]
    return problems


def annotation(parameter: ast.arg) -> str:
    return ast.unparse(parameter.annotation) if parameter.annotation else ""


def know_sd3(modules: list[Module]) -> list[str]:
    return [
        f"{module.path}:{line}: {name}"
        for module in modules
        if package_of(module.name) in KNOW_NO_SD3
        for line, name in module.imports()
        if package_of(name) == "sd3"
    ]


RULES = {
    "imports go down the layers": against_the_layers,
    "no circle of packages": circles,
    "the root of library holds network_trainer.py alone": strangers_at_the_root,
    "files and functions fit": too_long,
    "nothing takes the trainer": take_the_trainer,
    "the Namespace stops at the settings": take_the_arguments,
    "nothing changes the Namespace": mutate_the_arguments,
    "memory, distributed, training, networks and flow know no SD3": know_sd3,
}


@pytest.fixture(scope="module")
def modules() -> list[Module]:
    return read_modules()


@pytest.mark.parametrize("rule", RULES)
def test_the_source_keeps(rule: str, modules: list[Module]):
    problems = RULES[rule](modules)
    assert not problems, "\n" + "\n".join(problems)


BROKEN = {
    "library/common/a.py": "def f():\n    from library.sd3 import mmdit\n",
    "library/flow/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from library.data.index import Index\n",
    "library/sd3/c.py": "import library.common.errors\n",
    "library/memory/d.py": "from networks.lora import X\nfrom library.sd3.mmdit import JointBlock\n",
    "library/data/e.py": "from ..flow import b\nx = 1\n" * 151,
    "library/saving/f.py": "def save(trainer, args): pass\ndef go(x: argparse.Namespace): args.x = 1\nsetattr(args, 'x', 2)\n",
    "library/monitoring/g.py": "class A:\n    trainer: NetworkTrainer\n    args: argparse.Namespace\n",
    "library/run_x.py": "def f():\n" + "    pass\n" * 60,
    "networks/h.py": "from library.memory.swap import Y\n",
}


def test_each_rule_sees_what_breaks_it():
    broken = [Module(path, text) for path, text in BROKEN.items()]
    seen = {rule: set(check(broken)) for rule, check in RULES.items()}
    assert seen["imports go down the layers"] >= {
        "library/common/a.py:2: common imports library.sd3.mmdit",
        "library/flow/b.py:3: flow imports library.data.index.Index",
        "library/memory/d.py:1: memory imports networks.lora.X",
        "library/data/e.py:1: data imports library.flow.b",
    }
    assert not any(":1: sd3" in problem or "networks/h" in problem for problem in seen["imports go down the layers"])
    assert seen["no circle of packages"] == {
        "a circle: common, sd3",
        "a circle: data, flow",
        "a circle: memory, networks",
    }
    assert seen["the root of library holds network_trainer.py alone"] == {
        "library/run_x.py: only network_trainer.py stands there"
    }
    assert seen["files and functions fit"] == {"library/data/e.py: 302 lines", "library/run_x.py:1: f has 61 lines"}
    assert len(seen["nothing takes the trainer"]) == 2
    assert seen["the Namespace stops at the settings"] == {
        "library/saving/f.py:1: save takes args",
        "library/saving/f.py:2: go takes x",
        "library/monitoring/g.py:3: args holds the Namespace",
    }
    assert len(seen["nothing changes the Namespace"]) == 2
    assert seen["memory, distributed, training, networks and flow know no SD3"] == {
        "library/memory/d.py:2: library.sd3.mmdit.JointBlock"
    }


if __name__ == "__main__":
    source = read_modules()
    for rule, check in RULES.items():
        problems = check(source)
        print(f"{rule}: {len(problems) or 'kept'}", *(f"    {problem}" for problem in problems), sep="\n")
