"""Shared fixtures: the pool of real processes that the distributed tests run on."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
for _path in (str(HERE.parent), str(HERE)):
    if _path not in sys.path:
        sys.path.insert(0, _path)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell does for its background jobs; every process that a test starts would inherit that and ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _requirements_missing() -> str:
    """Return why the distributed tests cannot run here, or ''."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        return "this torch has no gloo"
    import importlib.util

    if importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed"
    return ""


@pytest.fixture(scope="session")
def pool() -> Iterator[object]:
    """Real worker processes, started on first use and shared by the whole session."""
    reason = _requirements_missing()
    if reason:
        pytest.skip(reason)
    from distributed.pool import Pool

    workers = Pool()
    try:
        yield workers
    finally:
        workers.close()


@pytest.fixture
def ckpt_dir() -> Iterator[str]:
    """A directory for one test's checkpoints, removed afterwards (set MOC_TEST_KEEP=1 to keep it)."""
    path = tempfile.mkdtemp(prefix="moc_test_")
    yield path
    if os.environ.get("MOC_TEST_KEEP") != "1":
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def no_leftovers() -> Iterator[None]:
    """Removes what killed processes left in shared memory: hundreds of them would fill it."""
    yield
    from leftovers import remove_buffers

    remove_buffers()
