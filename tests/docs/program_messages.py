"""What the trainer and its tools can tell a user that went wrong, read out of their source.

A message is a text literal that is raised, added to a list of problems or logged as a warning. Its variable parts are "…".
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Not told to users as something that went wrong: texts of options, plans and reports, and what makes the demo and the docs.
LEFT_OUT = (
    "library/options/groups/",
    "library/memory/estimator/planner.py",
    "library/memory/estimator/table.py",
    "library/monitoring/report/html_page.py",
    "library/monitoring/report/svg_charts.py",
    "tools/demo/dataset.py",
    "tools/make_option_docs.py",
    "tools/demo/pretrain.py",
)
SHOWN = {"text", "summary", "__str__"}  # functions that make what --dry_run and the log show
TOLD = {
    "UserError",
    "FormatError",
    "_DuplicateKey",
    "ReadError",
    "RunInterrupted",
    "BadImageError",
    "BucketError",
    "_Malformed",
    "PydanticCustomError",
    "_not_steps",
}
LOGGED = {"warning", "error", "exception"}
LISTS = re.compile(r"problem|warning|told|wrong|bad|broken|found|misfit|listing|self$|notes", re.IGNORECASE)
QUIET = {"info", "debug", "Option", "add_argument", "print", "compile", "search", "sub", "match", "fullmatch", "Phase"}
# Where a ValueError is caught and told with the option that it is about.
ASKED = ("library/options/", "library/data/folder_scan.py", "networks/arguments.py", "networks/lora_arguments.py")
ENOUGH = 2  # words


@dataclass(frozen=True)
class Message:
    text: str
    place: str  # file:line


@cache
def sources() -> dict[str, str]:
    """The program's files by name."""
    files = [ROOT / "sd3_train_network.py", ROOT / "quickstart.py"]
    for folder in ("library", "networks", "tools"):
        files += sorted((ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}


@cache
def program_messages() -> list[Message]:
    """Everything that can be told to a user who made a mistake, or whose run goes wrong."""
    found = []
    for name, source in sources().items():
        if name not in LEFT_OUT and not name.startswith(LEFT_OUT[0]):
            told = TOLD | ({"ValueError"} if name.startswith(ASKED) else set())
            found += [Message(text, f"{name}:{line}") for line, text in messages_in(source, told)]
    return found


def program_texts() -> list[str]:
    """Every text literal of the program, told or not."""
    texts = [literal(node) for source in sources().values() for node in ast.walk(ast.parse(source))]
    return [text for text in texts if text]


def messages_in(source: str, told: set[str]) -> Iterator[tuple[int, str]]:
    """Line and text of each message. told: the names of what is raised to tell one."""
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        text = literal(node)
        if text is None or not isinstance(node, ast.expr):
            continue
        around = list(above(node, parents))
        statement = around[-1] if around else node
        if any(literal(each) is not None for each in around) or function_of(statement, parents) in SHOWN:
            continue  # a piece of a longer one, or no message
        if is_told(text, around, told):
            yield node.lineno, text


def above(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> Iterator[ast.AST]:
    """What a node stands in, up to its statement."""
    while not isinstance(node, ast.stmt):
        node = parents[node]
        yield node


def function_of(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> str:
    while node in parents:
        node = parents[node]
        if isinstance(node, ast.FunctionDef):
            return node.name
    return ""


def literal(node: ast.AST) -> str | None:
    """The text of a literal, an f-string or a sum of them, with "…" for what is not written there."""
    if isinstance(node, ast.Constant):
        return re.sub(r"%(\.\d+)?[sdgr]", "…", node.value) if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = literal(node.left), literal(node.right)
        return None if left is None and right is None else (left or "…") + (right or "…")
    return None


def is_told(text: str, around: list[ast.AST], told: set[str]) -> bool:
    """Whether a literal is a message. around: what it stands in, its statement last."""
    words = re.findall(r"[^\W\d_]{2,}", text)
    if len(words) < ENOUGH or " " not in text.strip() or isinstance(around[0], ast.Expr):  # a docstring
        return False
    calls = [each.func for each in around if isinstance(each, ast.Call)]
    names = {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}
    if names & QUIET:
        return "print" in names and "sys.stderr" in ast.unparse(around[-1])
    if names & (told | LOGGED):
        return True
    lists = [call.value for call in calls if isinstance(call, ast.Attribute) and call.attr in ("add", "append", "_add")]
    lists += [call for call in calls if isinstance(call, ast.Name) and call.id == "problem"]
    if any(LISTS.search(ast.unparse(each)) for each in lists):
        return True
    if isinstance(around[-1], ast.Return) and text.startswith(('key "', "unknown table", "write [[")):
        return True
    return text.count(" ") >= ENOUGH and re.search(r"[a-z)…\]\"'`]\.$", text.rstrip()) is not None and text[0] != "<"
