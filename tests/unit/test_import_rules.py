"""The architecture's rules about imports, global state and the command line, read off the syntax tree of every file.

Each rule is a function from a parsed file to (line, message) pairs, and each has a snippet below that must break it.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*ROOT.glob("megatron/**/*.py"), *ROOT.glob("tools/**/*.py"), *ROOT.glob("*.py")])

MAY_IMPORT_DEEPSPEED = {"megatron/engine.py", "megatron/model/pipeline.py"}
MAY_KEEP_STATE = {("megatron/distributed/messages.py", "_SLOTS")}
MAY_READ_ARGV = {"megatron/arguments.py"}
MUTABLE_CALLS = {"list", "dict", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict"}
MUTATING_METHODS = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "clear", "remove"}
CONTAINERS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
LONG_FILE, LONG_FUNCTION = 400, 60

Violations = Iterator[tuple[int, str]]
Rule = Callable[[str, ast.Module], Violations]


def imported_modules(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute dotted name) of every import: statements, relative ones, ``import_module("...")``."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join(base + ([node.module] if node.module else []))
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and called_name(node) in {"import_module", "__import__"} and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield node.lineno, argument.value


def called_name(node: ast.Call) -> str:
    """Return ``f`` for both ``f(...)`` and ``module.f(...)``."""
    if isinstance(node.func, ast.Name):
        return node.func.id
    return node.func.attr if isinstance(node.func, ast.Attribute) else ""


def is_under(name: str, package: str) -> bool:
    """Tell whether dotted ``name`` is ``package`` or lies inside it."""
    return name == package or name.startswith(package + ".")


def layers(path: str, tree: ast.Module) -> Violations:
    """``model/`` knows tensors only; ``objectives/`` knows no model; DeepSpeed has two doors, settings have one."""
    forbidden: list[str] = []
    if path.startswith("megatron/model/"):
        forbidden += ["megatron.objectives", "megatron.data"]
    if path.startswith("megatron/objectives/"):
        forbidden += ["megatron.model"]
    if path not in MAY_IMPORT_DEEPSPEED:
        forbidden += ["deepspeed"]
    if path != "megatron/config.py":
        forbidden += ["megatron.config_recipe"]
    for line, name in imported_modules(path, tree):
        for package in forbidden:
            if is_under(name, package):
                yield line, f"imports {name}: {package} is out of bounds here"


def command_line(path: str, tree: ast.Module) -> Violations:
    """``sys.argv`` is read by ``arguments.py`` and the tools; a module that parses arguments can be run with ``-m``, or
    holds the command line of one that can (``*_cli.py``).
    """
    if path.startswith("tools/") or path in MAY_READ_ARGV:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "argv" and ast.unparse(node.value) == "sys":
            yield node.lineno, "reads sys.argv"
    runnable = any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)
    for line, name in imported_modules(path, tree):
        if name == "sys.argv":
            yield line, "reads sys.argv"
        if is_under(name, "argparse") and not runnable and not path.endswith("_cli.py"):
            yield line, "imports argparse, but is no program"


def is_mutable(value: ast.expr | None) -> bool:
    """Tell whether an expression makes a list, dict, set or the like."""
    return isinstance(value, CONTAINERS) or (isinstance(value, ast.Call) and called_name(value) in MUTABLE_CALLS)


def is_empty(value: ast.expr) -> bool:
    """Tell whether a container expression makes an empty container, which can only be meant to be filled."""
    if isinstance(value, ast.Call):
        factory = called_name(value) == "defaultdict"
        return len(value.args) <= factory and not value.keywords
    return not getattr(value, "elts", getattr(value, "keys", True))


def module_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that run at import, those inside ``if``, ``try`` and ``with`` included."""
    for node in body:
        yield node
        for field in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With | ast.For):
                yield from module_level(getattr(node, field, []))


def global_state(path: str, tree: ast.Module) -> Violations:
    """A module keeps nothing that changes: containers at module level are named constants and nobody writes to them."""
    constants: set[str] = set()
    for node in module_level(tree.body):
        if not isinstance(node, ast.Assign | ast.AnnAssign) or not is_mutable(node.value):
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if not isinstance(target, ast.Name) or target.id.startswith("__") or (path, target.id) in MAY_KEEP_STATE:
                continue
            constants.add(target.id)
            final = isinstance(node, ast.AnnAssign) and "Final" in ast.unparse(node.annotation)
            if not (final or target.id.isupper()):
                yield node.lineno, f"module-level mutable `{target.id}`: make it an argument, or name it as a constant"
            elif is_empty(node.value):
                yield node.lineno, f"module-level `{target.id}` is empty: it can only be meant to be filled"
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield node.lineno, f"global {', '.join(node.names)}"
        written = None
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            written = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATING_METHODS:
            written = node.func.value
        if isinstance(written, ast.Name) and written.id in constants:
            yield node.lineno, f"writes to the module-level constant `{written.id}`"


