"""A source tree: which patches are in it, which could be, and what changes when they come or go."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from moc_ckpt.errors import ConfigError, StorageError, UnsupportedError
from moc_ckpt.patching.files import refuse
from moc_ckpt.patching.marks import MARK, Hunk, Line, Marked, marked, parse, render, unmark, without
from moc_ckpt.patching.patch import Missing, NotNeeded, Patch, Target
from moc_ckpt.patching.source import Source

__all__ = ["APPLICABLE", "APPLIED", "HALF_APPLIED", "NOT_FOUND", "NOT_NEEDED", "Change", "State", "Tree"]

APPLIED = "applied"
APPLICABLE = "applicable"
NOT_NEEDED = "not needed"
NOT_FOUND = "structure not found"
HALF_APPLIED = "half-applied"

_MARKED_ROW = "not a patch of this version"


@dataclass(frozen=True, slots=True)
class State:
    """One patch in one tree.

    Attributes:
        name: of the patch.
        status: one of `applied`, `applicable`, `not needed`, `structure not found`, `half-applied`.
        note: why, in one line; may be empty.
        files: that it stands in, or would; relative to the root.
        missing: file, function and expected structure, where something was not found.
        problems: what is wrong with a half-applied one, each with its place.
    """

    name: str
    status: str
    note: str = ""
    files: tuple[str, ...] = ()
    missing: Missing | None = None
    problems: tuple[str, ...] = ()

    @property
    def bad(self) -> bool:
        """Tells whether somebody has to look at it."""
        return self.status in (NOT_FOUND, HALF_APPLIED)


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of a tree.

    Attributes:
        names: of the patches that come or go.
        before: files as they are, by name relative to the root.
        after: the same files as they become.
    """

    names: tuple[str, ...]
    before: Mapping[str, bytes]
    after: Mapping[str, bytes]

    def diff(self, *, plain: bool = False) -> bytes:
        """Returns it as a unified diff, for `patch -p1` and `git apply`.

        Args:
            plain: without marks, as one would write it by hand: for a pull request. It cannot be reverted by its marks.
        """
        show = unmark if plain else bytes
        return b"".join(_diff(file, show(self.before[file]), show(self.after[file])) for file in self.after)


