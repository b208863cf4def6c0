"""Reading every byte of a checkpoint and comparing it with every checksum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from moc_ckpt.errors import StorageError
from moc_ckpt.plan.coverage import coverage_problems, expert_problems
from moc_ckpt.state.fragment import itemsize
from moc_ckpt.storage.checkpoint import load_manifest, manifest_key, read_extra
from moc_ckpt.storage.checksum import crc32c
from moc_ckpt.storage.manifest import FragmentRow, Manifest
from moc_ckpt.storage.pack_read import PackReader
from moc_ckpt.storage.store import Store

__all__ = ["Problem", "VerifyReport", "verify"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a checkpoint.

    Attributes:
        file: path or URL, with the byte where that is known.
        what: what is wrong.
        unit: the unit concerned, or empty.
        tensor: name and state kind of the tensor concerned, or empty.
        expected: what the checkpoint's records say, e.g. a checksum in hex, or empty.
        found: what is there instead, or empty.
    """

    file: str
    what: str
    unit: str = ""
    tensor: str = ""
    expected: str = ""
    found: str = ""


@dataclass(slots=True)
class VerifyReport:
    """The result of `verify`.

    Attributes:
        tag: the checkpoint.
        step: engine.global_steps.
        packs: packs read.
        fragments: fragments compared with their checksum.
        nbytes: payload bytes read.
        problems: all that is wrong, in the order found.
    """

    tag: str
    step: int
    packs: int = 0
    fragments: int = 0
    nbytes: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if nothing is wrong."""
        return not self.problems


def verify(store: Store, tag: str, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Reads every byte of a checkpoint, also what it takes from older tags, and checks all of it.

    Memory: two sub-chunks (16 MiB).

    Args:
        store: the checkpoint root.
        tag: the checkpoint's name.
        progress: called with (bytes done, bytes in all) after every sub-chunk, from the calling thread.

    Returns:
        The report, which lists every problem.

    Raises:
        StorageError: if there is no readable manifest, so that there is nothing to compare with.
    """
    manifest = load_manifest(store, tag)
    report = VerifyReport(tag, manifest.step)
    where = store.locate(manifest_key(tag))
    declared = manifest.declared()
    for problem in coverage_problems(declared, manifest.spans()) + expert_problems(manifest.moe_layers, declared):
        report.problems.append(Problem(where, problem))
    for extra in manifest.extra.values():
        try:
            read_extra(store, extra)
        except StorageError as exc:
            report.problems.append(Problem(exc.where or store.locate(extra.path), exc.what))
    rows: dict[int, list[FragmentRow]] = {}
    for row in manifest.fragments:
        rows.setdefault(row.pack, []).append(row)
    total = sum(pack.nbytes for pack in manifest.packs)
    done = 0
    for index in range(len(manifest.packs)):

        def advance(count: int, base: int = done) -> None:
            if progress is not None:
                progress(base + count, total)

        _verify_pack(store, manifest, index, rows.get(index, []), report, advance)
        done += manifest.packs[index].nbytes
        advance(0, done)
    return report


class _Pending:
    """A fragment that is being read, sub-chunk by sub-chunk."""

    def __init__(self, row: FragmentRow, nbytes: int) -> None:
        self.row = row
        self.end = row.offset + nbytes
        self.crc = 0
        self.damaged = False


def _verify_pack(
    store: Store,
    manifest: Manifest,
    index: int,
    rows: list[FragmentRow],
    report: VerifyReport,
    advance: Callable[[int], None],
) -> None:
    pack = manifest.packs[index]
    reader = PackReader(store, pack.path, pack.nbytes)
    queue = [
        _Pending(row, (row.stop - row.start) * itemsize(manifest.tensors[row.tensor].dtype))
        for row in sorted(rows, key=lambda row: (row.offset, row.stop - row.start))
    ]
    report.packs += 1
    report.fragments += len(queue)
    report.nbytes += pack.nbytes
    active: list[_Pending] = []
    following = 0
    for offset, data in reader.scan():
        if isinstance(data, StorageError):
            end = min(offset + reader.grain, pack.nbytes)
        else:
            end = offset + len(data)
        while following < len(queue) and queue[following].row.offset < end:
            active.append(queue[following])
            following += 1
        touched = [item for item in active if item.end > offset]
        if isinstance(data, StorageError):
            report.problems += _damage(store, manifest, pack.path, data, touched)
            for item in touched:
                item.damaged = True
        else:
            for item in touched:
                item.crc = crc32c(data[max(item.row.offset - offset, 0) : item.end - offset], item.crc)
        for item in active:
            if item.end <= end:
                _conclude(store, manifest, item, report)
        active = [item for item in active if item.end > end]
        advance(end)
    for item in queue[following:]:  # fragments without bytes at the very end
        _conclude(store, manifest, item, report)


def _name(manifest: Manifest, row: FragmentRow) -> tuple[str, str]:
    tensor = manifest.tensors[row.tensor]
    return manifest.units[row.unit].name, f"{tensor.fqn} ({tensor.kind})"


def _damage(store: Store, manifest: Manifest, path: str, error: StorageError, touched: list[_Pending]) -> list[Problem]:
    """Returns one problem per fragment in the damaged bytes, or one for padding that belongs to none."""
    where = error.where or store.locate(path)
    if not touched:
        return [Problem(where, error.what)]
    # A fragment whose file is missing altogether is named once, not once per sub-chunk.
    return [Problem(where, error.what, *_name(manifest, item.row)) for item in touched if not item.damaged]


def _conclude(store: Store, manifest: Manifest, item: _Pending, report: VerifyReport) -> None:
    if item.damaged or item.crc == item.row.crc32c:
        return
    unit, tensor = _name(manifest, item.row)
    where = f"{store.locate(manifest.packs[item.row.pack].path)}, byte {item.row.offset:,} of the pack"
    report.problems.append(
        Problem(
            where,
            "a fragment's bytes are not those that were saved",
            unit,
            tensor,
            expected=f"{item.row.crc32c:08x}",
            found=f"{item.crc:08x}",
        )
    )
