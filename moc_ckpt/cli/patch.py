"""`moc-ckpt patch`: what the launcher does at run time, written into a source tree; and taken out again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from moc_ckpt.cli.common import PROBLEM, AsJson, print_json, stdout, what_went_wrong
from moc_ckpt.errors import ConfigError

if TYPE_CHECKING:
    from moc_ckpt.patching.tree import Change, State, Tree

__all__ = ["patch"]

_STYLES = {"applied": "green", "applicable": "cyan", "not needed": "dim"}


def patch(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="megatron-deepspeed or deepspeed.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A source tree of it.")],
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="Only this patch; may be repeated.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Say what is the matter with each patch; change nothing.")
    ] = False,
    diff: Annotated[
        bool, typer.Option("--diff", help="Print what would change as a unified diff; change nothing.")
    ] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="With --diff: leave out the comments that --revert goes by.")
    ] = False,
    revert: Annotated[bool, typer.Option("--revert", help="Take patches out, byte for byte.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the plugin's hooks and the compatibility fixes into a source tree, or take them out again.

    Places are found by the names and shapes of functions. All files change together or none does; a patch that is
    there already stays as it is. Exit status 1: a structure was not found, or a patch is only half there.
    """
    with what_went_wrong(as_json):
        if check and (diff or revert):
            raise ConfigError(
                "--check does not go with --diff or --revert", where="command line", fix="give one of them"
            )
        if plain and not diff:
            raise ConfigError("--plain goes with --diff only", where="command line", fix="add --diff, or leave it out")
        tree = _tree(target, directory)
        change = None
        if not check:
            change = tree.revert(only or ()) if revert else tree.apply(only or ())
            if not diff:
                _write(tree, change)
        states = tree.states(only or ())
        if change is not None and not diff:
            states = _tree(target, directory).states([state.name for state in states if _is_known(tree, state)])
    if as_json:
        print_json(_as_data(tree, states, change, revert=revert, diff=diff, plain=plain))
    elif diff:
        assert change is not None
        sys.stdout.flush()
        sys.stdout.buffer.write(change.diff(plain=plain))
        sys.stdout.buffer.flush()
    else:
        _show(tree, states, change, revert=revert)
    # What is not found does not keep anybody from taking patches out.
    if any(state.bad for state in states) and not revert:
        raise typer.Exit(PROBLEM)


def _tree(target: str, directory: Path) -> Tree:
    """Returns the tree of a target.

    Raises:
        ConfigError: if there is no such target, no such tree, or no libcst.
    """
    try:
        import libcst  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            "this needs libcst, which is not installed",
            where="the Python environment of moc-ckpt",
            fix="pip install libcst",
        ) from error
    from moc_ckpt.patching.targets import TARGETS
    from moc_ckpt.patching.tree import Tree

    if target not in TARGETS:
        raise ConfigError(f"there are no patches for {target!r}", where="TARGET", fix=f"known are {', '.join(TARGETS)}")
    found = TARGETS[target]
    # The package itself will do as well as the directory that holds it.
    is_package = directory.resolve().name == found.package and not (directory / found.package).is_dir()
    return Tree(found, directory.resolve().parent if is_package else directory)


def _is_known(tree: Tree, state: State) -> bool:
    return state.name in {patch.name for patch in tree.target.patches}


def _write(tree: Tree, change: Change) -> None:
    from moc_ckpt.patching.files import replace

    replace(tree.root, change.before, change.after)


def _as_data(
    tree: Tree, states: list[State], change: Change | None, *, revert: bool, diff: bool, plain: bool
) -> dict[str, Any]:
    data: dict[str, Any] = {
        "target": tree.target.name,
        "directory": str(tree.root),
        "patches": [
            {
                "name": state.name,
                "status": state.status,
                "note": state.note or None,
                "files": list(state.files),
                "missing": None
                if state.missing is None
                else {
                    "file": state.missing.file,
                    "function": state.missing.function or None,
                    "expected": state.missing.expected,
                },
                "problems": list(state.problems),
            }
            for state in states
        ],
    }
    if change is not None:
        verb = "reverted" if revert else "applied"
        data[f"would_be_{verb}" if diff else verb] = list(change.names)
        data["files"] = list(change.after)
    if diff and change is not None:
        data["diff"] = change.diff(plain=plain).decode("utf-8", "surrogateescape").encode("utf-8", "replace").decode()
    return data


def _show(tree: Tree, states: list[State], change: Change | None, *, revert: bool) -> None:
    table = Table(title=Text(f"{tree.target.name} at {tree.root}"), title_justify="left")
    table.add_column("patch")
    table.add_column("status")
    table.add_column("where, or why", overflow="fold")
    for state in states:
        came = change is not None and state.name in change.names
        status = f"{state.status}{', just now' if came and not revert else ''}"
        told = "\n".join((*([state.note] if state.note else state.files), *state.problems))
        table.add_row(state.name, Text(status, style=_STYLES.get(state.status, "bold red")), Text(told))
    console = stdout()
    console.print(table)
    if change is None:
        return
    verb = "reverted" if revert else "applied"
    if change.names:
        files = f"{len(change.after)} file{'s' if len(change.after) != 1 else ''}"
        console.print(Text.assemble((verb, "bold green"), f": {', '.join(change.names)}, in {files}"))
    else:
        console.print(f"nothing to be {verb}")
