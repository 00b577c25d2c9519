"""From predictions to results: a row for each task and system, as a Markdown table and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .runner import Key, Line
from .scoring import confidence_interval
from .tasks import Example, Task

Row = dict[str, Any]

COLUMNS = (
    "system",
    "score, % (95 % interval)",
    "tokens read per question",
    "seconds per question",
    "bytes kept per conversation",
    "peak memory",
)


def summarize(tasks: Iterable[tuple[Task, Sequence[Example]]], lines: Mapping[Key, Line]) -> list[Row]:
    """A row for each task and each system that has answered all its questions, in their order.

    A row holds "task", "system", "metric" and "questions" (their number); "score", its 95 % bootstrap
    interval "low" and "high"; "metrics", the means of all scores, and "categories", {category: {"questions",
    "score"}}; then means: "tokens_read" and "seconds" per question, "bytes_kept" and "seconds_to_keep" per
    conversation; and "peak_bytes".

    Args:
        tasks: with the examples that count.
        lines: the predictions.
    """
    rows = []
    for task, examples in tasks:
        asked = [question.id for example in examples for question in example.questions]
        for system in dict.fromkeys(system for spec, system, _ in lines if spec == task.spec):
            found = [lines.get((task.spec, system, question)) for question in asked]
            if all(found):
                rows.append(_row(task, system, found))
    return rows


def _row(task: Task, system: str, lines: list[Line]) -> Row:
    scores = [line["scores"][task.metric] for line in lines]
    low, high = confidence_interval(scores)
    names = dict.fromkeys(name for line in lines for name in line["scores"])
    categories = dict.fromkeys(line["category"] for line in lines if line["category"] is not None)
    conversations = list({line["example"]: line for line in lines}.values())
    return {
        "task": task.spec,
        "system": system,
        "metric": task.metric,
        "questions": len(lines),
        "conversations": len(conversations),
        "score": _mean(scores),
        "low": low,
        "high": high,
        "metrics": {
            name: _mean([line["scores"][name] for line in lines if name in line["scores"]]) for name in names
        },
        "categories": {
            category: _category(task, [line for line in lines if line["category"] == category])
            for category in categories
        },
        "tokens_read": _mean([line["tokens_read"] for line in lines]),
        "seconds": _mean([line["seconds"] for line in lines]),
        "bytes_kept": _mean([line["bytes_kept"] for line in conversations]),
        "seconds_to_keep": _mean([line["seconds_to_keep"] for line in conversations]),
        "peak_bytes": max(line["peak_bytes"] for line in lines),
    }


def _category(task: Task, lines: list[Line]) -> dict[str, Any]:
    return {"questions": len(lines), "score": _mean([line["scores"][task.metric] for line in lines])}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# ---- the table -----------------------------------------------------------------------------------


def markdown(rows: Sequence[Row]) -> str:
    """The rows as Markdown: for each task a table, and one of the categories where there are several."""
    parts = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        first = of_task[0]
        questions = f"{_count(first, 'questions')} about {_count(first, 'conversations')}"
        parts.append(f"## {task}\n\nScore: {first['metric']}; {questions}.\n")
        parts.append(_table(COLUMNS, [cells(row) for row in of_task]))
        names = list(first["categories"])
        if len(names) > 1:
            counts = [f"{name} ({first['categories'][name]['questions']:,})" for name in names]
            shares = [
                [row["system"], *(_percent(row["categories"][name]["score"]) for name in names)]
                for row in of_task
            ]
            parts.append(_table(["score, %, by category (questions)", *counts], shares))
    return "\n".join(parts)


def cells(row: Row) -> list[str]:
    """A row's cells, under `COLUMNS`."""
    return [
        row["system"],
        f"{_percent(row['score'])} ({_percent(row['low'])}–{_percent(row['high'])})",
        f"{row['tokens_read']:,.0f}",
        f"{row['seconds']:.3g}",
        f"{row['bytes_kept']:,.0f}",
        f"{row['peak_bytes'] / 1e6:,.0f} MB",
    ]


def _percent(score: float) -> str:
    return f"{100 * score:.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


# ---- the picture ---------------------------------------------------------------------------------

# Name, and up to where the axis is linear.
COSTS = {
    "tokens_read": ("tokens read per question", 10),
    "bytes_kept": ("bytes kept per conversation", 100),
}


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draws score against cost: for each task what is read per question, and what is kept per conversation.

    Raises:
        ImportError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ImportError('the plot needs matplotlib: pip install -e ".[plot]"') from None

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(5.5 * len(COSTS), 3.8 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), len(COSTS), squeeze=False, sharey="row")
    systems = list(dict.fromkeys(row["system"] for row in rows))
    for task, line in zip(tasks, panels, strict=True):
        of_task = [row for row in rows if row["task"] == task]
        line[0].set_ylabel(f"{task}: {of_task[0]['metric']}")
        for axes, (cost, (label, linear)) in zip(line, COSTS.items(), strict=True):
            for row in of_task:
                place = systems.index(row["system"])
                axes.errorbar(
                    row[cost],
                    row["score"],
                    yerr=[[max(0, row["score"] - row["low"])], [max(0, row["high"] - row["score"])]],
                    fmt="s" if row["system"].startswith("delta") else "o",
                    color=f"C{place % 10}",
                    capsize=3,
                    label=row["system"],
                )
            axes.set_xlabel(label)
            # Nothing at all is a cost, too.
            axes.set_xscale("symlog", linthresh=linear)
            axes.set_xlim(left=-linear / 4)
            axes.set_ylim(-0.03, 1.03)
            axes.grid(alpha=0.3)
        line[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=150)


def _count(row: Row, things: str) -> str:
    return f"{row[things]:,} {things if row[things] != 1 else things.removesuffix('s')}"
