"""What several commands need: consoles, errors in one line, sizes and layer grids, loading a backbone."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import signal
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Answers go to stdout, where a script reads them; everything said about them goes to stderr.
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

LOCK = ".lock"  # in a folder that a process has to itself
OFFLINE = "offline"  # the model that comes with the package
INTERRUPTED = 130  # the exit code of a command that Ctrl-C ended, as of any program
BARS = " ▁▂▃▄▅▆▇█"
# Control characters (but newline and tab) would let a model's words drive the terminal.
_CONTROLS = {code: "�" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def option(*names: str, help: str, metavar: str | None = None, **settings: Any) -> Any:
    """A `typer.Option` whose default is not shown unless asked for."""
    settings.setdefault("show_default", False)
    return typer.Option(*names, help=help, metavar=metavar, **settings)


DeviceOption = Annotated[
    str,
    option(
        "--device",
        metavar="NAME",
        help="cpu, cuda, cuda:1, mps, …; auto: an accelerator, if any.",
        show_default=True,
    ),
]
DtypeOption = Annotated[
    Dtype,
    option(
        "--dtype",
        metavar="NAME",
        help="The backbone's: float32, bfloat16, float16; auto: as saved (offline: float32).",
        show_default=True,
    ),
]


# ---- errors ----------------------------------------------------------------------------------------


def complain(error: Exception) -> None:
    """One red line on stderr."""
    if isinstance(error, OSError) and error.strerror:
        text = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    else:
        text = " ".join(str(error).split()) or type(error).__name__
    err.print(f"Error: {text}", style="red", markup=False, soft_wrap=True)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """What a user can cause (a wrong path, a broken file, an adapter that does not fit) ends the command
    with one line. To be put around reading what the user names, not around a whole command: a bug keeps
    its traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        complain(error)
        raise typer.Exit(1) from None


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """Makes a folder: a wrong path shows before all else. A failure within leaves no empty one behind."""
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # it is not empty
            for folder in itertools.takewhile(lambda folder: folder != there, (path, *path.parents)):
                folder.rmdir()
        raise


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps other commands out of a folder, which is made if need be. Its lock file stays in it.

    Raises:
        ValueError: another one is in it.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / LOCK).acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{folder} is in use by another delta-mem; wait until it is done.") from None
    with lock:
        yield


