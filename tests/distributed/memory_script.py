"""`moc-ckpt` as a process that says how much memory it took: that beyond its imports which the kernel cannot take back.

Arguments: those of `moc-ckpt`. The last line: peak of anonymous memory above that after the imports, and of all
resident memory including mapped files, in bytes.
"""

from __future__ import annotations

import resource
import sys
import threading
from pathlib import Path


def anonymous() -> int:
    """Resident memory that is no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise OSError("no RssAnon")


def main() -> int:
    import tensorstore  # noqa: F401

    from moc_ckpt.cli.main import app

    if "deepspeed" in sys.argv or sys.argv[1] == "import":
        from moc_ckpt.integrations.deepspeed import native_export, native_import  # noqa: F401
        from moc_ckpt.integrations.deepspeed.native_files import import_deepspeed

        import_deepspeed()
    before = peak = anonymous()
    over, status = threading.Event(), 0

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.002):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        app(sys.argv[1:])
    except SystemExit as end:
        status = int(end.code or 0)
    over.set()
    watcher.join()
    print(f"peak {peak - before} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