def habits(path: str, tree: ast.Module) -> Violations:
    """No ``get_args()``, no ``type=bool`` flag ("False" would be true), no bare except."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "get_args":
            yield node.lineno, "defines get_args(): configuration is an argument"
        if isinstance(node, ast.Call):
            if called_name(node) == "get_args" and ast.unparse(node.func) != "typing.get_args":
                yield node.lineno, "calls get_args(): configuration is an argument"
            for keyword in node.keywords:
                if keyword.arg == "type" and isinstance(keyword.value, ast.Name) and keyword.value.id == "bool":
                    yield node.lineno, 'type=bool makes "False" true: a boolean flag takes no value'
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno, "bare except"


RULES: list[Rule] = [layers, command_line, global_state, habits]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_tree_keeps_the_rule(rule: Rule) -> None:
    found = []
    for file in FILES:
        path = file.relative_to(ROOT).as_posix()
        found += [f"{path}:{line}: {message}" for line, message in rule(path, ast.parse(file.read_text("utf-8")))]
    assert not found, "\n" + "\n".join(found)


BREAKS = [
    (layers, "megatron/model/gpt.py", "from megatron.objectives.base import Batch"),
    (layers, "megatron/model/gpt.py", "from megatron import data"),
    (layers, "megatron/model/gpt.py", "from ..data import loader"),
    (layers, "megatron/model/gpt.py", "def f():\n    import deepspeed.pipe"),
    (layers, "megatron/model/sharding.py", "import megatron.objectives"),
    (layers, "megatron/objectives/base.py", "from megatron.model import gpt"),
    (layers, "megatron/checkpointing.py", "from deepspeed.utils import logger"),
    (layers, "megatron/model/gpt.py", "from megatron.config_recipe import ModelConfig"),
    (layers, "tools/benchmark.py", "importlib.import_module('deepspeed')"),
    (command_line, "megatron/training.py", "import sys\nprint(sys.argv[1:])"),
    (command_line, "pretrain_gpt.py", "from sys import argv"),
    (command_line, "megatron/metrics.py", "import argparse"),
    (global_state, "megatron/metrics.py", "cache = {}"),
    (global_state, "megatron/metrics.py", "_CACHE: dict[str, int] = {}"),
    (global_state, "megatron/metrics.py", "CACHE = collections.defaultdict(list)"),
    (global_state, "megatron/metrics.py", "try:\n    groups = [None]\nexcept KeyError:\n    pass"),
    (global_state, "megatron/metrics.py", "NAMES = ['a']\ndef f():\n    NAMES.append('b')"),
    (global_state, "megatron/metrics.py", "NAMES = {'a': 1}\ndef f():\n    NAMES['b'] = 2"),
    (global_state, "megatron/metrics.py", "step = 0\ndef f():\n    global step"),
    (global_state, "megatron/distributed/messages.py", "_OTHERS = {}"),
    (habits, "megatron/metrics.py", "def get_args(): ..."),
    (habits, "megatron/metrics.py", "x = global_vars.get_args()"),
    (habits, "tools/x.py", "parser.add_argument('--flag', type=bool)"),
    (habits, "tools/x.py", "try:\n    f()\nexcept:\n    pass"),
]


@pytest.mark.parametrize(("rule", "path", "source"), BREAKS)
def test_rule_can_fail(rule: Rule, path: str, source: str) -> None:
    assert list(rule(path, ast.parse(source)))


KEEPS = [
    (layers, "megatron/model/pipeline.py", "from deepspeed.pipe import PipelineModule"),
    (layers, "megatron/objectives/base.py", "from megatron.modelling import x"),
    (command_line, "megatron/budget.py", "import argparse\nif __name__ == '__main__':\n    main()"),
    (command_line, "megatron/budget_cli.py", "import argparse"),
    (command_line, "tools/x.py", "import sys\nmain(sys.argv[1:])"),
    (global_state, "megatron/metrics.py", "__all__ = ['a']\nNAMES = ['a']\nlog = getLogger(__name__)"),
    (global_state, "megatron/metrics.py", "names: Final = {'a': 1}\nSHORT = set(names)"),
    (global_state, "megatron/metrics.py", "def f():\n    cache = {}\n    cache['a'] = 1"),
    (global_state, "megatron/distributed/messages.py", "_SLOTS = {}\ndef f():\n    _SLOTS['a'] = 1"),
    (habits, "megatron/metrics.py", "try:\n    f()\nexcept OSError:\n    typing.get_args(x)"),
]


@pytest.mark.parametrize(("rule", "path", "source"), KEEPS)
def test_rule_allows_what_it_should(rule: Rule, path: str, source: str) -> None:
    assert not list(rule(path, ast.parse(source)))


def test_every_package_folder_is_a_package() -> None:
    """Setuptools installs a folder only if it has an ``__init__.py``; an editable install would not show the lack."""
    folders = {file.parent for file in FILES if file.is_relative_to(ROOT / "megatron")}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").is_file()]


def test_lengths_are_reported() -> None:
    """Long files and functions are shown as a warning: a place to look for the second responsibility, not a failure."""
    long = []
    for file in FILES:
        source, path = file.read_text("utf-8"), file.relative_to(ROOT).as_posix()
        if len(source.splitlines()) > LONG_FILE:
            long.append(f"{path}: {len(source.splitlines())} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= LONG_FUNCTION:
                long.append(f"{path}:{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    if long:
        warnings.warn("long files and functions:\n" + "\n".join(long), stacklevel=1)