def holds(folder: Path, file: str, what: str) -> bool:
    """Whether a folder has the file that marks it as `what`.

    Raises:
        ValueError: if not, it is not free to become that either.
    """
    if (folder / file).exists():
        return True
    if folder.is_file():
        raise ValueError(f"{folder} is a file; name a folder.")
    if folder.is_dir() and any(entry.name != LOCK for entry in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no {what}; name another folder.")
    return False


# ---- Ctrl-C ----------------------------------------------------------------------------------------


def leave_on_interrupt() -> None:
    """From here on Ctrl-C ends the process at once.

    While a command starts: an import that is broken off complains of a broken installation.
    """
    signal.signal(signal.SIGINT, _leave)


def catch_interrupts() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt again, for what knows how to stop."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: Any) -> None:
    if err.is_terminal:
        os.write(2, b"\x1b[?25h\n")  # a spinner hides the cursor
    os._exit(INTERRUPTED)


# ---- showing things --------------------------------------------------------------------------------


def printable(text: str) -> str:
    """`text` with control characters replaced."""
    return text.translate(_CONTROLS)


def size(count: int) -> str:
    """A number of bytes, for people."""
    if count < 10_000:
        return f"{count:,} bytes"
    power = min(int(math.log10(count)) // 3, 3)
    return f"{count / 1000**power:,.1f} {('bytes', 'kB', 'MB', 'GB')[power]}"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def facts_table(rows: Mapping[str, Any]) -> Table:
    """Names on the left, values on the right; None is left out."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value is not None:
            table.add_row(Text(name), Text(printable(value)) if isinstance(value, str) else value)
    return table


def layer_grid(values: Mapping[int, float | None], columns: int = 6) -> Table:
    """One cell a layer: its index, a bar relative to the largest, the number."""
    table = Table.grid(padding=(0, 1))
    for _ in range(columns):
        table.add_column(justify="right", style="dim")
        table.add_column(style="cyan")
        table.add_column(min_width=7)
    top = max((v for v in values.values() if _finite(v)), default=0)
    cells = []
    for layer, value in values.items():
        bar = BARS[math.ceil(8 * value / top)] if _finite(value) and top else " "
        cells.append((str(layer), bar, number(value)))
    for start in range(0, len(cells), columns):
        table.add_row(*(part for cell in cells[start : start + columns] for part in cell))
    return table


def number(value: float | None) -> str:
    """Three digits; None, which stands for NaN and infinity in reports, as that."""
    return f"{value:.3g}" if _finite(value) else "NaN/inf"


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


# ---- loading ---------------------------------------------------------------------------------------


def find_model(name: str, dtype: Dtype) -> tuple[str, dict[str, str], Dtype]:
    """Where a backbone is (a folder or a hub id), {name: folder} of adapters that come with it, its dtype."""
    if name != OFFLINE or Path(name).exists():
        return name, {}, dtype
    from ..offline import ADAPTERS, FOLDER

    if dtype is Dtype.auto:
        dtype = Dtype.float32  # it is saved in half of that, to be small
    return str(FOLDER / "backbone"), {adapter: str(FOLDER / adapter) for adapter in ADAPTERS}, dtype


def find_adapter(name: str, own: Mapping[str, str]) -> str:
    """The folder or hub id of an adapter; of one that comes with the backbone, by its name in `own`.

    Raises:
        ValueError: neither that nor a folder, nor could it be on the hub.
    """
    if own and name not in own and "/" not in name and not Path(name).exists():
        raise ValueError(f"the offline model's adapters are {', '.join(own)}, not {name!r}.")
    return own.get(name, name)


def load_backbone(name: str, device: str, dtype: Dtype) -> tuple[Any, Any]:
    """(model, tokenizer) of a local folder, a hub id, or `OFFLINE`.

    Raises:
        FileNotFoundError: a path that is not there, or neither that nor a repository on the hub.
        ValueError, OSError: it cannot be loaded, has no tokenizer, or there is no such device.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from ..checkpoint import CONFIG_FILE
    from ..files import download
    from ..offline import NAME

    logging.set_verbosity_error()
    folder, own, dtype = find_model(name, dtype)
    # Without this, a mistyped path is looked for on the hub, offline for more than a minute.
    if not Path(folder).is_dir():
        if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", folder):
            raise FileNotFoundError(f"{folder}: no such folder.")
        download(folder, ["config.json"])
    elif not (Path(folder) / "config.json").exists():
        if (Path(folder) / CONFIG_FILE).exists():
            raise ValueError(f"{folder} is an adapter, not a model; name it with --adapter.")
        raise ValueError(f"{folder} holds no config.json: it is not a model.")
    target = find_device(device)
    if Path(folder).is_dir():
        logging.disable_progress_bar()  # a local file loads in the time that the status line shows
    try:
        tokenizer = _load_tokenizer(name, folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype.value, "auto"))
        if own:
            model.config._name_or_path = NAME  # not a folder of this machine
        # A quantized model is where its quantizer put it.
        return (model if getattr(model, "is_quantized", False) else model.to(target)), tokenizer
    except (SafetensorError, ImportError, torch.OutOfMemoryError) as error:
        raise ValueError(f"{name} cannot be loaded: {error}") from None


def _load_tokenizer(name: str, folder: str) -> Any:
    from transformers import AutoTokenizer

    missing = f"{name} has no tokenizer; save one with it (tokenizer.save_pretrained)."
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except ValueError as error:
        raise ValueError(f"{missing} ({str(error).splitlines()[0]})") from None
    # Where there is none, transformers makes one that knows no words.
    if {tokenizer.unk_token_id}.issuperset(tokenizer("What?", add_special_tokens=False).input_ids):
        raise ValueError(missing)
    return tokenizer


def find_device(name: str) -> Any:
    """The torch device of that name; of "auto", an accelerator if there is one.

    Raises:
        ValueError: there is no such device.
    """
    import torch

    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device
