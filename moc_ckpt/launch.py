"""`python -m moc_ckpt.launch SCRIPT …`: runs a training script that nobody may touch, with the plugin hooked in.

Works under torchrun and under `deepspeed --module moc_ckpt.launch SCRIPT …`, whose `--local_rank=N`
comes before the script's name and is handed on to the script.

A script in a Megatron-DeepSpeed checkout moreover gets `--moc-*` arguments, and what stands between that checkout and
the installed versions of DeepSpeed and PyTorch is cleared away, shim by shim (docs/megatron-deepspeed.md).
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import moc_ckpt  # noqa: F401  (registers the hook)
from moc_ckpt.errors import MocError

if TYPE_CHECKING:
    from moc_ckpt.integrations.megatron_deepspeed.checkout import Checkout

__all__ = ["main"]

_USAGE = """usage: python -m moc_ckpt.launch [--moc-list-shims] [--moc-no-shim NAME[,NAME]] SCRIPT [ARGUMENTS …]

  --moc-list-shims       for a Megatron-DeepSpeed checkout: print what applies to it and why, and end
  --moc-no-shim NAME     leave a shim out; may be repeated, `all` leaves out all of them (also: MOC_NO_SHIM=NAME,…)

Settings of the plugin (--moc-enabled, --moc-k-persist, …) are arguments of the script and come after its name."""

_LIST = "--moc-list-shims"
_NO_SHIM = "--moc-no-shim"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script as `__main__`.

    Args:
        argv: script and its arguments, after launcher options; the process's own by default.

    Returns:
        2 for wrong use; else the script's own exit ends the process, or 0.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        own, launcher, arguments = _options(arguments)
    except ValueError as error:
        return _wrong_use(str(error))
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, file=sys.stderr)
        return 0 if arguments else 2
    if arguments[0].startswith("-"):
        return _wrong_use(f"unknown option {arguments[0]}: the script's name comes first")
    script = Path(arguments[0])
    if not script.is_file():
        return _wrong_use(f"no such script: {script}")
    from moc_ckpt.integrations.megatron_deepspeed.checkout import find_checkout

    try:
        checkout = find_checkout(script)
    except MocError as error:
        print(f"moc_ckpt.launch: {error}", file=sys.stderr)
        return 2
    rest = arguments[1:]
    if checkout is not None:
        try:
            late, _, rest = _options(rest, anywhere=True)
        except ValueError as error:
            return _wrong_use(str(error))
        own = {name: [*own[name], *late[name]] for name in own}
    elif any(own.values()):
        return _wrong_use(f"{script} is in no Megatron-DeepSpeed checkout, so there are no shims")
    # As `python SCRIPT` would see it.
    sys.argv = [str(script), *launcher, *rest]
    sys.path.insert(0, str(script.resolve().parent))
    if checkout is not None:
        status = _prepare(checkout, own)
        if status is not None:
            return status
    runpy.run_path(str(script), run_name="__main__")
    return 0


def _prepare(checkout: Checkout, own: dict[str, list[str]]) -> int | None:
    """Hooks the plugin into a checkout; returns an exit status if the script is not to be run."""
    from moc_ckpt.integrations.megatron_deepspeed import launcher

    try:
        off = launcher.switched_off(own[_NO_SHIM])
        if own[_LIST]:
            decisions = launcher.decide(checkout, off)
            if os.environ.get("RANK", "0") == "0":
                print(f"{checkout.root}\n{launcher.table(decisions)}")
            return int(any(each.status == "NOT FOUND" for each in decisions))
        if str(checkout.root) not in sys.path[:1]:
            sys.path.insert(0, str(checkout.root))
        launcher.install(checkout, off)
    except MocError as error:
        print(f"moc_ckpt.launch: {error}", file=sys.stderr)
        return 2
    return None


def _options(arguments: Sequence[str], *, anywhere: bool = False) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """Takes the launcher's options from the front of the arguments, or from anywhere in them.

    Returns:
        The launcher's own options, those of other launchers (`--local_rank=N`), and the rest.

    Raises:
        ValueError: if a value is missing.
    """
    own: dict[str, list[str]] = {_LIST: [], _NO_SHIM: []}
    other: list[str] = []
    rest: list[str] = []
    waiting = list(arguments)
    while waiting:
        item = waiting.pop(0)
        name, equals, value = item.partition("=")
        if name == _LIST:
            own[_LIST].append("")
        elif name == _NO_SHIM:
            if not equals and not waiting:
                raise ValueError(f"{_NO_SHIM} needs a name")
            own[_NO_SHIM].append(value if equals else waiting.pop(0))
        elif not anywhere and item.startswith(("--local_rank", "--local-rank")):
            other.append(item)
            if not equals and waiting:
                other.append(waiting.pop(0))
        elif anywhere:
            rest.append(item)
        else:
            return own, other, [item, *waiting]
    return own, other, rest


def _wrong_use(message: str) -> int:
    print(f"moc_ckpt.launch: {message}\n{_USAGE}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
