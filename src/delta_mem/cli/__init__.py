"""The `delta-mem` command. One file per subcommand; `app.py` lists them, `common.py` is what they share.

It needs typer and rich (`pip install -e ".[cli]"`), which the library itself never imports. torch and
transformers are imported inside the commands, so that `delta-mem --help` answers at once.
"""

import sys


def main() -> None:
    """Entry point of the `delta-mem` script."""
    try:
        from .app import app
        from .common import leave_on_interrupt
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("typer", "rich"):
            raise
        sys.exit(f'delta-mem: the command line needs {missing}: pip install -e ".[cli]"')
    # A terminal that cannot show a character, or a byte that is no UTF-8, is no reason to end a chat.
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    leave_on_interrupt()
    app()
