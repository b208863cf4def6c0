"""What a patch is: one concern, found by shape, with one reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moc_ckpt.patching.marks import Hunk

if TYPE_CHECKING:
    from moc_ckpt.patching.tree import Tree

__all__ = ["Missing", "NotNeeded", "Patch", "Target"]

#: Hunks by file, relative to the root of the tree.
Hunks = Mapping[str, tuple[Hunk, ...]]


class Missing(Exception):
    """The tree has not got the structure that a patch goes by.

    Args:
        file: relative to the root.
        function: qualified name; empty for the file as a whole.
        expected: what was looked for, without a full stop.
    """

    def __init__(self, file: str, function: str, expected: str) -> None:
        self.file = file
        self.function = function
        self.expected = expected
        super().__init__(file, function, expected)

    def __str__(self) -> str:
        where = f"{self.file}, {self.function}" if self.function else self.file
        return f"{where}: expected {self.expected}"


class NotNeeded(Exception):
    """The tree has not got the problem that a patch clears. The message says why."""


@dataclass(frozen=True)
class Patch:
    """One obstacle cleared, or one place where the plugin comes in.

    Attributes:
        name: for the command line and the marks; that of the launcher's shim or hook of the same concern.
        why: what happens without it.
        does: what it changes, and where.
        since: from which version on it is needed; empty where that means nothing.
        imports_us: the patched tree needs moc_ckpt to run.
        find: returns the hunks for a tree.

            It raises Missing if the structure is not there and NotNeeded if the problem is not.
    """

    name: str
    why: str
    does: str
    since: str
    imports_us: bool
    find: Callable[[Tree], Hunks]


@dataclass(frozen=True)
class Target:
    """A project that is patched.

    Attributes:
        name: for the command line.
        package: the directory below the root in which marks are looked for.
        required: files, relative to the root, that make a directory a tree of this project.
        patches: in the order in which they share a place.
    """

    name: str
    package: str
    required: tuple[str, ...]
    patches: tuple[Patch, ...]
