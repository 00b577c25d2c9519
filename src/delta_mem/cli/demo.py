"""`delta-mem demo`: facts are told, the context is cleared, and only the memory can answer; offline."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .chat import Conversation
from .common import err, option, out, printable, size, user_errors

if TYPE_CHECKING:
    from ..evaluation.systems import System

TOLD = (
    "My name is Clara.",
    "By the way, my brother lives in Lisbon.",
    "The weather is lovely today.",
    "My sister plays tennis, but I spend every weekend on pottery.",
    "I have booked a holiday in Iceland.",
    "Correction: I have booked a holiday in Japan.",
)
ASKED = (
    "What is my name?",
    "Where does my brother live?",
    "Which hobby do I enjoy most?",
    "Where have I booked a holiday?",
)
FACTS = (1, 2, 4, 8, 16)
NAMES = {
    "none": "no history",
    "full": "full history",
    "tsw": "δ-mem TSW",
    "ssw": "δ-mem SSW",
    "msw": "δ-mem MSW",
}


def demo(
    interactive: Annotated[
        bool, option("--interactive", "-i", help="Then go on with the conversation yourself.")
    ] = False,
    questions: Annotated[
        int, option(metavar="N", min=1, help="Questions in each cell of the recall table.", show_default=True)
    ] = 48,
    plot: Annotated[
        Path | None,
        option(metavar="FILE", help="Draw the recall table to this file (.png, .svg, .pdf)."),
    ] = None,
) -> None:
    """See facts remembered when the history is gone, offline.

    In under a minute. A small model that comes with the package is told a few facts. Then its context is
    cleared and it is asked: without the history, with all of it, and with nothing but the memory. A table of
    recall follows, measured on the spot on conversations that it never saw.

    Example: delta-mem demo --interactive
    """
    with user_errors():
        if plot is not None:
            _check_plot(plot)
    with err.status("Loading the offline model …"):
        from transformers.utils import logging

        from .. import ChatSession
        from ..evaluation.systems import FullContext, Memory, NoContext
        from ..offline import ADAPTERS, load_offline_model

        logging.disable_progress_bar()
        models = {name: load_offline_model(name) for name in ADAPTERS}
        model, tokenizer = models["tsw"]

    chat = ChatSession(model, tokenizer, window=1)
    out.print("A conversation. Each message leaves the context as soon as it is answered.\n", style="dim")
    for text in TOLD:
        _say("you", text)
        _say("model", chat.send(text))

    out.print("\nThe context is cleared. What is left:\n", style="dim")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for column in ("question", "no history", "full history", "only the memory"):
        table.add_column(column, overflow="fold")
    frozen = [NoContext(model.backbone, tokenizer), FullContext(model.backbone, tokenizer)]
    for query in ASKED:
        replies = [system.answer(system.keep([chat.messages]), [0], [query])[0].text for system in frozen]
        table.add_row(*map(printable, (query, *replies, chat.fork().send(query))))
    out.print(table)
    cache = FullContext(model.backbone, tokenizer)
    history = cache.bytes_kept(cache.keep([chat.messages]))
    out.print(
        f"\nThe memory is {size(chat.memory.nbytes)}; the KV cache that it stands in for is "
        f"{size(int(history))}."
    )

    systems: dict[str, System] = {
        "none": NoContext(model.backbone, tokenizer, 16, 64),
        "full": FullContext(model.backbone, tokenizer, 16, 64),
        **{name: Memory(*models[name], 16, 64) for name in models},
    }
    recall = _measure(systems, questions)
    out.print()
    out.print(_recall_table(recall))
    out.print(
        f"Share of questions answered rightly, of {questions} in each cell, with 95 % intervals. The facts "
        "and the sentences around them never occurred in training.",
        style="dim",
    )
    if plot is not None:
        with user_errors():
            _draw(recall, plot)
        out.print(f"Drawn to {plot}.", markup=False, soft_wrap=True)
    if interactive:
        _go_on(chat)


def _say(who: str, text: str) -> None:
    out.print(Text.assemble((f"{who:<6} ", "dim"), printable(text)))


# ---- the recall table ------------------------------------------------------------------------------


Cell = tuple[float, float, float]  # share answered rightly, and its 95 % interval


def _measure(systems: dict[str, System], questions: int) -> dict[str, dict[int, Cell]]:
    """{system: {facts: share}} on held-out conversations; each of them is asked at most four questions."""
    from ..evaluation.scoring import confidence_interval
    from ..evaluation.tasks.recall import ask, held_out

    result: dict[str, dict[int, Cell]] = {name: {} for name in systems}
    columns = (TextColumn("Measuring recall"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("", total=len(FACTS) * len(systems))
        for facts in FACTS:
            talks = held_out(questions, facts)
            for name, system in systems.items():
                right = ask(system, talks)
                result[name][facts] = (sum(right) / len(right), *confidence_interval(right))
                progress.advance(task)
    return result


def _recall_table(recall: dict[str, dict[int, Cell]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("facts told")
    for facts in FACTS:
        table.add_column(str(facts), justify="right")
    for name, cells in recall.items():
        # In few words: with all its columns the table is to fit into 80.
        shares = (
            f"{share:.0%} [dim]{low * 100:.0f}–{high * 100:.0f}[/dim]" for share, low, high in cells.values()
        )
        table.add_row(NAMES[name], *shares)
    return table


def _check_plot(file: Path) -> None:
    """
    Raises:
        ValueError: there is nothing to draw with, or the file's kind is unknown.
        OSError: no such folder, or a file that cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('--plot needs matplotlib: pip install -e ".[plot]"') from None
    kinds = Figure().canvas.get_supported_filetypes()
    if file.suffix[1:].lower() not in kinds:
        raise ValueError(f"--plot {file}: the name must end in one of {', '.join(sorted(kinds))}.")
    if not file.absolute().parent.is_dir():
        raise FileNotFoundError(f"{file.parent}: no such folder.")
    file.open("ab").close()  # or else it would show only when the demo is over


def _draw(recall: dict[str, dict[int, Cell]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="facts told", ylabel="recall", ylim=(-0.02, 1.02))
    for name, cells in recall.items():
        shares, lows, highs = zip(*cells.values(), strict=True)
        axes.plot(FACTS, shares, marker="o", label=NAMES[name], linestyle="-" if "δ" in NAMES[name] else "--")
        axes.fill_between(FACTS, lows, highs, alpha=0.15)
    axes.set_xscale("log", base=2)
    axes.set_xticks(FACTS, [str(facts) for facts in FACTS])
    axes.legend()
    figure.savefig(file, dpi=150)


# ---- going on --------------------------------------------------------------------------------------


def _go_on(chat: Any) -> None:
    from ..chat import ChatSession

    err.print(
        "\nGo on: tell it something in its own kind of words, and ask. /memory looks into the memory, /help "
        "lists the commands, Ctrl-D leaves.",
        style="dim",
    )
    Conversation(
        chat, lambda path: ChatSession.load(path, chat.model, chat.tokenizer), sys.stdin.isatty()
    ).run()
