r"""Marked lines: how a patch stands in a file so that it can be recognised and taken out byte for byte.

A patch only adds whole lines and comments whole lines out. Each of them carries the patch's name and a checksum:

    @moc_patched.train  # moc-ckpt+ steps 5f3a9c01
    # moc-ckpt- vision-import 0b5e77aa | from somewhere import something

So a file is a base (its lines without any of this) and hunks at places of the base. Both ways are exact:
`parse(render(base, hunks)) == (base, hunks)`. Files are handled as latin-1, which keeps every byte in any encoding that
Python takes for source; names and marks are ASCII.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["MARK", "Hunk", "Line", "Marked", "marked", "parse", "render", "split", "unmark", "without"]

#: What every marked line contains.
MARK = b"# moc-ckpt"

_BLANK = " \t\f"
_SPLIT = re.compile(r"(.*?)(\r\n|\n|\r|\Z)", re.DOTALL)
_ADDED = re.compile(r"([ \t\f]*)(.*?)  # moc-ckpt\+ ([a-z0-9-]+) ([0-9a-f]{8})[ \t]*", re.DOTALL)
_REMOVED = re.compile(r"([ \t\f]*)# moc-ckpt- ([a-z0-9-]+) ([0-9a-f]{8}) \| ?(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Line:
    """One physical line.

    Attributes:
        text: without its end.
        end: `\\n`, `\\r\\n`, `\\r`, or nothing for the last line of a file.
    """

    text: str
    end: str

    @property
    def indent(self) -> str:
        """The blanks in front."""
        return self.text[: len(self.text) - len(self.text.lstrip(_BLANK))]


@dataclass(frozen=True, slots=True)
class Hunk:
    """One place of one patch in one file.

    Attributes:
        patch: its name.
        at: index of the base line that the added lines stand before.
        added: lines, without their ends.
        removed: number of base lines, from `at` on, that are commented out.
    """

    patch: str
    at: int
    added: tuple[str, ...]
    removed: int = 0


@dataclass(frozen=True, slots=True)
class Marked:
    """One marked line as it was found.

    Attributes:
        patch: name of the patch.
        at: index in the base: of the next base line for an added one, of the line itself for a removed one.
        added: whether it was added.
        text: its content, without indentation and mark.
        intact: the checksum is that of the content.
        number: of the line in the file as it is, from 1.
    """

    patch: str
    at: int
    added: bool
    text: str
    intact: bool = field(default=True, compare=False)
    number: int = field(default=0, compare=False)


def split(data: bytes) -> list[Line]:
    """Returns the lines of a file, by the line ends that Python knows."""
    lines = [Line(match[1], match[2]) for match in _SPLIT.finditer(data.decode("latin-1"))]
    # The end of the text matches once more, after the last line end or as well as the last line.
    while lines and lines[-1] == Line("", ""):
        lines.pop()
    return lines


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode('latin-1')):08x}"


def parse(data: bytes) -> tuple[list[Line], list[Marked]]:
    """Takes a file apart.

    Args:
        data: the file.

    Returns:
        The base, and the marked lines in their order.
    """
    base: list[Line] = []
    found: list[Marked] = []
    for number, line in enumerate(split(data), 1):
        removed = _REMOVED.fullmatch(line.text)
        added = None if removed else _ADDED.fullmatch(line.text)
        if removed:
            indent, name, checksum, text = removed.groups()
            found.append(Marked(name, len(base), False, text, checksum == _checksum(text), number))
            base.append(Line(indent + text, line.end))
        elif added:
            _, text, name, checksum = added.groups()
            found.append(Marked(name, len(base), True, text, checksum == _checksum(text), number))
        else:
            base.append(line)
    return base, found


def without(data: bytes, names: Iterable[str]) -> bytes:
    """Returns a file without the lines of some patches; those of others, and edits around them, stay as they are."""
    gone = set(names)
    kept = []
    for line in split(data):
        removed = _REMOVED.fullmatch(line.text)
        added = None if removed else _ADDED.fullmatch(line.text)
        if removed and removed[2] in gone:
            line = Line(removed[1] + removed[4], line.end)
        elif added and added[3] in gone:
            continue
        kept.append(line)
    return _join(kept)


def unmark(data: bytes) -> bytes:
    """Returns a file with its patches but without marks: what is commented out is gone."""
    kept = []
    for line in split(data):
        if not _REMOVED.fullmatch(line.text):
            added = _ADDED.fullmatch(line.text)
            kept.append(Line(added[1] + added[2], line.end) if added else line)
    return _join(kept)


def marked(hunk: Hunk, base: Sequence[Line]) -> list[Marked]:
    """Returns the marked lines that a hunk consists of."""
    lines = [Marked(hunk.patch, hunk.at, True, text.lstrip(_BLANK)) for text in hunk.added]
    places = range(hunk.at, hunk.at + hunk.removed)
    return lines + [Marked(hunk.patch, at, False, base[at].text.lstrip(_BLANK)) for at in places]


def render(base: Sequence[Line], hunks: Iterable[Hunk]) -> bytes:
    """Puts hunks into a base.

    Args:
        base: lines without marks.
        hunks: in the order of patches; several at one place keep that order.

    Raises:
        ValueError: if two hunks remove the same line, or one stands behind a last line that has no end.
    """
    before: dict[int, list[Hunk]] = {}
    removed: dict[int, str] = {}
    for hunk in hunks:
        before.setdefault(hunk.at, []).append(hunk)
        for at in range(hunk.at, hunk.at + hunk.removed):
            if at in removed:
                raise ValueError(f"patches {removed[at]} and {hunk.patch} both remove line {at + 1}")
            removed[at] = hunk.patch
    result: list[Line] = []
    for at, line in enumerate((*base, None)):
        for hunk in before.get(at, ()):
            end = _end(base, at)
            if line is None and base and not base[-1].end:
                raise ValueError("the last line has no end")
            for text in hunk.added:
                code = text.lstrip(_BLANK)
                result.append(Line(f"{text}  # moc-ckpt+ {hunk.patch} {_checksum(code)}", end))
        if line is not None and at in removed:
            text = line.text.lstrip(_BLANK)
            mark = f"{line.indent}# moc-ckpt- {removed[at]} {_checksum(text)} |"
            result.append(Line(f"{mark} {text}" if text else mark, line.end))
        elif line is not None:
            result.append(line)
    return _join(result)


def _end(base: Sequence[Line], at: int) -> str:
    """Returns the line end that is used around a place."""
    around = (*base[at : at + 1], *base[max(at - 1, 0) : at])
    return next((line.end for line in around if line.end), "\n")


def _join(lines: Iterable[Line]) -> bytes:
    return "".join(line.text + line.end for line in lines).encode("latin-1")
