"""`delta-mem convert`: an adapter from the authors' format into ours, and back."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .common import option, out, plural, user_errors


class Format(str, Enum):
    official = "official"
    ours = "delta-mem"


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="The adapter: a folder, or a hub id.", show_default=False)
    ],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="The folder to write.", show_default=False)],
    to: Annotated[
        Format,
        option("--to", help="The format to write; official is the authors'."),
    ],
    force: Annotated[bool, option("--force", help="Write into DEST though it is not empty.")] = False,
) -> None:
    """Convert an adapter between the authors' format and delta-mem's.

    The weights stay the same, bit for bit. No backbone is needed.

    Example: delta-mem convert authors-adapter my-adapter --to delta-mem
    """
    with user_errors():
        from .. import checkpoint

        if dest.exists() and Path(source).resolve() == dest.resolve():
            raise ValueError(f"{dest} is the source itself; name another folder.")
        if dest.is_dir() and any(dest.iterdir()) and not force:
            raise ValueError(f"{dest} is not empty; --force writes into it all the same.")
        adapter = checkpoint.load_adapter(source)
        if adapter.official == (to is Format.official):
            raise ValueError(f"{source} is in the {to.value} format already.")
        if to is Format.official:
            checkpoint.save_official(adapter, dest)
            written = [checkpoint.CONFIG_FILE, checkpoint.OFFICIAL_WEIGHTS_FILE]
        else:
            checkpoint.save_adapter(adapter, dest)
            written = [checkpoint.CONFIG_FILE, checkpoint.WEIGHTS_FILE, "README.md"]
    parameters = sum(weight.numel() for weight in adapter.weights.values())
    out.print(
        f"Wrote {dest} in the {to.value} format: {', '.join(written)} "
        f"({parameters:,} parameters, {plural(len(adapter.layers), 'layer')}).",
        markup=False,
        soft_wrap=True,
    )
