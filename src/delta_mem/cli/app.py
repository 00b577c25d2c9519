"""The subcommands of `delta-mem`, and `--version`."""

from typing import Annotated

import typer

from .bench import bench
from .chat import chat
from .convert import convert
from .demo import demo
from .eval import evaluate
from .info import info
from .train import train

app = typer.Typer(
    name="delta-mem",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a bug shows Python's own traceback
    rich_markup_mode=None,  # plain help wraps well at 80 columns
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from .. import __version__

        print(f"delta-mem {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """δ-mem: an online memory for frozen language models.

    Chat with a model that keeps what left its context in a few kilobytes, and look into adapters and
    memories. `delta-mem demo` shows the memory at work, offline, in a minute.
    """


for command in (chat, train, info, convert, demo, bench):
    app.command()(command)
app.command("eval")(evaluate)