class Tree:
    """One tree of a target, read and not imported. Files are read once.

    Args:
        target: whose tree it is.
        root: its directory.

    Raises:
        ConfigError: if it is no tree of the target.
    """

    def __init__(self, target: Target, root: Path) -> None:
        if not root.is_dir():
            raise ConfigError("there is no such directory", where=str(root), fix=f"name a tree of {target.name}")
        absent = [file for file in target.required if not (root / file).is_file()]
        if absent:
            raise ConfigError(
                f"this is no tree of {target.name}: there is no {', '.join(absent)}",
                where=str(root),
                fix=f"name the directory that holds {target.package}/",
            )
        self.target = target
        self.root = root
        self._data: dict[str, bytes] = {}
        self._sources: dict[str, Source] = {}
        self._states: dict[str, State] = {}

    # ---------------------------------------------------------------------------------------------- for patches

    def has(self, file: str) -> bool:
        """Tells whether there is such a file."""
        return (self.root / file).is_file()

    def source(self, file: str) -> Source:
        """Returns a file as it is without any patch.

        Raises:
            Missing: if there is no such file, or it is not Python.
        """
        if file not in self._sources:
            if not self.has(file):
                raise Missing(file, "", "this file")
            self._sources[file] = Source(file, self._parsed(file)[0])
        return self._sources[file]

    def files(self, below: str, containing: bytes) -> list[str]:
        """Returns the Python files below a directory that contain some bytes, relative to the root."""
        found = []
        for path in sorted((self.root / below).rglob("*.py")):
            if path.is_file():
                file = path.relative_to(self.root).as_posix()
                if containing in self._read(file):
                    found.append(file)
        return found

    # ---------------------------------------------------------------------------------------------- states

    def names(self, only: Collection[str]) -> tuple[str, ...]:
        """Returns the names of patches, in their order: those asked for, else all, also such as only marks name.

        Raises:
            ConfigError: if there is no patch of a name.
        """
        known = [patch.name for patch in self.target.patches]
        others = sorted({line.patch for lines in self._marks.values() for line in lines} - set(known))
        wrong = [name for name in only if name not in (*known, *others)]
        if wrong:
            raise ConfigError(
                f"there is no patch {wrong[0]!r} for {self.target.name}",
                where="--only",
                fix=f"known are {', '.join(known)}",
            )
        return tuple(name for name in (*known, *others) if not only or name in only)

    def states(self, only: Collection[str] = ()) -> list[State]:
        """Returns what is the matter with each patch."""
        return [self._state(name) for name in self.names(only)]

    def _state(self, name: str) -> State:
        if name not in self._states:
            self._states[name] = self._look(name)
        return self._states[name]

    def _look(self, name: str) -> State:
        present = {file: [line for line in lines if line.patch == name] for file, lines in self._marks.items()}
        present = {file: lines for file, lines in present.items() if lines}
        files = tuple(present)
        patch = self._patches.get(name)
        if patch is None:
            where = tuple(f"{file}:{lines[0].number}: {_MARKED_ROW}" for file, lines in present.items())
            return State(name, HALF_APPLIED, _MARKED_ROW, files, None, where)
        try:
            hunks = self._hunks(patch)
        except Missing as missing:
            if not present:
                return State(name, NOT_FOUND, str(missing), (), missing)
            return State(name, HALF_APPLIED, "its place was edited", files, missing, (str(missing),))
        except NotNeeded as reason:
            if not present:
                return State(name, NOT_NEEDED, str(reason))
            return State(name, HALF_APPLIED, "its place was edited", files, None, (str(reason),))
        if not present:
            unmarked = self._unmarked(hunks)
            if unmarked:
                return State(name, HALF_APPLIED, "its lines are there without marks", tuple(hunks), None, unmarked)
            return State(name, APPLICABLE, "", tuple(hunks))
        problems = tuple(self._problems(hunks, present))
        if problems:
            return State(name, HALF_APPLIED, "not as this version writes it", files, None, problems)
        return State(name, APPLIED, "", files)

    def _problems(self, hunks: Mapping[str, tuple[Hunk, ...]], present: Mapping[str, list[Marked]]) -> Iterator[str]:
        """Yields how the marked lines of a patch differ from what it would write."""
        for file in dict.fromkeys((*hunks, *present)):
            base = self._parsed(file)[0]
            wanted = [line for hunk in hunks.get(file, ()) for line in marked(hunk, base)]
            wanted.sort(key=lambda line: line.at)
            found = present.get(file, [])
            for line in found:
                if not line.intact:
                    yield f"{file}:{line.number}: this line was edited"
            matcher = difflib.SequenceMatcher(None, wanted, found, autojunk=False)
            for _, start, stop, first, last in (code for code in matcher.get_opcodes() if code[0] != "equal"):
                for line in wanted[start:stop]:
                    what = "a line is missing" if line.added else "a line is not commented out"
                    yield f"{file}: {what}: {line.text}"
                for line in found[first:last]:
                    if line.intact:
                        yield f"{file}:{line.number}: not expected here: {line.text}"

    def _unmarked(self, hunks: Mapping[str, tuple[Hunk, ...]]) -> tuple[str, ...]:
        """Returns places where the lines that a patch would add stand already, without marks."""
        found = []
        for file, several in hunks.items():
            base = self._parsed(file)[0]
            for hunk in several:
                added = [text.strip() for text in hunk.added]
                # Unmarked they move the place itself, so they are looked for around it.
                first = max(hunk.at - len(added), 0)
                around = [line.text.strip() for line in base[first : hunk.at + len(added)]]
                starts = range(len(around) - len(added) + 1) if added else ()
                at = next((start for start in starts if around[start : start + len(added)] == added), None)
                if at is not None:
                    found.append(f"{file}:{first + at + 1}: the same lines without marks")
        return tuple(found)

    # ---------------------------------------------------------------------------------------------- changes

    def apply(self, only: Collection[str] = ()) -> Change:
        """Returns what the applicable ones of the patches change; writes nothing.

        Args:
            only: names; all if empty.

        Raises:
            UnsupportedError: if one that was asked for by name does not find its structure.
            StorageError: if one is half-applied, or a file may not be replaced.
        """
        states = self.states(only)
        for state in states:
            if state.status == HALF_APPLIED:
                raise StorageError(
                    f"patch {state.name} is half-applied: {'; '.join(state.problems)}",
                    where=str(self.root),
                    fix=f"--revert --only {state.name}, then apply it again; nothing was changed",
                )
            if only and state.missing is not None:
                raise UnsupportedError(
                    f"patch {state.name} does not find its structure: {state.missing}",
                    where=str(self.root),
                    fix="nothing was changed; leave the patch out or use a tree that has the structure",
                )
        coming = tuple(state.name for state in states if state.status == APPLICABLE)
        wanted = [name for name in self._patches if name in coming]
        staying = [name for name in self._patches if self._state(name).status == APPLIED]
        touched = {file for name in wanted for file in self._hunks(self._patches[name])}
        after = {}
        for file in sorted(touched):
            self._only_ours(file, (*wanted, *staying))
            base = self._parsed(file)[0]
            hunks = [
                hunk
                for name in self._patches
                if name in wanted or name in staying
                for hunk in self._hunks(self._patches[name]).get(file, ())
            ]
            after[file] = render(base, hunks)
            self._verify(file, base, hunks, after[file])
        return self._change(coming, after)

    def revert(self, only: Collection[str] = ()) -> Change:
        """Returns what changes when patches go; writes nothing.

        Raises:
            StorageError: if a line to be taken out was edited, what is left would not be Python, or a file may not be
                replaced.
        """
        names = self.names(only)
        after = {}
        gone: set[str] = set()
        for file, lines in self._marks.items():
            going = [line for line in lines if line.patch in names]
            if not going:
                continue
            for line in going:
                if not line.intact:
                    raise StorageError(
                        f"a line of patch {line.patch} was edited, and the edit would be lost",
                        where=f"{self.root / file}:{line.number}",
                        fix="take the comment that marks the line away to keep it, or the line; nothing was changed",
                    )
            gone |= {line.patch for line in going}
            after[file] = without(self._read(file), names)
            if _is_python(file, self._read(file)) and not _is_python(file, after[file]):
                raise StorageError(
                    "without the patch the file would not be Python: code around the patch was edited",
                    where=str(self.root / file),
                    fix="look at the lines that are marked with moc-ckpt; nothing was changed",
                )
        return self._change(tuple(name for name in names if name in gone), after)

    def _change(self, names: tuple[str, ...], after: dict[str, bytes]) -> Change:
        for file in after:
            refuse(self.root, file)
        return Change(names, {file: self._read(file) for file in after}, after)

    def _only_ours(self, file: str, names: Iterable[str]) -> None:
        """Refuses a file with marks of patches that are not going to be written again as they are."""
        for line in self._marks.get(file, ()):
            if line.patch not in names:
                raise StorageError(
                    f"patch {line.patch} is half-applied in this file",
                    where=f"{self.root / file}:{line.number}",
                    fix=f"--revert --only {line.patch} first; nothing was changed",
                )

    def _verify(self, file: str, base: list[Line], hunks: list[Hunk], data: bytes) -> None:
        """Makes sure that a file can be read back and is still Python, before anything is written."""
        names = {hunk.patch for hunk in hunks}
        again, lines = parse(data)
        assert again == base and all(line.intact for line in lines), file
        assert without(data, names) == _bytes(base), file
        # It may be newer than this interpreter.
        assert _is_python(file, data) or not _is_python(file, _bytes(base)), file

    # ---------------------------------------------------------------------------------------------- reading

    @cached_property
    def _patches(self) -> dict[str, Patch]:
        return {patch.name: patch for patch in self.target.patches}

    @cached_property
    def _found(self) -> dict[str, Mapping[str, tuple[Hunk, ...]] | Exception]:
        return {}

    def _hunks(self, patch: Patch) -> Mapping[str, tuple[Hunk, ...]]:
        if patch.name not in self._found:
            try:
                self._found[patch.name] = patch.find(self)
            except (Missing, NotNeeded) as reason:
                self._found[patch.name] = reason
        found = self._found[patch.name]
        if isinstance(found, Exception):
            raise found
        return found

    @cached_property
    def _marks(self) -> dict[str, list[Marked]]:
        """Marked lines of all files that have any."""
        marks = {file: self._parsed(file)[1] for file in self.files(self.target.package, MARK)}
        return {file: lines for file, lines in marks.items() if lines}

    def _parsed(self, file: str) -> tuple[list[Line], list[Marked]]:
        return parse(self._read(file))

    def _read(self, file: str) -> bytes:
        if file not in self._data:
            try:
                self._data[file] = (self.root / file).read_bytes()
            except OSError as error:
                raise StorageError(
                    f"it cannot be read: {error.strerror}", where=str(self.root / file), fix="check the file"
                ) from error
        return self._data[file]


def _bytes(lines: Iterable[Line]) -> bytes:
    return "".join(line.text + line.end for line in lines).encode("latin-1")


def _is_python(file: str, data: bytes) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compile(data, file, "exec", dont_inherit=True)
        except (SyntaxError, ValueError):
            return False
    return True


def _diff(file: str, before: bytes, after: bytes) -> bytes:
    # Only \n ends a line of a diff.
    old, new = (data.decode("latin-1").split("\n") for data in (before, after))
    lines = difflib.unified_diff(_ended(old), _ended(new), f"a/{file}", f"b/{file}")
    text = "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)
    return text.encode("latin-1")


def _ended(parts: list[str]) -> list[str]:
    return [part + "\n" for part in parts[:-1]] + parts[-1:] * bool(parts[-1])
