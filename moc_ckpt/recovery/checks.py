"""What of a checkpoint cannot be read, found without reading tensors into place: file by file, or byte by byte."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from moc_ckpt.errors import CorruptionError
from moc_ckpt.state.fragment import itemsize
from moc_ckpt.storage.checkpoint import read_extra
from moc_ckpt.storage.manifest import FragmentRow, Manifest
from moc_ckpt.storage.pack_read import Fault, PackReader
from moc_ckpt.storage.store import Store
from moc_ckpt.storage.verify import explain_pack, record_problems, verify_pack

__all__ = ["Checker", "Damage"]

_CHECKS_AT_ONCE = 8


class Damage(NamedTuple):
    """What cannot be read of one pack, or of small state.

    Attributes:
        pack: path of the pack; empty for small state.
        units: the units that are needed and not whole there.
        what: what is wrong.
        where: path or URL of the file.
        fix: what can be done about it.
    """

    pack: str
    units: tuple[str, ...]
    what: str
    where: str
    fix: str

    def error(self) -> CorruptionError:
        """Returns the error that says so."""
        return CorruptionError(self.what, where=self.where, fix=self.fix)


class Checker:
    """Finds what a load of a checkpoint would find damaged; looks at every pack once. Not thread-safe.

    A load on as many ranks as saved reads all of a checkpoint and so finds the same. On other ranks it reads the same
    bytes, but of the ranks' small files only the first.

    Args:
        store: the checkpoint root.
        contents: read every byte; else only files' presence, sizes, and the indexes of packs.
        progress: called with (bytes done, bytes in all) while contents are read.
    """

    def __init__(
        self, store: Store, *, contents: bool = False, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        self._store = store
        self._contents = contents
        self._progress = progress
        self._faults: dict[str, Sequence[Fault]] = {}
        # Of each pack that was read, the units whose fragments were compared.
        self._compared: dict[str, set[str]] = {}

    def check(self, manifest: Manifest) -> list[Damage]:
        """Returns what is damaged and was not told before.

        As a load does it looks at small state first, and at packs only if that is whole.

        Raises:
            StorageError: if the store cannot be read.
        """
        if damage := self._small_state(manifest):
            return damage
        return self._read(manifest) if self._contents else self._look(manifest)

    def _small_state(self, manifest: Manifest) -> list[Damage]:
        damage = []
        for extra in manifest.extra.values():
            try:
                if self._contents:
                    read_extra(self._store, extra)
                elif not self._store.exists(extra.path):
                    raise CorruptionError("a file is missing", where=self._store.locate(extra.path))
            except CorruptionError as error:
                damage.append(Damage("", (), error.what, error.where, error.fix))
        if self._contents:
            # A manifest that contradicts itself was never committed by this package.
            damage += [
                Damage("", (), item.what, item.file, item.fix) for item in record_problems(self._store, manifest)
            ]
        return damage

    def _look(self, manifest: Manifest) -> list[Damage]:
        """Looks at the objects of the packs, not at the payload."""
        fresh = [pack for pack in manifest.packs if pack.path not in self._faults]
        with ThreadPoolExecutor(_CHECKS_AT_ONCE, thread_name_prefix="moc-check") as workers:
            found = workers.map(lambda pack: PackReader(self._store, pack.path, pack.nbytes).faults(), fresh)
            self._faults.update((pack.path, faults) for pack, faults in zip(fresh, found, strict=True))
        bad = {index for index, pack in enumerate(manifest.packs) if self._faults[pack.path]}
        if not bad:
            return []
        units: dict[int, set[str]] = {index: set() for index in bad}
        for row in manifest.fragments:
            if row.pack not in bad:
                continue
            stop = row.offset + _nbytes(manifest, row)
            for fault in self._faults[manifest.packs[row.pack].path]:
                if row.offset < min(stop, fault.stop) and stop > fault.start:
                    units[row.pack].add(manifest.units[row.unit].name)
        damage = []
        for index, names in units.items():
            path = manifest.packs[index].path
            trouble = explain_pack(self._store, manifest, path, self._faults[path][0].error)
            damage.append(Damage(path, tuple(sorted(names)), trouble.what, trouble.file, trouble.fix))
        # An object of which this checkpoint needs nothing does it no harm.
        return [item for item in damage if item.units]

    def _read(self, manifest: Manifest) -> list[Damage]:
        """Reads the packs whole, as far as they have units that were not compared yet."""
        rows: dict[int, list[FragmentRow]] = {}
        for row in manifest.fragments:
            rows.setdefault(row.pack, []).append(row)
        todo = []
        for index, mine in rows.items():
            path = manifest.packs[index].path
            names = {manifest.units[row.unit].name for row in mine}
            if fresh := names - self._compared.setdefault(path, set()):
                todo.append((index, [row for row in mine if manifest.units[row.unit].name in fresh]))
                self._compared[path] |= fresh
        total = sum(manifest.packs[index].nbytes for index, _ in todo)
        damage, done = [], 0
        for index, mine in todo:

            def advance(count: int, base: int = done) -> None:
                self._progress(base + count, total)

            problems = verify_pack(self._store, manifest, index, mine, advance)
            done += manifest.packs[index].nbytes
            # Damaged padding belongs to no unit, and no load reads it.
            units = _ordered(unit for problem in problems for unit in problem.units)
            if units:
                first = next(problem for problem in problems if problem.units)
                path = manifest.packs[index].path
                damage.append(Damage(path, units, first.what, first.file, first.fix))
        return damage


def _nbytes(manifest: Manifest, row: FragmentRow) -> int:
    return (row.stop - row.start) * itemsize(manifest.tensors[row.tensor].dtype)


def _ordered(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(names)))
