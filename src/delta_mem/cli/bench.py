"""`delta-mem bench`: what the memory costs on this machine, as ratios."""

from __future__ import annotations

import json
import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .common import err, find_device, option, out, size, user_errors


class Part(str, Enum):
    all = "all"
    operator = "operator"
    model = "model"


def bench(
    part: Annotated[Part, typer.Argument(help="What to measure.")] = Part.all,
    device: Annotated[str, option(metavar="NAME", help="cpu, cuda, or auto.", show_default=True)] = "auto",
    rounds: Annotated[
        int,
        option(
            metavar="N",
            min=1,
            help="Rounds, each of which runs every variant once; long parts have half as many, at least 3.",
            show_default=True,
        ),
    ] = 7,
    output: Annotated[
        Path | None, option(metavar="FILE", help="Write the rows and the machine to this JSON file.")
    ] = None,
) -> None:
    """Measure what the memory costs on this machine.

    It is compared with the frozen model and LoRA, in turn, so that a busy machine slows all; read the ratios.
    On a CPU a small Qwen3 is measured, on a GPU the shape of Qwen3-4B; weights are random.

    Example: delta-mem bench model --rounds 15 --output bench.json
    """
    import torch

    from .. import benchmark
    from ..files import write_atomically

    if output is not None:
        with user_errors():  # a wrong path shows here, before the minutes that measuring takes
            output.parent.mkdir(parents=True, exist_ok=True)
            if output.is_dir() or not os.access(output.parent, os.W_OK):
                raise ValueError(f"--output {output}: no file can be written there.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with user_errors():
        if find_device(device).type not in ("cpu", "cuda") or ":" in device:
            raise ValueError(f"--device {device}: cpu, cuda, or auto.")
    about = benchmark.machine(device)
    out.print(", ".join(f"{name} {value}" for name, value in about.items()), style="dim")
    parts = {Part.operator: benchmark.operator, Part.model: benchmark.model}
    rows: list[dict[str, Any]] = []
    for name, measure in parts.items():
        if part not in (Part.all, name):
            continue
        found: list[dict[str, Any]] = []
        with err.status(f"measuring the {name.value} …") as status:
            for row in measure(device, rounds):
                found.append({"part": name.value, **row})
                told = f"measured {row['name']}, {row['variant']}"
                status.update(told)
                if not err.is_terminal:
                    err.print(told, markup=False, soft_wrap=True)
        out.print(_table(name.value, found))
        rows += found
    if output is not None:
        write_atomically(output, json.dumps({"machine": about, "rows": rows}, indent=2) + "\n")
        err.print(f"Wrote {output}.")


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1), title_style="bold")
    table.add_column("")
    for column in ("variant", "ms", "spread", "ratio", "memory"):
        table.add_column(column, justify="left" if column == "variant" else "right", no_wrap=True)
    before = None
    for row in rows:
        spread = f"{_milliseconds(row['low'])}-{_milliseconds(row['high'])}"
        table.add_row(
            row["name"] if row["name"] != before else "",
            row["variant"],
            _milliseconds(row["seconds"]),
            spread,
            f"{row['ratio']:.3f}" if row["ratio"] >= 0.1 else f"1/{1 / row['ratio']:,.0f}",
            "" if row["bytes"] is None else size(row["bytes"]),
        )
        before = row["name"]
    return table


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:,.0f}"
