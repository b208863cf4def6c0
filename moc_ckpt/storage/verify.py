"""Reading every byte of a checkpoint and comparing it with every checksum."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from moc_ckpt.errors import StorageError
from moc_ckpt.plan.coverage import coverage_problems, expert_problems
from moc_ckpt.state.fragment import itemsize
from moc_ckpt.state.unit import parse_expert_unit
from moc_ckpt.state.unit_text import compact_units
from moc_ckpt.storage.checkpoint import list_tags, load_manifest, manifest_key, read_extra
from moc_ckpt.storage.checksum import crc32c
from moc_ckpt.storage.manifest import FragmentRow, Manifest
from moc_ckpt.storage.pack_read import PackReader
from moc_ckpt.storage.store import Store

__all__ = [
    "PackTrouble",
    "Problem",
    "VerifyReport",
    "explain_pack",
    "first_damage",
    "record_problems",
    "verify",
    "verify_pack",
]

_MOST_TAGS = 8


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a checkpoint.

    Attributes:
        file: path or URL, with the byte where that is known.
        what: what is wrong.
        unit: the unit concerned, or empty; several units as `compact_units` writes them.
        tensor: name and state kind of the tensor concerned; empty if there is none or several.
        expected: what the checkpoint's records say, e.g. a checksum in hex, or empty.
        found: what is there instead, or empty.
        units: all units concerned.
        fix: what can be done about it.
    """

    file: str
    what: str
    unit: str = ""
    tensor: str = ""
    expected: str = ""
    found: str = ""
    units: tuple[str, ...] = ()
    fix: str = ""


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

    Memory: two sub-chunks (32 MiB at most).

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
    report = VerifyReport(tag, manifest.step, problems=record_problems(store, manifest))
    for extra in manifest.extra.values():
        try:
            read_extra(store, extra)
        except StorageError as exc:
            report.problems.append(Problem(exc.where or store.locate(extra.path), exc.what, fix=exc.fix))
    rows: dict[int, list[FragmentRow]] = {}
    for row in manifest.fragments:
        rows.setdefault(row.pack, []).append(row)
    total = sum(pack.nbytes for pack in manifest.packs)
    done = 0
    others = _Others(store, tag)
    for index in range(len(manifest.packs)):

        def advance(count: int, base: int = done) -> None:
            if progress is not None:
                progress(base + count, total)

        _PackCheck(store, manifest, index, rows.get(index, []), report, others).run(advance)
        done += manifest.packs[index].nbytes
        advance(0, done)
    return report


def first_damage(store: Store, manifest: Manifest) -> str:
    """Looks whether all files of a checkpoint are there, with the right sizes; reads next to nothing of them.

    Args:
        store: the checkpoint root.
        manifest: the checkpoint.

    Returns:
        The first thing that is wrong, with its place; empty if nothing is. Bytes that have changed do not show.
    """
    for pack in manifest.packs:
        try:
            PackReader(store, pack.path, pack.nbytes).check()
        except StorageError as error:
            trouble = explain_pack(store, manifest, pack.path, error)
            return f"{trouble.what} ({trouble.file})"
    for extra in manifest.extra.values():
        if not store.exists(extra.path):
            return f"a file is missing ({store.locate(extra.path)})"
    return ""


def record_problems(store: Store, manifest: Manifest) -> list[Problem]:
    """Returns what is wrong with a manifest by itself: holes (I1), and versions that cannot go together (I3)."""
    where = store.locate(manifest_key(manifest.tag))
    declared = manifest.declared()
    found = coverage_problems(declared, manifest.spans()) + expert_problems(manifest.moe_layers, declared)
    problems = [Problem(where, problem) for problem in found]
    for unit in manifest.units:
        # Dense state is of one version, and no expert is newer than it.
        if parse_expert_unit(unit.name) is None and unit.version != manifest.version:
            what = f"dense state of step {unit.step} of attempt {unit.attempt} in a checkpoint of step {manifest.step}"
        elif unit.step > manifest.step:
            what = f"an expert of step {unit.step}, which is after the checkpoint's step {manifest.step}"
        else:
            continue
        problems.append(Problem(where, what, unit.name))
    return problems


