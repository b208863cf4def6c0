"""A process that counts its own writing calls, and can kill itself before the n-th of them."""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

_WRITES = ("fsync", "fdatasync", "replace", "rename", "link", "mkdir", "unlink", "open", "write", "pwrite", "pwritev")


class Operations:
    """Counts writing calls of this process; kills it before call number `fatal`."""

    def __init__(self, fatal: int | None) -> None:
        self.fatal = fatal
        self.names: list[str] = []
        self._lock = threading.Lock()
        self._originals: dict[str, Callable[..., Any]] = {}

    def _hook(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self.names.append(name)
                if len(self.names) - 1 == self.fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    def __enter__(self) -> Operations:
        for name in _WRITES:
            self._originals[name] = getattr(os, name)
            setattr(os, name, self._hook(name, getattr(os, name)))
        self._originals["io.open"] = io.open
        io.open = self._hook("io.open", io.open)  # type: ignore[assignment]
        return self

    def __exit__(self, *exc: object) -> None:
        if self.fatal is not None:
            # The number of calls varies by one or two (who makes a directory first): the last moment is still one.
            os.kill(os.getpid(), signal.SIGKILL)
        io.open = self._originals.pop("io.open")  # type: ignore[assignment]
        for name, original in self._originals.items():
            setattr(os, name, original)
