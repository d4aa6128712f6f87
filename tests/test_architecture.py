"""Imports go one way: sharding <- jaxllm (device side) <- checkpoints <- jaxllm.llm <- cli, bench.

Read from the source, so an import inside a function counts as one at the top. A rule that names a package holds for all
of it; where two rules fit a module, the longer name decides.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
from paths import ROOT

PACKAGES = ("bench", "checkpoints", "jaxllm", "sharding")

# What a module may import of this repository.
MAY_IMPORT = {
    "sharding": ("sharding",),
    "jaxllm": ("jaxllm", "sharding"),
    "checkpoints": ("checkpoints", "jaxllm.config", "jaxllm.decoder.model", "jaxllm.decoder.rope", "sharding"),
    "jaxllm.llm": ("checkpoints", "jaxllm", "sharding"),
    "jaxllm.commands.checkpoints": ("checkpoints", "jaxllm", "sharding"),
    "jaxllm.commands.cli": ("checkpoints", "jaxllm", "sharding"),
    "jaxllm.commands.cache": ("checkpoints", "jaxllm", "sharding"),
    "jaxllm.commands.families": ("checkpoints", "jaxllm"),
    "jaxllm.commands.model_options": ("checkpoints", "jaxllm", "sharding"),
    "jaxllm.commands.plan_report": ("checkpoints", "jaxllm", "sharding"),
    "jaxllm.commands.warmup": ("checkpoints", "jaxllm", "sharding"),
    "jaxllm.evaluation.multiple_choice": ("checkpoints", "jaxllm", "sharding"),
    "bench": PACKAGES,
}
# What only some modules may import.
ONLY_IN = {
    "accelerate": ("bench.peers",),
    "gguf": ("checkpoints",),
    "jaxllm.generation.engine": ("bench", "jaxllm.generation.engine", "jaxllm.integrations", "jaxllm.llm"),
    "lm_eval": ("bench", "jaxllm.integrations"),
    "orbax": ("checkpoints",),
    "torch": ("bench.peers", "checkpoints.torch_files"),
}
# All that sharding/ needs besides the standard library.
SHARDING_MAY_IMPORT = ("jax", "numpy", "sharding")
# Host side: neither these nor what they import know of jax.
WITHOUT_JAX = (
    "jaxllm.buckets",
    "jaxllm.requests.checks",
    "jaxllm.config",
    "jaxllm.commands.interrupt",
    "jaxllm.decoder.mechanisms",
    "jaxllm.planning.presets",
    "jaxllm.commands.prompt_sources",
    "jaxllm.requests.prompts",
    "jaxllm.requests.outputs",
    "jaxllm.requests.sampling_params",
    "jaxllm.generation.scheduler",
    "jaxllm.commands.terminal",
    "jaxllm.scoring.trie",
    "sharding.absent_gpu",
    "sharding.padding",
)
DEVICE_LIBRARIES = ("flax", "jax", "jaxlib", "optax", "orbax")


class Imports(NamedTuple):
    """Dotted names that a module imports: anywhere in it, and while it is itself being imported."""

    all: frozenset[str]
    at_import: frozenset[str]


def within(name: str, prefixes: Iterable[str]) -> bool:
    """Is the dotted `name` one of `prefixes`, or inside one?"""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def module_name(path: Path) -> str:
    """`jaxllm/llm.py` -> `jaxllm.llm`; a package's `__init__.py` has the package's name."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(node: ast.Import | ast.ImportFrom, package: str, modules: Iterable[str]) -> Iterator[str]:
    """Names a statement in `package` imports; `from a import b` is `a.b` where that is one of `modules`, else `a`."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
    base = ".".join([*above, *([node.module] if node.module else [])])
    for alias in node.names:
        yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base


def runs_later(node: ast.AST) -> bool:
    """A function's body, and what only a type checker reads."""
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
        isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    )


def imports_of(source: str, package: str, modules: Iterable[str] = ()) -> Imports:
    """What `source`, a module in `package`, imports."""
    everything: set[str] = set()
    at_import: set[str] = set()

    def visit(node: ast.AST, later: bool) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = set(imported_names(node, package, modules))
            everything.update(names)
            at_import.update(() if later else names)
        for child in ast.iter_child_nodes(node):
            visit(child, later or runs_later(node))

    visit(ast.parse(source), False)
    return Imports(frozenset(everything), frozenset(at_import))


@cache
def imports() -> dict[str, Imports]:
    """Every module of the packages, and what it imports."""
    paths = {module_name(p.relative_to(ROOT)): p for package in PACKAGES for p in (ROOT / package).rglob("*.py")}
    return {
        name: imports_of(path.read_text(), name if path.stem == "__init__" else name.rpartition(".")[0], paths)
        for name, path in paths.items()
    }


