"""`moc-ckpt import`: a checkpoint of DeepSpeed's own as one of this package."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from moc_ckpt.cli.common import AsJson, bytes_progress, integration, print_json, size, stdout, what_went_wrong

__all__ = ["import_checkpoint"]


def import_checkpoint(
    directory: Annotated[
        str, typer.Argument(metavar="NATIVE_DIR", help="What was given to DeepSpeed's save_checkpoint.")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Directory to write: a new or an empty one.")],
    tag: Annotated[
        str | None, typer.Option("--tag", help="Checkpoint; without it the one that `latest` names.")
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Unpickle whatever the files hold, which may run code from them.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a checkpoint out of one that DeepSpeed's own save_checkpoint wrote (ZeRO stage 1 or 2).

    A run with this package goes on from it as DeepSpeed would, in any world. OUT is there at the end or not at all.
    """
    with what_went_wrong(as_json):
        native = integration("deepspeed.native_import")
        with bytes_progress("importing") as advance:
            done = native.import_native(directory, out, tag=tag, trust=trust, progress=advance)
    if as_json:
        print_json(
            {
                "directory": done.url,
                "tag": done.tag,
                "step": done.step,
                "world": done.world,
                "expert_parallel": done.expert_parallel,
                "zero_stage": done.zero_stage,
                "experts": done.experts,
                "bytes": done.nbytes,
                "stored_bytes": done.stored_bytes,
                "underived": done.underived,
            }
        )
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("checkpoint", Text(f"{done.tag} (step {done.step:,}) in {done.url}"))
    table.add_row("from", f"{done.world} ranks, EP {done.expert_parallel}, ZeRO-{done.zero_stage}")
    table.add_row("holds", f"{size(done.nbytes)}, {done.experts:,} experts, in {size(done.stored_bytes)} of files")
    if done.underived:
        told = f"{done.underived:,} parameters are not what their masters round to; both are kept"
        table.add_row("note", told)
    stdout().print(table)
