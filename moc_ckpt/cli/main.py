"""`moc-ckpt`: the entry point."""

from __future__ import annotations

from typing import Annotated

import typer

from moc_ckpt._version import __version__
from moc_ckpt.cli.agent import agent
from moc_ckpt.cli.export import export
from moc_ckpt.cli.gc import gc
from moc_ckpt.cli.import_native import import_checkpoint
from moc_ckpt.cli.inspect import inspect
from moc_ckpt.cli.plan import PlanCommand, plan
from moc_ckpt.cli.recover import recover
from moc_ckpt.cli.run import run
from moc_ckpt.cli.verify import verify

__all__ = ["app", "main"]

app = typer.Typer(
    name="moc-ckpt",
    help="Looks at, checks and plans Mixture-of-Experts checkpoints of moc_ckpt.\n\n"
    "Exit status: 0 fine, 1 found a problem, 2 wrong use. Every command has --json.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(inspect)
app.command()(recover)
app.command()(verify)
app.command(cls=PlanCommand)(plan)
app.command()(gc)
app.command()(export)
app.command("import")(import_checkpoint)
# Options behind the command's name are the command's.
app.command(context_settings={"allow_interspersed_args": False})(run)
app.add_typer(agent)


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
