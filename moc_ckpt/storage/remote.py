"""A checkpoint root in an object store (s3, gs, memory), through TensorStore."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator, MutableSequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from moc_ckpt.errors import StorageError
from moc_ckpt.storage.store import Store, check_key

__all__ = ["APPEND_TRIES", "LOCK_LEASE_S", "KvStore"]

LOCK_LEASE_S = 300.0
"""Seconds after which a lock whose holder died may be taken over (longer than any commit or collection step)."""
APPEND_TRIES = 20
"""How often an append is tried while other writers come in between."""

_CONTEXT_SPEC = {
    # The defaults retry for ten minutes; a preflight check should know sooner.
    "s3_request_retries": {"max_retries": 8, "initial_delay": "250ms", "max_delay": "8s"},
    "gcs_request_retries": {"max_retries": 8, "initial_delay": "250ms", "max_delay": "8s"},
}
_context: Any = None


def _shared_context() -> Any:
    """Returns the process-wide TensorStore context, so that `memory://` roots are shared within the process."""
    global _context
    if _context is None:
        import tensorstore as ts

        _context = ts.Context(_CONTEXT_SPEC)
    return _context


class KvStore(Store):
    """A checkpoint root under a prefix of a TensorStore key-value store.

    Args:
        spec: a URL, or a KvStore spec as JSON data.

    Raises:
        StorageError: if it cannot be opened.
    """

    def __init__(self, spec: str | dict[str, Any]) -> None:
        import tensorstore as ts

        try:
            base = ts.KvStore.open(spec, context=_shared_context()).result()
            if base.path and not base.path.endswith("/"):
                base.path += "/"
        except Exception as exc:
            raise StorageError(
                f"the checkpoint root cannot be opened: {exc}", where=str(spec), fix="check the URL and the credentials"
            ) from exc
        self._ts: Any = ts
        self._kv: Any = base
        self._missing: bytes = b"\x02"
        self._whole: tuple[str, bytes] | None = None
        self._whole_lock = threading.Lock()
        self.url = self._url_of(base)

    @staticmethod
    def _url_of(base: Any) -> str:
        try:
            return str(base.url)
        except Exception:  # some drivers have no URL syntax
            return json.dumps(base.spec().to_json())

    @property
    def kvstore(self) -> Any:
        """The `tensorstore.KvStore` at the root."""
        return self._kv

    def _fail(self, exc: Exception, action: str, key: str) -> NoReturn:
        raise StorageError(
            f"{action} failed: {exc}",
            where=self.locate(key),
            fix="check credentials, bucket, network and the store's limits",
        ) from exc

    def read(self, key: str) -> bytes | None:
        """See `Store.read`."""
        check_key(key)
        try:
            result = self._kv.read(key).result()
        except Exception as exc:
            self._fail(exc, "reading", key)
        return bytes(result.value) if result.state == "value" else None

    def read_ranges(self, key: str, ranges: list[tuple[int, MutableSequence[memoryview]]]) -> None:
        """See `Store.read_ranges`."""
        check_key(key)
        for offset, views in ranges:
            nbytes = sum(len(view) for view in views)
            span = slice(offset, None) if offset < 0 else slice(offset, offset + nbytes)
            data = self._read_range(key, span)
            if len(data) != nbytes:
                raise EOFError(f"{self.locate(key)} is shorter than expected")
            done = 0
            for view in views:
                view[:] = data[done : done + len(view)]
                done += len(view)

    def _read_range(self, key: str, span: slice) -> memoryview:
        try:
            result = self._kv.read(key, byte_range=span).result()
        except TypeError:
            return self._read_range_of_whole(key, span)
        except Exception as exc:
            if "OUT_OF_RANGE" in str(exc):
                raise EOFError(f"{self.locate(key)}: {exc}") from exc
            self._fail(exc, "reading", key)
        if result.state != "value":
            raise FileNotFoundError(self.locate(key))
        return memoryview(result.value)

    def _read_range_of_whole(self, key: str, span: slice) -> memoryview:
        """Stands in for range reads, which TensorStore has from 0.1.81 on (Python 3.10 gets older ones only).

        The last object is kept, since the next range is likely to be in it too.
        """
        with self._whole_lock:
            if self._whole is None or self._whole[0] != key:
                self._whole = None
                data = self.read(key)
                if data is None:
                    raise FileNotFoundError(self.locate(key))
                self._whole = (key, data)
            return memoryview(self._whole[1])[span]

    def _forget(self) -> None:
        with self._whole_lock:
            self._whole = None

    def write(self, key: str, data: bytes) -> None:
        """See `Store.write`."""
        check_key(key)
        self._forget()
        try:
            self._kv.write(key, data).result()
        except Exception as exc:
            self._fail(exc, "writing", key)

    def write_async(self, key: str, data: bytes) -> Any:
        """Starts a write.

        Returns:
            A future whose `result()` returns once the object is durable.
        """
        return self._kv.write(check_key(key), data)

    def create(self, key: str, data: bytes) -> bool:
        """See `Store.create`."""
        return self._swap(key, data, self._missing)

    def append(self, key: str, data: bytes) -> None:
        """See `Store.append`.

        Reads the object and writes it again if nobody changed it meanwhile; a writer that always comes too late gives
        up after `APPEND_TRIES`.
        """
        check_key(key)
        self._forget()
        for _ in range(APPEND_TRIES):
            try:
                result = self._kv.read(key).result()
            except Exception as exc:
                self._fail(exc, "reading", key)
            there = result.state == "value"
            if self._swap(key, (bytes(result.value) if there else b"") + data, self._stamp(result)):
                return
        raise StorageError(
            f"appending failed: other writers changed the object {APPEND_TRIES} times meanwhile",
            where=self.locate(key),
            fix="let one process write each log",
        )

    def _stamp(self, result: Any) -> bytes:
        """Returns the generation that a conditional write must find, from what a read returned."""
        return bytes(result.stamp.generation) if result.state == "value" else self._missing

    def _swap(self, key: str, data: bytes | None, generation: bytes) -> bool:
        """Writes (or with None deletes) the object if it is still the one with this generation."""
        check_key(key)
        try:
            return bool(self._kv.write(key, data, if_equal=generation).result().generation)
        except Exception as exc:
            self._fail(exc, "writing", key)

    def list_dirs(self, prefix: str = "") -> list[str]:
        """See `Store.list_dirs`."""
        skip = len(prefix.rstrip("/")) + 1 if prefix else 0
        return sorted({key[skip:].partition("/")[0] for key in self.list(prefix) if "/" in key[skip:]})

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        check_key(key)
        self._forget()
        try:
            self._kv.write(key, None).result()
        except Exception as exc:
            self._fail(exc, "removing", key)

    def delete_prefix(self, prefix: str) -> None:
        """See `Store.delete_prefix`."""
        start = f"{check_key(prefix.rstrip('/'))}/"
        self._forget()
        try:
            self._kv.delete_range(self._ts.KvStore.KeyRange(start, f"{start[:-1]}0")).result()
        except Exception as exc:
            self._fail(exc, "removing", prefix)

    def prune(self, prefix: str) -> None:
        """See `Store.prune`."""

    def exists(self, key: str) -> bool:
        """See `Store.exists`."""
        check_key(key)
        try:
            return bool(self._kv.list(self._ts.KvStore.KeyRange(key, f"{key}\0")).result())
        except Exception as exc:
            self._fail(exc, "reading", key)

    def root_exists(self) -> bool:
        """See `Store.root_exists`."""
        return True

    def check_writable(self, need_bytes: int = 0) -> None:
        """See `Store.check_writable`."""
        key = f"probe-{uuid.uuid4().hex[:8]}"
        self.write(key, b"probe")
        self.delete(key)

    @contextmanager
    def lock(self, name: str, timeout_s: float = 60.0) -> Iterator[None]:
        """See `Store.lock`."""
        owner = uuid.uuid4().hex
        deadline = time.monotonic() + timeout_s
        while not self._take_lock(name, owner):
            if time.monotonic() >= deadline:
                raise StorageError(
                    f"another process held the lock for all of {timeout_s:g} s",
                    where=self.locate(name),
                    fix=f"look for another commit or gc on this root; a dead holder loses it after {LOCK_LEASE_S:g} s",
                )
            time.sleep(0.05)
        try:
            yield
        finally:
            with suppress(StorageError):
                self._drop_lock(name, owner)

    def _take_lock(self, name: str, owner: str) -> bool:
        body = json.dumps({"owner": owner, "until": time.time() + LOCK_LEASE_S}).encode()
        if self.create(name, body):
            return True
        result = self._kv.read(name).result()
        if result.state != "value" or json.loads(result.value)["until"] > time.time():
            return False
        return self._swap(name, body, result.stamp.generation)

    def _drop_lock(self, name: str, owner: str) -> None:
        result = self._kv.read(name).result()
        if result.state == "value" and json.loads(result.value)["owner"] == owner:
            self._swap(name, None, result.stamp.generation)

    def list(self, prefix: str = "") -> list[str]:
        """See `Store.list`."""
        start = f"{check_key(prefix.rstrip('/'))}/" if prefix else ""
        try:
            end = f"{start[:-1]}0" if start else ""  # '0' follows '/'
            found = self._kv.list(self._ts.KvStore.KeyRange(start, end)).result()
        except Exception as exc:
            self._fail(exc, "listing", prefix)
        return sorted(key.decode() for key in found)
