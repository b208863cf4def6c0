"""`moc-ckpt`: the entry point."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup
from typer.main import get_command

from moc_ckpt._version import __version__

__all__ = ["app", "main"]


class _Verb(NamedTuple):
    """Where a verb is: a function in a module, or a `typer.Typer` with verbs of its own."""

    module: str
    name: str
    cls: str | None = None
    context_settings: dict[str, Any] | None = None


_VERBS = {
    "inspect": _Verb("inspect", "inspect"),
    "recover": _Verb("recover", "recover"),
    "verify": _Verb("verify", "verify"),
    "plan": _Verb("plan", "plan", cls="PlanCommand"),
    "placement": _Verb("placement", "placement"),
    "gc": _Verb("gc", "gc"),
    "patch": _Verb("patch", "patch"),
    "export": _Verb("export", "export"),
    "import": _Verb("import_native", "import_checkpoint"),
    # Options behind the command's name are the command's.
    "run": _Verb("run", "run", context_settings={"allow_interspersed_args": False}),
    "agent": _Verb("agent", "agent"),
}


def _load(name: str) -> Any:
    verb = _VERBS[name]
    module = import_module(f"moc_ckpt.cli.{verb.module}")
    found = getattr(module, verb.name)
    if isinstance(found, typer.Typer):
        return get_command(found)
    single = typer.Typer(add_completion=False)
    cls = getattr(module, verb.cls) if verb.cls else None
    single.command(name, cls=cls, context_settings=verb.context_settings)(found)
    return get_command(single)


class _Verbs(TyperGroup):
    """Imports a verb when it is asked for: together they take longer than most of them have to do."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        # Who mistypes a name is told the names that there are.
        for name in [cmd_name] if cmd_name in _VERBS else _VERBS:
            if name not in self.commands:
                self.commands[name] = _load(name)
        return self.commands.get(cmd_name)


app = typer.Typer(
    cls=_Verbs,
    name="moc-ckpt",
    help="Looks at, checks and plans Mixture-of-Experts checkpoints of moc_ckpt.\n\n"
    "Exit status: 0 fine, 1 found a problem, 2 wrong use. Every command has --json.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"moc-ckpt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command line and exits with its status."""
    app(prog_name="moc-ckpt")


if __name__ == "__main__":
    main()
