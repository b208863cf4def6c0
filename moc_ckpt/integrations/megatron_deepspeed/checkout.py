"""A Megatron-DeepSpeed source tree, read but not imported: functions are found by name and shape, never by line."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from moc_ckpt.errors import UnsupportedError

__all__ = ["Checkout", "find_checkout"]

Function = ast.FunctionDef | ast.AsyncFunctionDef

# What makes a directory a checkout; everything else is up to the concerns.
_MARKS = ("megatron/training.py", "megatron/checkpointing.py", "megatron/arguments.py")
_PARENTS = 3


class Checkout:
    """One source tree. Files are parsed once, when somebody asks.

    Args:
        root: the directory that holds the package `megatron`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._trees: dict[str, ast.Module | None] = {}

    def path(self, module: str) -> Path:
        """Returns the file of a module, which may not exist."""
        base = self.root.joinpath(*module.split("."))
        return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")

    def tree(self, module: str) -> ast.Module | None:
        """Returns the parsed source of a module; None if there is no such file.

        Raises:
            UnsupportedError: if it is not Python.
        """
        if module not in self._trees:
            path = self.path(module)
            try:
                self._trees[module] = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else None
            except (OSError, UnicodeDecodeError, SyntaxError) as error:
                raise UnsupportedError(
                    f"a file of the checkout cannot be read: {error}", where=str(path), fix="restore the file"
                ) from error
        return self._trees[module]

    def find(self, module: str, name: str) -> Function | None:
        """Returns a function or method by its qualified name, such as `CoreAttention.forward`; None if absent."""
        scope: ast.AST | None = self.tree(module)
        for part in name.split("."):
            if scope is None:
                return None
            kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            scope = next(
                (node for node in ast.iter_child_nodes(scope) if isinstance(node, kinds) and node.name == part), None
            )
        return scope if isinstance(scope, Function) else None

    def imports(self, module: str) -> frozenset[str]:
        """Returns the absolute names of all modules that a module imports anywhere."""
        return frozenset(self._imported(self.tree(module)))

    def files(self, package: str) -> Iterator[str]:
        """Yields the names of all modules below a package."""
        base = self.root.joinpath(*package.split("."))
        for path in sorted(base.rglob("*.py")):
            parts = path.relative_to(self.root).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @cached_property
    def options(self) -> frozenset[str]:
        """The option strings that `megatron.arguments` declares."""
        tree = self.tree("megatron.arguments")
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call)) if tree is not None else ()
        return frozenset(
            argument.value
            for call in calls
            if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"
            for argument in call.args
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
        )

    @staticmethod
    def _imported(tree: ast.Module | None) -> Iterator[str]:
        for node in ast.walk(tree) if tree is not None else ():
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module


def find_checkout(script: Path) -> Checkout | None:
    """Returns the checkout that a script belongs to; None if it belongs to none.

    Args:
        script: the training script; the tree is looked for in its directory and in a few above.
    """
    folder = script.resolve().parent
    for candidate in (folder, *list(folder.parents)[:_PARENTS]):
        if all((candidate / mark).is_file() for mark in _MARKS):
            checkout = Checkout(candidate)
            # NVIDIA's Megatron-LM has the same files and needs none of this.
            return checkout if "deepspeed" in checkout.imports("megatron.training") else None
    return None