def verify_pack(
    store: Store,
    manifest: Manifest,
    index: int,
    rows: list[FragmentRow],
    progress: Callable[[int], None] = lambda done: None,
) -> list[Problem]:
    """Reads one pack of a checkpoint and compares fragments in it; otherwise as `verify`.

    Args:
        store: the checkpoint root.
        manifest: the checkpoint.
        index: number of the pack.
        rows: the fragments to compare.
        progress: called with the bytes done.
    """
    report = VerifyReport(manifest.tag, manifest.step)
    _PackCheck(store, manifest, index, rows, report, _Others(store, manifest.tag)).run(progress)
    return report.problems


@dataclass(frozen=True, slots=True)
class PackTrouble:
    """Why a pack cannot be read, for people.

    Attributes:
        what: the error; for a pack of another save it names the checkpoint that the pack is of, and says if that
            checkpoint, its save or the pack is gone altogether.
        file: path or URL, with the byte where that is known.
        fix: what can be done about it.
        gone: nothing at all is left of the pack.
    """

    what: str
    file: str
    fix: str
    gone: bool


def explain_pack(store: Store, manifest: Manifest, path: str, error: StorageError) -> PackTrouble:
    """Says what is wrong with a pack, and which checkpoint it came from.

    Lists the pack's directory, so it is for failures only.

    Args:
        store: the checkpoint root.
        manifest: the checkpoint that needs the pack.
        path: the pack's directory, relative to the root.
        error: what reading it raised.
    """
    tag, _, inside = path.partition("/")
    save_id, _, pack = inside.partition("/")
    gone = not store.list(path)
    if tag == manifest.tag and (save_id == manifest.save_id or not pack):
        return PackTrouble(error.what, error.where or store.locate(path), error.fix, gone)
    owner = f"an earlier save of it ({save_id})" if tag == manifest.tag else f"checkpoint {tag}"
    needs = f"checkpoint {manifest.tag} needs packs of {owner}"
    if not gone:
        what = f"{needs}, one of which is damaged: {error.what}"
        return PackTrouble(what, error.where or store.locate(path), error.fix, gone)
    place, lost = path, f"which has lost the pack {path.rpartition('/')[2]}"
    if not store.list(f"{tag}/{save_id}"):
        place, lost = (tag, "which is gone") if not store.list(tag) else (f"{tag}/{save_id}", "which are gone")
    return PackTrouble(
        f"{needs}, {lost}",
        store.locate(path),
        f"put {store.locate(place)} back from a copy, or use a checkpoint that does not need it (`moc-ckpt inspect` "
        "names the older tags that a checkpoint needs); remove checkpoints with `storage.keep_last`, which keeps "
        "what others need, and not by hand",
        gone,
    )


class _Pending:
    """A fragment that is being read, sub-chunk by sub-chunk."""

    def __init__(self, row: FragmentRow, nbytes: int) -> None:
        self.row = row
        self.end = row.offset + nbytes
        self.crc = 0
        self.damaged = False


