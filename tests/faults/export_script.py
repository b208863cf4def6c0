"""`moc-ckpt` as a process that counts its writing calls, and kills itself before one of them if it is told to.

Arguments: the number of that call (-1: none), and those of `moc-ckpt`. It says when it begins, and at the end how long
it took and which calls there were; whatever is imported comes before that.
"""

from __future__ import annotations

import sys
import time


def main() -> int:
    fatal, arguments = int(sys.argv[1]), sys.argv[2:]
    import tensorstore  # noqa: F401

    from faults.operations import Operations
    from moc_ckpt.cli.main import app

    if "deepspeed" in arguments or arguments[0] == "import":
        from moc_ckpt.integrations.deepspeed import native_export, native_import  # noqa: F401
        from moc_ckpt.integrations.deepspeed.native_files import import_deepspeed

        import_deepspeed()
    print("begin", flush=True)
    began, status = time.monotonic(), 0
    with Operations(fatal if fatal >= 0 else None) as operations:
        try:
            app(arguments)
        except SystemExit as end:
            status = int(end.code or 0)
    print(f"end {time.monotonic() - began} {','.join(operations.names)}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