def wrong_imports(module: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that no rule lets `module` import."""
    allowed = MAY_IMPORT[max((rule for rule in MAY_IMPORT if within(module, [rule])), key=len)]
    wrong = {name for name in names if within(name, PACKAGES) and not within(name, allowed)}
    for confined, homes in ONLY_IN.items():
        wrong |= {name for name in names if within(name, [confined]) and not within(module, homes)}
    return sorted(wrong)


def import_closure(module: str) -> set[str]:
    """What `module` imports, and what the repository's modules among that import, and so on."""
    reached: set[str] = set()
    pending = [module]
    while pending:
        names = imports()[pending.pop()].all - reached
        reached |= names
        pending += names & imports().keys()
    return reached


def loaded_first(module: str, names: Iterable[str]) -> set[str]:
    """The repository's modules that run before `module` has: those it imports, and the packages around them."""
    needed: set[str] = set()
    for name in names:
        parts = name.split(".")
        needed |= {".".join(parts[:i]) for i in range(1, len(parts) + 1)}
    return {name for name in needed & imports().keys() if not within(module, [name])}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_read(package: str) -> None:
    assert (ROOT / package / "__init__.py").exists(), f"{package}/__init__.py is missing"
    assert sum(within(module, [package]) for module in imports()) == len([*(ROOT / package).rglob("*.py")])


def test_modules_import_what_the_rules_let_them() -> None:
    wrong = {module: wrong_imports(module, names.all) for module, names in imports().items()}
    assert {module: names for module, names in wrong.items() if names} == {}


def test_sharding_imports_jax_alone() -> None:
    standard = sys.stdlib_module_names
    names = {name for module, found in imports().items() if within(module, ["sharding"]) for name in found.all}
    assert [n for n in sorted(names) if not within(n, SHARDING_MAY_IMPORT) and n.split(".")[0] not in standard] == []


@pytest.mark.parametrize("module", WITHOUT_JAX)
def test_host_modules_do_without_jax(module: str) -> None:
    if module not in imports():
        pytest.skip(f"there is no {module}")
    assert [name for name in sorted(import_closure(module)) if within(name, DEVICE_LIBRARIES)] == []


def test_no_module_needs_itself_to_be_imported() -> None:
    """Why `jaxllm/__init__.py` imports `jaxllm.llm` on demand: `checkpoints` runs it on the way to `jaxllm.config`."""
    graph = {module: loaded_first(module, names.at_import) for module, names in imports().items()}
    TopologicalSorter(graph).prepare()  # a CycleError names the modules


def test_imports_are_found_in_every_form() -> None:
    source = """
import jax.numpy as jnp, torch
from typing import TYPE_CHECKING
from jaxllm import LLM, config
from . import llama
from .. import load
from ..names import rule
if TYPE_CHECKING:
    from jaxllm.decoder.model import Decoder
def late():
    from .gemma import read
"""
    modules = {"jaxllm.config", "checkpoints.families.llama", "checkpoints.load"}
    found = imports_of(source, "checkpoints.families", modules)
    first = {"jax.numpy", "torch", "typing", "jaxllm", "jaxllm.config"}
    first |= {"checkpoints.families.llama", "checkpoints.load", "checkpoints.names"}
    assert found.at_import == first
    assert found.all == first | {"jaxllm.decoder.model", "checkpoints.families.gemma"}


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("sharding.mesh", "jaxllm.config"),
        ("sharding.mesh", "checkpoints"),
        ("jaxllm.decoder.model", "checkpoints.names"),
        ("jaxllm.generation.engine", "checkpoints.load"),
        ("jaxllm.decoder.model", "jaxllm.generation.engine"),
        ("jaxllm.llm", "bench.latency"),
        ("checkpoints.load", "jaxllm"),
        ("checkpoints.load", "jaxllm.generation.engine"),
        ("checkpoints.load", "torch"),
        ("bench.hellaswag", "torch.nn"),
    ],
)
def test_a_wrong_import_is_seen(module: str, name: str) -> None:
    assert wrong_imports(module, [name, "jax"]) == [name]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("checkpoints.load", "jaxllm.config"),
        ("jaxllm.llm", "checkpoints.load"),
        ("jaxllm.llm", "jaxllm.generation.engine"),
        ("bench.peers.transformers", "torch"),
        ("jaxllm.configs", "jaxllm.config"),
    ],
)
def test_a_right_import_is_let_pass(module: str, name: str) -> None:
    assert wrong_imports(module, [name]) == []
