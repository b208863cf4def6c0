"""One checkpoint as a directory of its own, and what every export checks before it writes anything.

What is read is checked on the way: every sub-chunk by the pack's checksum, every fragment by the manifest's.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import numpy as np

from moc_ckpt.errors import CorruptionError, CoverageError, StorageError
from moc_ckpt.plan.coverage import coverage_problems, expert_problems
from moc_ckpt.state.fragment import itemsize
from moc_ckpt.state.unit import parse_expert_unit
from moc_ckpt.storage.attempts import ancestry
from moc_ckpt.storage.checkpoint import (
    ATTEMPTS,
    LATEST,
    load_manifest,
    manifest_key,
    new_save_id,
    pack_key,
    read_extra,
    save_prefix,
    write_extra,
)
from moc_ckpt.storage.manifest import FragmentRow, FragmentTable, Manifest, PackRecord, encode_manifest
from moc_ckpt.storage.output import new_directory
from moc_ckpt.storage.pack_layout import ALIGNMENT, plan_pack
from moc_ckpt.storage.pack_read import PackReader
from moc_ckpt.storage.pack_write import write_pack
from moc_ckpt.storage.store import Store
from moc_ckpt.storage.verify import explain_pack

__all__ = [
    "Exported",
    "Progress",
    "check_fragment",
    "check_source",
    "explained",
    "export_checkpoint",
    "fragment_bytes",
]

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""
_GRAIN = 64
_RANK = re.compile(r"/packs/rank_(\d{5,})\.(dense|experts)$")
_SLACK = 1 << 20


@dataclass(frozen=True, slots=True)
class Exported:
    """A checkpoint that was written.

    Attributes:
        tag: its name, here and there.
        step: engine.global_steps.
        url: where it is.
        packs: packs in it.
        nbytes: bytes of all its tensors.
        stored_bytes: bytes of its packs and extra files.
        older_tags: other tags of which packs were taken.
    """

    tag: str
    step: int
    url: str
    packs: int
    nbytes: int
    stored_bytes: int
    older_tags: tuple[str, ...]


# ---- what every export checks ----


def fragment_bytes(manifest: Manifest, row: FragmentRow) -> int:
    """Returns the bytes of a fragment."""
    return (row.stop - row.start) * itemsize(manifest.tensors[row.tensor].dtype)


def check_source(store: Store, manifest: Manifest, packs: Collection[int]) -> None:
    """Checks that a checkpoint is complete and that its packs are there with the right sizes, before any of it is read.

    Args:
        store: the checkpoint root.
        manifest: the checkpoint.
        packs: indices of the packs that are going to be read.

    Raises:
        CoverageError: if its fragments leave a hole or overlap.
        CorruptionError: if a pack is missing, truncated, or has a damaged index; names the file.
    """
    declared = manifest.declared()
    problems = coverage_problems(declared, manifest.spans()) + expert_problems(manifest.moe_layers, declared)
    if problems:
        raise CoverageError(
            f"the checkpoint is not complete: {problems[0]}",
            where=store.locate(manifest_key(manifest.tag)),
            fix="export another one (`moc-ckpt verify` tells all that is wrong with this one)",
        )
    for index in sorted(packs):
        with explained(store, manifest, index):
            PackReader(store, manifest.packs[index].path, manifest.packs[index].nbytes).check()


@contextmanager
def explained(store: Store, manifest: Manifest, pack: int) -> Iterator[None]:
    """Lets errors of reading a pack say which checkpoint the pack is of.

    Args:
        store: the checkpoint root.
        manifest: the checkpoint that needs the pack.
        pack: index of the pack.
    """
    try:
        yield
    except StorageError as error:
        trouble = explain_pack(store, manifest, manifest.packs[pack].path, error)
        raise type(error)(trouble.what, where=trouble.file, fix=trouble.fix) from error


def check_fragment(store: Store, manifest: Manifest, row: FragmentRow, crc32c: int) -> None:
    """Compares the checksum of a fragment's bytes with the manifest's.

    Raises:
        CorruptionError: if they differ.
    """
    if crc32c == row.crc32c:
        return
    tensor = manifest.tensors[row.tensor]
    raise CorruptionError(
        f"the bytes of {tensor.fqn} ({tensor.kind}) are not those that were saved: crc32c {crc32c:08x} instead of "
        f"{row.crc32c:08x}",
        where=f"{store.locate(manifest.packs[row.pack].path)}, byte {row.offset:,} of the pack",
        fix="export another checkpoint (`moc-ckpt inspect` lists them), or put the file back from a copy",
    )


# ---- a checkpoint of its own ----


@dataclass(frozen=True, slots=True)
class _Pack:
    """One pack of the copy: what the checkpoint needs of one pack of the source.

    Attributes:
        source: index of the source's pack.
        key: its directory in the copy.
        nbytes: its payload.
        rows: (position in the fragment table, fragment, first byte in the new pack), by ascending byte.
    """

    source: int
    key: str
    nbytes: int
    rows: tuple[tuple[int, FragmentRow, int], ...]


class _Source:
    """Gives `write_pack` the bytes of a new pack out of the old one."""

    def __init__(self, store: Store, manifest: Manifest, pack: _Pack, advance: Callable[[int], None]) -> None:
        record = manifest.packs[pack.source]
        self._reader = PackReader(store, record.path, record.nbytes)
        self._store, self._manifest, self._pack, self._advance = store, manifest, pack, advance
        self._spans = [(new, row.offset, fragment_bytes(manifest, row)) for _, row, new in pack.rows]
        self._starts = [new for new, _, _ in self._spans]

    def read_into(self, dst: np.ndarray, offset: int) -> None:
        """See `ByteSource`."""
        dst[:] = 0
        requests = []
        first = max(bisect_right(self._starts, offset) - 1, 0)
        for new, old, nbytes in self._spans[first:]:
            if new >= offset + len(dst):
                break
            low, high = max(new, offset), min(new + nbytes, offset + len(dst))
            if low < high:
                requests.append((old + low - new, dst[low - offset : high - offset]))
        with explained(self._store, self._manifest, self._pack.source):
            self._reader.read_batch(requests)
        self._advance(len(dst))


def export_checkpoint(store: Store, tag: str, url: str, progress: Progress = lambda done, total: None) -> Exported:
    """Writes one checkpoint as a directory of its own, which needs no older tag.

    What the checkpoint needs of every pack, those of older tags too, goes into a pack of the copy. The manifest comes
    last but for `latest`, so a copy that was cut off is no checkpoint. Records of the attempts that it continues are
    copied where they are readable, so that a run can continue it there as it could here.

    Memory: as `write_pack` and `PackReader`, a few sub-chunks of 16 MiB; each extra file as a whole.

    Args:
        store: the checkpoint root.
        tag: the checkpoint's name.
        url: path or URL of the copy's root; must not exist or be empty.
        progress: called after every sub-chunk.

    Raises:
        CoverageError: if the checkpoint is not complete.
        CorruptionError: if bytes that it needs are missing or damaged; names the file. The copy is removed.
        ConfigError: if the output is not empty.
        StorageError: if it cannot be written.
    """
    manifest = load_manifest(store, tag)
    save_id = new_save_id()
    packs = _plan(manifest, save_id)
    check_source(store, manifest, [pack.source for pack in packs])
    extras = sum(extra.nbytes for extra in manifest.extra.values())
    total = sum(pack.nbytes for pack in packs)
    need = sum(plan_pack(pack.nbytes).stored_bytes for pack in packs) + extras + _SLACK
    need += 2 * len(encode_manifest(manifest))
    with new_directory(url, store, need) as out:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        records = [_copy_pack(store, manifest, pack, out, advance) for pack in packs]
        rows = list(manifest.fragments)
        for index, pack in enumerate(packs):
            for position, row, offset in pack.rows:
                rows[position] = row._replace(pack=index, offset=offset)
        extra = {
            name: write_extra(out, tag, save_id, name, read_extra(store, record))
            for name, record in manifest.extra.items()
        }
        _copy_attempts(store, manifest.attempt, out)
        copy = msgspec.structs.replace(
            manifest, save_id=save_id, packs=records, fragments=FragmentTable.from_rows(rows), extra=extra, kept=False
        )
        out.write(manifest_key(tag), encode_manifest(copy))
        out.write(LATEST, tag.encode())
        older = sorted({manifest.packs[pack.source].path.partition("/")[0] for pack in packs} - {tag})
        return Exported(tag, copy.step, out.url, len(records), copy.nbytes, copy.stored_bytes, tuple(older))


def _plan(manifest: Manifest, save_id: str) -> list[_Pack]:
    """Lays out the packs of the copy. Those of the checkpoint's own save keep their numbers, others get new ones."""
    rows: dict[int, list[tuple[int, FragmentRow]]] = {}
    for position, row in enumerate(manifest.fragments):
        rows.setdefault(row.pack, []).append((position, row))
    own = f"{save_prefix(manifest.tag, manifest.save_id)}/"
    names: dict[int, tuple[int, str]] = {}
    for index, members in rows.items():
        match = _RANK.search(manifest.packs[index].path)
        experts = all(parse_expert_unit(manifest.units[row.unit].name) is not None for _, row in members)
        mine = match is not None and manifest.packs[index].path.startswith(own)
        names[index] = (
            int(match[1]) if mine and match else -1,
            match[2] if match else "experts" if experts else "dense",
        )
    following = max((rank for rank, _ in names.values()), default=-1) + 1
    packs = []
    for index in sorted(rows):
        rank, which = names[index]
        if rank < 0:
            rank, following = following, following + 1
        placed, at, unit = [], 0, -1
        for position, row in sorted(rows[index], key=lambda item: (item[1].offset, item[1].stop - item[1].start)):
            # As the saves do: each expert on a page of its own, fragments on cache lines.
            grain = ALIGNMENT if which == "experts" and row.unit != unit else _GRAIN
            at = -(-at // grain) * grain
            placed.append((position, row, at))
            at, unit = at + fragment_bytes(manifest, row), row.unit
        packs.append(_Pack(index, pack_key(manifest.tag, save_id, rank, which), at, tuple(placed)))
    return packs


def _copy_pack(store: Store, manifest: Manifest, pack: _Pack, out: Store, advance: Callable[[int], None]) -> PackRecord:
    entries = [(offset, fragment_bytes(manifest, row)) for _, row, offset in pack.rows]
    result = write_pack(out, pack.key, pack.nbytes, entries, _Source(store, manifest, pack, advance))
    for (_, row, _), crc in zip(pack.rows, result.crc32c, strict=True):
        check_fragment(store, manifest, row, crc)
    return PackRecord(pack.key, pack.nbytes, result.stored_bytes)


def _copy_attempts(store: Store, attempt: int, out: Store) -> None:
    """Copies the records of a timeline; where one is not readable a run that continues the copy begins a new one."""
    try:
        keys = [f"{ATTEMPTS}/{number:06d}.json" for number, _ in ancestry(store, attempt)]
        found = {key: store.read(key) for key in keys}
    except StorageError:
        return
    for key, data in sorted(found.items()):
        if data is not None:
            out.write(key, data)
