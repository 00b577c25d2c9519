"""`delta-mem info`: what an adapter, a memory or a saved chat is, and whether it is well.

`describe` gathers everything as JSON-ready values; `--json` prints those, `show` draws them. A norm that
is NaN or infinite is None there: JSON has no word for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .common import facts_table, layer_grid, number, option, out, plural, size, user_errors

if TYPE_CHECKING:
    from torch import Tensor

    from ..config import DeltaMemConfig

# At rest (for an input of zeros) a write gate beyond these writes next to nothing, or nothing but the last
# token.
SHUT, OPEN = 0.001, 0.999


def info(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="An adapter (folder or hub id), a memory file, or a saved chat.",
            show_default=False,
        ),
    ],
    as_json: Annotated[bool, option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Describe an adapter, a memory or a saved chat, and its health.

    Reads both adapter formats, delta-mem's and the authors'. No backbone is needed.

    Example: delta-mem info my-adapter
    """
    with user_errors():
        facts = describe(path)
    if as_json:
        print(json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        show(facts)


# ---- gathering -------------------------------------------------------------------------------------


def describe(path: str) -> dict[str, Any]:
    """Everything `info` says about `path`, JSON-ready; its "kind" is adapter, memory or session.

    Raises:
        FileNotFoundError, AdapterFormatError: nothing there, or broken, or none of the three.
    """
    from .. import checkpoint
    from ..chat import SESSION_FILE

    place = Path(path)
    parts = (SESSION_FILE, checkpoint.CONFIG_FILE, checkpoint.WEIGHTS_FILE, checkpoint.OFFICIAL_WEIGHTS_FILE)
    if place.name in parts:
        place = place.parent
    if place.is_file() or place.suffix == ".safetensors":
        return _describe_memory(place)
    if (place / SESSION_FILE).is_file():
        return _describe_session(place)
    if place.is_dir() and not (place / checkpoint.CONFIG_FILE).exists():
        raise FileNotFoundError(
            f"{place} holds neither {checkpoint.CONFIG_FILE} (an adapter) nor {SESSION_FILE} (a saved chat)."
        )
    return _describe_adapter(str(place))


def _describe_adapter(path: str) -> dict[str, Any]:
    from .. import checkpoint
    from ..config import DeltaMemConfig

    adapter = checkpoint.load_adapter(path)
    if not adapter.weights:
        raise ValueError(f"{adapter.source}: holds no weights.")
    config, layers = adapter.config.to_dict(), adapter.layers
    defaults = DeltaMemConfig().to_dict()
    groups: dict[str, dict[int, Tensor]] = {name: {} for name in _weights_of(adapter.config)}
    for name, weight in adapter.weights.items():
        _, layer, group = name.split(".")
        groups.setdefault(group, {})[int(layer)] = weight
    gates = [b.float().sigmoid() for b in groups["beta_bias"].values()]
    values = [float(value) for gate in gates for value in gate.flatten()]
    return {
        "kind": "adapter",
        "path": path,
        "format": "official" if adapter.official else "delta-mem",
        "config": config,
        "changed": {name: defaults[name] for name, value in config.items() if value != defaults[name]},
        "fingerprint": adapter.fingerprint(),
        "backbone": adapter.backbone,
        "layers": layers,
        "parameters": sum(weight.numel() for weight in adapter.weights.values()),
        "bytes": sum(weight.numel() * weight.element_size() for weight in adapter.weights.values()),
        "memory_bytes": len(layers) * adapter.config.num_states * adapter.config.rank**2 * 4,
        "norms": {
            group: {str(layer): _finite(by_layer[layer].float().norm()) for layer in sorted(by_layer)}
            for group, by_layer in groups.items()
        },
        "write_gate_at_rest": _spread(values),
        "health": _adapter_problems(adapter.config, layers, groups, values),
    }


def _weights_of(config: DeltaMemConfig) -> list[str]:
    """The names of a layer's weights."""
    import torch

    from ..memory import DeltaMemory

    with torch.device("meta"):
        return list(DeltaMemory(config, 1, dict.fromkeys(config.heads, 1)).named_weights())


def _adapter_problems(
    config: DeltaMemConfig, layers: list[int], groups: dict[str, dict[int, Tensor]], gates: list[float]
) -> list[str]:
    problems = []
    wanted = _weights_of(config)
    corrections = [name for name in wanted if name.startswith("delta_")]
    for name in wanted:
        absent = sorted(set(layers) - set(groups[name]))
        if absent:
            problems.append(f"{name} is missing in {_layers(absent)}")
    for name, by_layer in groups.items():
        broken = [layer for layer, weight in sorted(by_layer.items()) if not weight.isfinite().all()]
        if broken:
            problems.append(f"{name} holds NaN or infinity in {_layers(broken)}")
    still = [name for name in corrections if not any(w.any() for w in groups[name].values())]
    if config.alpha == 0:
        problems.append("has no effect: alpha is 0")
    elif still == corrections:
        problems.append("has no effect: all corrections are zero")
    elif still:
        problems.append(f"corrects nothing with {', '.join(still)}: all zero")
    if gates and all(gate < SHUT for gate in gates):
        problems.append(f"all write gates are shut at rest (below {SHUT}): next to nothing is written")
    if gates and all(gate > OPEN for gate in gates):
        problems.append(
            f"all write gates are wide open at rest (above {OPEN}): every token replaces the last"
        )
    return problems


def _describe_memory(path: Path) -> dict[str, Any]:
    from ..state import MemoryState, read_metadata

    data = path.read_bytes()
    memory = MemoryState.from_bytes(data, name=str(path))
    metadata = read_metadata(data)
    states = list(memory.layers.values())
    norms = [state.flatten(1).norm(dim=1) for state in states]  # by layer, [rows]
    ranks = [_effective_rank(state).mean(1) for state in states]
    rows = [
        {
            "tokens_written": int(memory.tokens_written[row]),
            "norms": {str(layer): float(norm[row]) for layer, norm in zip(memory.layers, norms, strict=True)},
            "effective_rank": {
                str(layer): float(rank[row]) for layer, rank in zip(memory.layers, ranks, strict=True)
            },
            "open_segment_tokens": None
            if memory.open_segment is None
            else int(memory.open_segment.count[row]),
        }
        for row in range(memory.batch_size)
    ]
    problems = []
    for index, row in enumerate(rows):
        empty = not any(row["norms"].values())
        if empty and row["tokens_written"] and not row["open_segment_tokens"]:
            problems.append(f"row {index}: {row['tokens_written']} tokens written, but every state is zero")
    return {
        "kind": "memory",
        "path": str(path),
        "format_version": metadata["format_version"],
        "adapter": memory.adapter,
        "backbone": memory.backbone,
        "created": memory.created,
        "saved": metadata.get("saved"),
        "writes": "tokens" if memory.open_segment is None else "segments",
        "num_states": states[0].shape[1],
        "rank": states[0].shape[-1],
        "layers": list(memory.layers),
        "bytes": memory.nbytes,
        "file_bytes": len(data),
        "rows": rows,
        "health": problems,
    }


def _describe_session(folder: Path) -> dict[str, Any]:
    from ..chat import read_session

    values = read_session(folder)
    roles = [message["role"] for message in values["messages"]]
    return {
        "kind": "session",
        "path": str(folder),
        "format_version": values["format_version"],
        "window": values["window"],
        "messages": {role: roles.count(role) for role in dict.fromkeys(roles)},
        "can_regenerate": values["before"] is not None,
        "memory": _describe_memory(folder / values["memory"]),
    }


def _effective_rank(state: Tensor) -> Tensor:
    """How many directions a state uses, between 0 (zeros) and r: exp of the entropy of its singular values.

    state: [..., r, r]; returns [...].
    """
    import torch

    values = torch.linalg.svdvals(state)
    shares = values / values.sum(-1, keepdim=True).clamp(min=1e-30)
    return torch.where(values[..., 0] > 0, torch.special.entr(shares).sum(-1).exp(), 0.0)


def _spread(values: Iterable[float | None]) -> dict[str, float | None] | None:
    """min, median and max; NaN and infinity count as None and make all of them None."""
    import statistics

    values = list(values)
    if not values:
        return None
    if any(_finite(value) is None for value in values):
        return {"min": None, "median": None, "max": None}
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


# ---- showing ---------------------------------------------------------------------------------------


def show(facts: dict[str, Any]) -> None:
    {"adapter": _show_adapter, "memory": _show_memory, "session": _show_session}[facts["kind"]](facts)


def _show_adapter(facts: dict[str, Any]) -> None:
    from ..config import HEADS

    backbone = dict(facts["backbone"])
    name = backbone.pop("name_or_path", None) or backbone.pop("model_type", None)
    heads = backbone.pop("heads", {})
    known = [f"{key} {value}" for key, value in backbone.items() if value is not None]
    widths = " ".join(f"{head}:{heads[head]}" for head in HEADS if head in heads)
    known += [f"projections {widths}"] if widths else []
    formats = {"delta-mem": "delta-mem", "official": "the authors' (official)"}
    _title("Adapter", facts["path"])
    out.print(
        facts_table(
            {
                "format": formats[facts["format"]],
                "fingerprint": facts["fingerprint"][:12],
                "backbone": Text(name or "not recorded", style="bold" if name else "dim"),
                "": ", ".join(known) or None,
                "layers": f"{len(facts['layers'])}: {_ranges(facts['layers'])}",
                "parameters": f"{facts['parameters']:,} ({size(facts['bytes'])})",
                "memory": f"{size(facts['memory_bytes'])} a conversation",
            }
        )
    )
    settings = Table.grid(padding=(0, 2))
    for name, value in facts["config"].items():
        changed = name in facts["changed"]
        settings.add_row(
            Text(name, style="yellow" if changed else "dim"),
            Text(_setting(value), style="bold yellow" if changed else ""),
            Text(f"default {_setting(facts['changed'][name])}" if changed else "", style="dim"),
        )
    _section("settings")
    out.print(settings)
    _section("weights: norm over layers")
    rows = {group: _spread(norms.values()) for group, norms in facts["norms"].items()}
    if facts["write_gate_at_rest"]:
        rows["write gate at rest"] = facts["write_gate_at_rest"]
    out.print(_spread_table(rows))
    _show_health(facts["health"])


def _show_memory(facts: dict[str, Any], titled: bool = True) -> None:
    rows = facts["rows"]
    if titled:
        _title("Memory", facts["path"])
    tokens = [row["tokens_written"] for row in rows]
    listed = ", ".join(f"{count:,}" for count in tokens[:8]) + (", …" if len(tokens) > 8 else "")
    waiting = [row["open_segment_tokens"] or 0 for row in rows]
    shape = f"{facts['rank']} × {facts['rank']}"
    shape = shape if facts["num_states"] == 1 else f"{facts['num_states']} of {shape}"
    out.print(
        facts_table(
            {
                "backbone": facts["backbone"] or "not recorded",
                "adapter": facts["adapter"][:12] if facts["adapter"] else "not recorded (it was in training)",
                "created": _date(facts["created"]),
                "saved": _date(facts["saved"]),
                "tokens taken in": listed if len(rows) == 1 else f"{listed} ({len(rows)} rows)",
                "open segment": f"{sum(waiting):,} of them not written yet" if any(waiting) else None,
                "states": f"{shape} in {plural(len(facts['layers']), 'layer')}, {size(facts['bytes'])}",
                "file": size(facts["file_bytes"]),
            }
        )
    )
    norms, ranks = _mean(row["norms"] for row in rows), _mean(row["effective_rank"] for row in rows)
    mean = "" if len(rows) == 1 else ", mean of the rows"
    _section(f"states over layers{mean}")
    out.print(
        _spread_table(
            {"norm": _spread(norms.values()), f"rank used, of {facts['rank']}": _spread(ranks.values())}
        )
    )
    _section(f"norm by layer{mean}")
    out.print(layer_grid(norms))
    _show_health(facts["health"])


def _show_session(facts: dict[str, Any]) -> None:
    _title("Saved chat", facts["path"])
    messages = ", ".join(f"{count} {role}" for role, count in facts["messages"].items())
    window = "all messages" if facts["window"] is None else plural(facts["window"], "message")
    out.print(facts_table({"messages": messages or "none yet", "window": window}))
    _section("its memory")
    _show_memory(facts["memory"], titled=False)


def _show_health(problems: list[str]) -> None:
    _section("health")
    if not problems:
        out.print("no problem found", style="green")
    for problem in problems:
        out.print(f"! {problem}", style="red", markup=False)


def _title(kind: str, path: str) -> None:
    out.print(Text.assemble((kind, "bold"), f"  {path}"), soft_wrap=True)


def _section(name: str) -> None:
    out.print(Text(f"\n{name}", style="bold"))


def _spread_table(rows: dict[str, dict[str, float | None] | None]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for column in ("", "min", "median", "max"):
        table.add_column(column, justify="right" if column else "left")
    for name, spread in rows.items():
        if spread:
            table.add_row(Text(name, style="dim"), *(number(spread[key]) for key in ("min", "median", "max")))
    return table


def _mean(rows: Iterable[dict[str, float]]) -> dict[int, float]:
    rows = list(rows)
    return {int(layer): sum(row[layer] for row in rows) / len(rows) for layer in rows[0]}


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _date(text: str | None) -> str | None:
    return text and text.replace("T", " ").replace("+00:00", " UTC")


def _layers(indices: list[int]) -> str:
    return f"layer{'' if len(indices) == 1 else 's'} {_ranges(indices)}"


def _ranges(indices: list[int]) -> str:
    """0, 1, 2, 5 as "0–2, 5"."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
