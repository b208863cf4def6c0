"""What happens to files: bits flip, ends are cut off, files vanish, change places, turn to zeros, or grow."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Sequence
from pathlib import Path

__all__ = ["KINDS", "damage", "file_kind"]

KINDS = ("flip", "truncate", "delete", "swap", "zero", "append")
_FILES = (
    ("latest", re.compile(r"^latest$")),
    ("attempt", re.compile(r"^attempts/")),
    ("events", re.compile(r"^events/")),
    ("lock", re.compile(r"\.lock$|^lock$")),
    ("manifest", re.compile(r"/manifest\.json$")),
    ("part", re.compile(r"/parts/")),
    ("extra", re.compile(r"/extra/")),
    ("zarr.json", re.compile(r"/zarr\.json$")),
    ("dense pack", re.compile(r"\.dense/c/")),
    ("expert pack", re.compile(r"\.experts/c/")),
)


def file_kind(path: str) -> str:
    """Returns what a file of a checkpoint directory is."""
    return next((kind for kind, pattern in _FILES if pattern.search(path)), "other")


def _write(path: Path, data: bytes) -> None:
    """Replaces a file: the old one may be shared with the undamaged directory."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(data)
    new.replace(path)


def damage(root: Path, files: Sequence[str], rng: random.Random) -> list[tuple[str, str]]:
    """Damages one to three files of a directory.

    Files are chosen by kind first, so that the few small ones have their turn as often as the many.

    Returns:
        (kind of damage, path) of each file that was touched.
    """
    by_kind: dict[str, list[str]] = {}
    for name in files:
        by_kind.setdefault(file_kind(name), []).append(name)
    done: list[tuple[str, str]] = []
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        kind = rng.choice(KINDS)
        group = by_kind[rng.choice(sorted(by_kind))]
        name = rng.choice(group)
        if (root / name).exists():
            done += [(kind, touched) for touched in _apply(root, kind, name, group, files, rng)]
    return done


def _apply(
    root: Path, kind: str, name: str, group: Sequence[str], files: Sequence[str], rng: random.Random
) -> list[str]:
    path = root / name
    if kind == "delete":
        path.unlink()
        return [name]
    data = bytearray(path.read_bytes())
    if kind == "swap":
        # Most often with one of its kind: whole, with right checksums of its own, in the wrong place.
        others = [item for item in (group if rng.random() < 0.8 else files) if item != name and (root / item).exists()]
        if not others:
            return []
        other = rng.choice(others)
        theirs = (root / other).read_bytes()
        _write(root / other, bytes(data))
        _write(path, theirs)
        return [name, other] if theirs != data else []
    if kind == "append":
        data += rng.randbytes(rng.choice((1, 16, 4096)))
    elif not data:
        return []
    elif kind == "flip":
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del data[rng.choice((0, len(data) // 2, len(data) - 1, rng.randrange(len(data)))) :]
    else:
        start = rng.choice((0, rng.randrange(len(data))))
        stop = rng.choice((len(data), min(len(data), start + rng.choice((1, 512, 4096)))))
        data[start:stop] = bytes(stop - start)
    if bytes(data) == path.read_bytes():
        return []
    _write(path, bytes(data))
    return [name]


def copy_directory(source: Path, target: Path, files: Sequence[str]) -> None:
    """Copies a directory with hard links; what is appended to is copied."""
    made = set()
    for name in files:
        place = target / name
        if place.parent not in made:
            place.parent.mkdir(parents=True, exist_ok=True)
            made.add(place.parent)
        if file_kind(name) in ("events", "lock"):
            place.write_bytes((source / name).read_bytes())
        else:
            os.link(source / name, place)
