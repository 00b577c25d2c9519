"""`delta-mem eval`: benchmarks, and the memory's rivals on them, in one table.

What was predicted is kept in the output folder, line by line, and so are the settings that it depends on: the
same command goes on where a run was killed, and one with more tasks, systems or questions adds to it.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import shlex
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .common import (
    INTERRUPTED,
    DeviceOption,
    Dtype,
    DtypeOption,
    catch_interrupts,
    complain,
    err,
    find_adapter,
    find_model,
    holds,
    load_backbone,
    new_folder,
    option,
    out,
    plural,
)

if TYPE_CHECKING:
    from ..evaluation.systems import System, SystemOptions
    from ..evaluation.tasks import Example, Task

SETTINGS_FILE = "settings.json"
WIDE = 90  # columns that the table wants
SHOWN_PROBLEMS = 20  # of rows that cannot be used; the rest are counted


def evaluate(
    tasks: Annotated[
        list[str],
        typer.Argument(
            metavar="TASK",
            help="recall, sgd, locomo, memory-agent-bench, hotpotqa; with options: recall:facts=8.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str,
        option(
            "--model",
            "-m",
            metavar="NAME",
            help="The backbone: a folder, a hub id, or 'offline', the small model that comes with delta-mem.",
        ),
    ],
    output: Annotated[
        Path,
        option("--output", "-o", metavar="DIR", help="For predictions and results; a run goes on in it."),
    ],
    adapter: Annotated[
        list[str] | None,
        option(
            "--adapter",
            "-a",
            metavar="[LABEL=]NAME",
            help="A memory's adapter: a folder, or a hub id; tsw, ssw or msw of the offline model. "
            "Repeatable; the folder's name is the label.",
        ),
    ] = None,
    systems: Annotated[
        str | None,
        option(
            "--systems",
            "-s",
            metavar="LIST",
            help="none, full, window, bm25, dense, lora, prefix, delta, and delta with one of the contexts: "
            "delta+full, delta+window, …; of several adapters one alone: delta[tsw].",
            show_default="none,full,bm25, and delta if there is an adapter",
        ),
    ] = None,
    lora: Annotated[
        str | None, option(metavar="NAME", help="LoRA adapter for 'lora', in PEFT's format.")
    ] = None,
    prefix: Annotated[
        str | None, option(metavar="NAME", help="Prefix or prompt for 'prefix', in PEFT's format.")
    ] = None,
    data: Annotated[
        list[str] | None,
        option(
            "--data",
            "-d",
            metavar="[TASK=]FILE",
            help="The task's data. Without it, from the hub where the task is there.",
        ),
    ] = None,
    limit: Annotated[
        int | None, option(metavar="N", min=1, help="Ask the first N questions of a task.")
    ] = None,
    batch_size: Annotated[
        int, option(metavar="N", min=1, help="Questions answered together.", show_default=True)
    ] = 16,
    context_tokens: Annotated[
        int | None,
        option(
            metavar="N",
            min=1,
            help="Longest prompt, in tokens; messages that do not fit are left out.",
            show_default="as many as the model has positions for",
        ),
    ] = None,
    window: Annotated[
        int, option(metavar="N", min=1, help="Messages that 'window' sees.", show_default=True)
    ] = 8,
    top_k: Annotated[
        int, option(metavar="K", min=1, help="Messages that 'bm25' and 'dense' see.", show_default=True)
    ] = 8,
    encoder: Annotated[
        str | None,
        option(metavar="NAME", help="The embeddings of 'dense'.", show_default="all-MiniLM-L6-v2"),
    ] = None,
    write_chunk: Annotated[
        int,
        option(
            metavar="N",
            min=1,
            help="Write a history N tokens at a time, as it was trained.",
            show_default=True,
        ),
    ] = 2048,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.auto,
    seed: Annotated[int, option(metavar="N", help="Of all that a task draws.", show_default=True)] = 0,
) -> None:
    """Ask benchmarks of a memory and of its rivals.

    Writes a table with scores and costs. Run the same command again to go on with a run that was stopped. On
    several GPUs, or in several processes: torchrun --nproc-per-node 8 --no-python delta-mem eval …

    Example: delta-mem eval recall -m offline -s none,full,delta -o results
    """
    from ..evaluation.systems import NoContext, SystemOptions, expand_names, open_system
    from ..evaluation.systems.context import ENCODER
    from ..evaluation.tasks import parse

    process = Process()
    err.quiet = not process.first
    with _user_errors(process), new_folder(output):
        from ..evaluation.runner import Predictions, predict

        chosen = {task.spec: task for task in map(parse, tasks)}
        files = parse_data(data or [], chosen)
        backbone_name, own, dtype = find_model(model, dtype)
        adapters = {
            label: find_adapter(name, own) for label, name in parse_adapters(adapter or list(own)).items()
        }
        options = SystemOptions(
            adapters=adapters,
            lora=lora,
            prefix=prefix,
            context_tokens=context_tokens,
            window=window,
            top_k=top_k,
            encoder=encoder or ENCODER,
            write_chunk=write_chunk,
            batch_size=batch_size,
        )
        wanted = (systems or "none,full,bm25" + (",delta" if adapters else "")).split(",")
        named = expand_names([name.strip() for name in wanted], options)
        asked = [(task, _examples(task, files.get(task.name), limit, seed)) for task in chosen.values()]
        if process.first:
            data_of = {task.name: files.get(task.name) for task in chosen.values()}
            settings = _settings(backbone_name, options, data_of, dtype, seed)
            _check_settings(output, settings)
        err.print(f"Loading {model} …", style="dim", markup=False, soft_wrap=True)
        backbone, tokenizer = _load(backbone_name, process.device(device), dtype)
        longest = max(q.max_new_tokens for _, examples in asked for e in examples for q in e.questions)
        for one in named:  # what is missing for the last of them is missing now
            with open_system(one, backbone, tokenizer, options) as system:
                system.limit(longest)
        if process.first:
            _warn_of_long_questions(asked, NoContext(backbone, tokenizer, context_tokens=context_tokens))
            _keep_settings(output, settings)
    process.join()

    from torch import OutOfMemoryError

    catch_interrupts()
    try:
        with _user_errors(process):
            predictions = Predictions(output, process.rank)
        names = [one.name for one in named]
        with predictions, ProgressBar(asked, names, predictions.lines, process) as bar:
            for one in named:
                with open_system(one, backbone, tokenizer, options) as system:
                    for task, examples in asked:
                        told = bar.start(task, one.name)
                        predict(system, one.name, task, process.share(examples), predictions, told)
    except KeyboardInterrupt:
        err.print("Stopped. The same command goes on from here.")
        raise typer.Exit(INTERRUPTED) from None
    except OutOfMemoryError as error:
        advice = "try a lower --batch-size or --context-tokens"
        process.fail(ValueError(f"{str(error).splitlines()[0]} ({advice})"))
    except OSError as error:  # such as a full disk
        process.fail(error)
    process.join()
    if process.first:
        with _user_errors(process):
            _report(output, asked, settings, backbone)


@contextlib.contextmanager
def _user_errors(process: Process) -> Iterator[None]:
    """As `common.user_errors`, in one of several processes; a package that is missing is one of them."""
    try:
        yield
    except (ImportError, ValueError, OSError) as error:
        process.fail(error)


# ---- what is asked for -----------------------------------------------------------------------------


def parse_adapters(values: Sequence[str]) -> dict[str, str]:
    """{label: folder or hub id} of "name" and "label=name"; a single one without a label needs none.

    Raises:
        ValueError: two of one label.
    """
    adapters: dict[str, str] = {}
    for value in values:
        label, equals, name = value.partition("=")
        if not equals or Path(value).exists():
            name = value
            label = "" if len(values) == 1 else Path(value).name
        if label in adapters:
            raise ValueError(f"two adapters are labelled {label!r}; name them: --adapter label={name}.")
        adapters[label] = name
    return adapters


def parse_data(values: Sequence[str], tasks: Mapping[str, Task]) -> dict[str, Path]:
    """{task's name: file or folder} of "file", if there is one task only, and "task=file".

    Raises:
        FileNotFoundError: no such file.
        ValueError: nobody knows which task it is for.
    """
    names = list(dict.fromkeys(task.name for task in tasks.values()))
    files: dict[str, Path] = {}
    for value in values:
        name, equals, file = value.partition("=")
        if not equals or name not in names:
            if len(names) > 1:
                raise ValueError(
                    f"--data {value}: of which task? Write one of {', '.join(names)} and = before it."
                )
            name, file = names[0], value
        if not Path(file).exists():
            raise FileNotFoundError(f"--data {file}: no such file.")
        files[name] = Path(file)
    return files


def _examples(task: Task, data: Path | None, limit: int | None, seed: int) -> list[Example]:
    problems: list[str] = []

    def report(problem: str) -> None:
        problems.append(problem)
        if len(problems) <= SHOWN_PROBLEMS:
            err.print(f"warning: {problem}", style="yellow", markup=False, soft_wrap=True)

    examples = list(task.examples(data, limit, seed, report))
    if len(problems) > SHOWN_PROBLEMS:
        rest = plural(len(problems) - SHOWN_PROBLEMS, "more problem")
        err.print(f"warning: {rest} in the data of {task.name}", style="yellow")
    return examples


def _warn_of_long_questions(asked: Iterable[tuple[Task, Sequence[Example]]], system: System) -> None:
    for task, examples in asked:
        questions = [question for example in examples for question in example.questions]
        cut = sum(not system.fits(question.query, question.max_new_tokens) for question in questions)
        if cut:
            of = f"{cut:,} of {plural(len(questions), 'question')}"
            err.print(
                f"warning: {task.spec}: {of} longer than a prompt may be: read without the beginning",
                style="yellow",
                markup=False,
                soft_wrap=True,
            )


def _load(name: str, device: str, dtype: Dtype) -> tuple[Any, Any]:
    backbone, tokenizer = load_backbone(name, device, dtype)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{name}: its tokenizer has no chat template, which histories and questions need.")
    return backbone.eval(), tokenizer


# ---- settings --------------------------------------------------------------------------------------


def _settings(
    model: str, options: SystemOptions, data: Mapping[str, Path | None], dtype: Dtype, seed: int
) -> dict[str, Any]:
    """What predictions depend on, flat, so that a later run may add to it.

    Raises:
        FileNotFoundError, AdapterFormatError: no such adapter, or a broken one.
        OSError: a file cannot be read.
    """
    from ..checkpoint import load_adapter

    made_with = asdict(options)
    del made_with["batch_size"]
    adapters, peft = made_with.pop("adapters"), {kind: made_with.pop(kind) for kind in ("lora", "prefix")}
    return {
        "model": _content(model),
        "dtype": dtype.value,
        "seed": seed,
        **made_with,
        **{
            f"adapter {label}".strip(): load_adapter(name).fingerprint()[:16]
            for label, name in adapters.items()
        },
        **{kind: _content(name) for kind, name in peft.items() if name},
        **{f"data of {task}": file and _content(file) for task, file in data.items()},
    }


def _content(name: str | Path) -> str:
    """What a file or folder is called, and a digest of what is in it; what is on the hub, by its name."""
    path = Path(name)
    if not path.exists():
        return str(name)
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.iterdir()):
        # Not what is beside the content: a model card, the files of a file manager.
        if file.is_file() and file.suffix != ".md" and not file.name.startswith("."):
            digest.update(f"{file.name}\n".encode())
            with file.open("rb") as opened:
                while block := opened.read(2**20):
                    digest.update(block)
    return f"{path.absolute().name} {digest.hexdigest()[:16]}"


def _settings_of(output: Path) -> dict[str, Any]:
    """The settings of what was predicted into a folder."""
    from ..files import read_json

    predicted = any(b"\n" in file.read_bytes() for file in output.glob("predictions*.jsonl"))
    file = output / SETTINGS_FILE
    return read_json(file) if predicted and file.exists() else {}


def _check_settings(output: Path, settings: Mapping[str, Any]) -> None:
    """Sees that what was predicted there, if anything, was predicted with the same settings.

    Raises:
        ValueError: it was not; or something else is there.
    """
    holds(output, SETTINGS_FILE, "run")
    before = _settings_of(output)
    for name, value in settings.items():
        if name in before and before[name] != value:
            raise ValueError(
                f"{output} holds a run with another {name} ({before[name]}, not {value}): "
                "name another folder."
            )


def _keep_settings(output: Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings beside the predictions, together with those that were there."""
    from ..files import write_atomically

    kept = {**_settings_of(output), **settings}
    write_atomically(output / SETTINGS_FILE, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")


# ---- processes -------------------------------------------------------------------------------------


class Process:
    """This process of a run: the only one, or one of those that torchrun has started."""

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.first = self.rank == 0

    def device(self, name: str) -> str:
        """The device of that name; of several processes each has an accelerator of its own."""
        import torch

        if name == "auto" and self.count > 1 and torch.accelerator.is_available():
            kind = torch.accelerator.current_accelerator().type
            return f"{kind}:{int(os.environ.get('LOCAL_RANK', 0)) % torch.accelerator.device_count()}"
        return name

    def fail(self, error: Exception) -> NoReturn:
        """Ends the command with one line."""
        err.quiet = False
        complain(error if self.count == 1 else ValueError(f"process {self.rank}: {error}"))
        raise typer.Exit(1) from None

    def share(self, examples: Sequence[Example]) -> Sequence[Example]:
        """The examples that are this process's."""
        return examples[self.rank :: self.count]

    def join(self) -> None:
        """Waits for the other processes."""
        if self.count == 1:
            return
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
        dist.barrier()


# ---- what is shown ---------------------------------------------------------------------------------


class ProgressBar:
    """The first process's questions and the time left; without a terminal, a line for each system.

    It is a context manager, for an error must end it too.
    """

    def __init__(
        self,
        asked: Sequence[tuple[Task, Sequence[Example]]],
        names: Sequence[str],
        done: Any,
        process: Process,
    ):
        self.left = {
            (task.spec, name): sum(
                (task.spec, name, question.id) not in done
                for example in process.share(examples)
                for question in example.questions
            )
            for task, examples in asked
            for name in names
        }
        per_system = sum(
            len(example.questions) for _, examples in asked for example in process.share(examples)
        )
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=err,
        )
        total = per_system * len(names)
        self.task = self.bar.add_task("", total=total, completed=total - sum(self.left.values()))

    def __enter__(self) -> ProgressBar:
        if err.is_terminal and not err.quiet:
            self.bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.bar.live.is_started:
            self.bar.stop()

    def start(self, task: Task, name: str) -> Any:
        """Goes on to this task and system. Returns what is to be told of every batch."""
        self.bar.update(self.task, description=f"{task.spec}, {name}")
        left = self.left[task.spec, name]
        if not err.is_terminal:
            err.print(f"{task.spec}, {name}: {plural(left, 'question')} to ask", markup=False, soft_wrap=True)
        return lambda count: self.bar.advance(self.task, count)


def _report(
    output: Path,
    asked: Sequence[tuple[Task, Sequence[Example]]],
    settings: Mapping[str, Any],
    backbone: Any,
) -> None:
    from ..evaluation import report
    from ..evaluation.runner import read_predictions
    from ..files import write_atomically

    rows = report.summarize(asked, read_predictions(output))
    results = {
        "command": shlex.join(["delta-mem", *sys.argv[1:]]),
        "settings": settings,
        "machine": _machine(backbone.device.type),
        "results": rows,
    }
    write_atomically(output / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    write_atomically(output / "table.md", report.markdown(rows))
    for task, _ in asked:
        out.print(_table(report, [row for row in rows if row["task"] == task.spec]))
    written = ["results.json", "table.md"]
    try:
        report.plot(rows, output / "plot.png")
        written.append("plot.png")
    except ImportError as error:
        err.print(f"warning: {error}", style="yellow", markup=False, soft_wrap=True)
    err.print(f"Wrote {', '.join(written)} in {output}.", markup=False, soft_wrap=True)


def _machine(device: str) -> dict[str, str]:
    from .. import __version__
    from ..benchmark import machine

    about = {**machine(device), "delta-mem": __version__}
    for package in ("bm25s", "datasets", "nltk", "sentence-transformers", "tokenizers"):
        with contextlib.suppress(PackageNotFoundError):
            about[package] = version_of(package)
    return about


def _table(report: Any, rows: Sequence[Mapping[str, Any]]) -> Table:
    title = f"{rows[0]['task']} ({rows[0]['metric']} of {plural(rows[0]['questions'], 'question')})"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1), title_style="bold")
    for column in report.COLUMNS:
        # In two lines, or if there is no room a line for each word: the cells are what needs the width.
        widest = len(column) // 2 + 1 if out.width >= WIDE else 1
        heading = textwrap.fill(column, widest, break_long_words=False)
        table.add_column(heading, justify="left" if column == "system" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in report.cells(row)))
    return table