class _PackCheck:
    """Reads one pack and adds what is wrong with it to the report."""

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        index: int,
        rows: list[FragmentRow],
        report: VerifyReport,
        others: _Others,
    ) -> None:
        self._store = store
        self._manifest = manifest
        self._pack = manifest.packs[index]
        self._reader = PackReader(store, self._pack.path, self._pack.nbytes)
        self._report = report
        self._others = others
        # Errors about a file as a whole, which every sub-chunk in it meets: one problem with all their units.
        self._whole: dict[tuple[str, str], tuple[PackTrouble, list[_Pending]]] = {}
        self._queue = [
            _Pending(row, (row.stop - row.start) * itemsize(manifest.tensors[row.tensor].dtype))
            for row in sorted(rows, key=lambda row: (row.offset, row.stop - row.start))
        ]

    def run(self, advance: Callable[[int], None]) -> None:
        """Reads it all; `advance` is called with the bytes read so far."""
        report, queue = self._report, self._queue
        report.packs += 1
        report.fragments += len(queue)
        report.nbytes += self._pack.nbytes
        active: list[_Pending] = []
        following = 0
        for offset, data in self._reader.scan():
            if isinstance(data, StorageError):
                end = min(offset + self._reader.grain, self._pack.nbytes)
            else:
                end = offset + len(data)
            while following < len(queue) and queue[following].row.offset < end:
                active.append(queue[following])
                following += 1
            touched = [item for item in active if item.end > offset]
            if isinstance(data, StorageError):
                self._damage(data, touched)
                for item in touched:
                    item.damaged = True
            else:
                for item in touched:
                    item.crc = crc32c(data[max(item.row.offset - offset, 0) : item.end - offset], item.crc)
            for item in active:
                if item.end <= end:
                    self._conclude(item)
            active = [item for item in active if item.end > end]
            advance(end)
        for item in queue[following:]:  # fragments without bytes at the very end
            self._conclude(item)
        for trouble, items in self._whole.values():
            report.problems.append(self._about_file(trouble, items))

    def _damage(self, error: StorageError, touched: list[_Pending]) -> None:
        """Notes one problem per fragment in the damaged bytes, or one for padding that belongs to none."""
        where = error.where or self._store.locate(self._pack.path)
        fresh = [item for item in touched if not item.damaged]
        key = (where, error.what)
        if key in self._whole:
            self._whole[key][1].extend(fresh)
            return
        trouble = explain_pack(self._store, self._manifest, self._pack.path, error)
        if trouble.gone or ", byte " not in where:  # errors about a part of a file give its first byte
            self._whole[key] = (trouble, fresh)
            return
        if not touched:
            self._report.problems.append(Problem(trouble.file, trouble.what, fix=trouble.fix))
        for item in fresh:
            unit, tensor = self._name(item.row)
            self._report.problems.append(
                Problem(trouble.file, trouble.what, unit, tensor, units=(unit,), fix=trouble.fix)
            )

    def _about_file(self, trouble: PackTrouble, items: list[_Pending]) -> Problem:
        names = {self._name(item.row) for item in items}
        units = tuple(sorted({unit for unit, _ in names}, key=lambda unit: (parse_expert_unit(unit) or (-1, -1), unit)))
        tensor = next(iter(names))[1] if len(names) == 1 else ""
        fix = trouble.fix
        if trouble.gone:
            fix = f"{fix}; {self._others.without(self._pack.path)}"
        return Problem(trouble.file, trouble.what, compact_units(units), tensor, units=units, fix=fix)

    def _conclude(self, item: _Pending) -> None:
        if item.damaged or item.crc == item.row.crc32c:
            return
        unit, tensor = self._name(item.row)
        error = StorageError(
            "a fragment's bytes are not those that were saved",
            where=f"{self._store.locate(self._pack.path)}, byte {item.row.offset:,} of the pack",
        )
        trouble = explain_pack(self._store, self._manifest, self._pack.path, error)
        expected, found = f"{item.row.crc32c:08x}", f"{item.crc:08x}"
        self._report.problems.append(
            Problem(trouble.file, trouble.what, unit, tensor, expected, found, units=(unit,), fix=trouble.fix)
        )

    def _name(self, row: FragmentRow) -> tuple[str, str]:
        tensor = self._manifest.tensors[row.tensor]
        return self._manifest.units[row.unit].name, f"{tensor.fqn} ({tensor.kind})"


class _Others:
    """The other checkpoints of a directory, looked at only if a pack is gone."""

    def __init__(self, store: Store, tag: str) -> None:
        self._store = store
        self._tag = tag
        self._manifests: list[Manifest] | None = None

    def without(self, path: str) -> str:
        """Says which of them do not need the save that a pack is of, the newest first."""
        if self._manifests is None:
            self._manifests = []
            for tag in list_tags(self._store):
                if tag != self._tag:
                    with suppress(StorageError):
                        self._manifests.append(load_manifest(self._store, tag))
            self._manifests.sort(key=lambda manifest: manifest.version, reverse=True)
        save = "/".join(path.split("/")[:2]) + "/"
        tags = [item.tag for item in self._manifests if not any(pack.startswith(save) for pack in item.pack_paths)]
        shown = ", ".join(tags[:_MOST_TAGS]) + (", …" if len(tags) > _MOST_TAGS else "")
        return f"checkpoints that do not need it: {shown}" if tags else "no other checkpoint here does without it"
