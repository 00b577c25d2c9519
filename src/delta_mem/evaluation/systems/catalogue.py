"""The systems by name, put on a backbone and taken off again."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...files import download
from .base import System
from .context import (
    ENCODER,
    BM25Context,
    Context,
    DenseContext,
    FullContext,
    NoContext,
    WindowContext,
    load_encoder,
)
from .memory import WRITE_CHUNK, Memory
from .static import StaticAdapter

CONTEXTS = ("full", "window", "bm25", "dense")
NAMES = ("none", *CONTEXTS, "lora", "prefix", "delta", *(f"delta+{name}" for name in CONTEXTS))


@dataclass(frozen=True)
class SystemOptions:
    """What systems are made with.

    Attributes:
        adapters: {label: folder or hub id} of memory adapters. The label "" stands in no name.
        lora, prefix: folders or hub ids of PEFT adapters.
        context_tokens: longest prompt; None: what the model has positions for.
        window: messages in the context of `window`.
        top_k: messages in the context of `bm25` and `dense`.
        encoder: the sentence-transformers model of `dense`.
        write_chunk: tokens of a history that are written at a time.
        batch_size: prompts that are decoded together.
    """

    adapters: Mapping[str, str] = field(default_factory=dict)
    lora: str | None = None
    prefix: str | None = None
    context_tokens: int | None = None
    window: int = 8
    top_k: int = 8
    encoder: str = ENCODER
    write_chunk: int = WRITE_CHUNK
    batch_size: int = 16


@dataclass(frozen=True)
class Chosen:
    """A system that was asked for.

    Attributes:
        name: what it is called in tables: "bm25", "delta[tsw]+bm25".
        context: "none", one of `CONTEXTS`, "lora" or "prefix".
        adapter: of its memory, a folder or hub id; None: it has no memory.
    """

    name: str
    context: str
    adapter: str | None = None


def expand_names(names: Sequence[str], options: SystemOptions) -> list[Chosen]:
    """The systems that `names` stand for: "delta" is one for each adapter, "delta[tsw]" and "delta[ssw]".

    Raises:
        ValueError: an unknown name, or one that needs an adapter that is not given.
    """
    expanded: list[Chosen] = []
    for name in names:
        one = re.fullmatch(r"delta\[(.*)\](\+\w+)?", name)
        kind = "delta" + (one[2] or "") if one else name
        if kind not in NAMES:
            raise ValueError(f"there is no system {name!r}; there are {', '.join(NAMES)}.")
        if kind in ("lora", "prefix") and getattr(options, kind) is None:
            raise ValueError(f"{kind} needs a PEFT adapter trained for this backbone: --{kind} NAME.")
        if not kind.startswith("delta"):
            expanded.append(Chosen(kind, kind))
            continue
        if not options.adapters:
            raise ValueError(f"{name} needs the memory's trained weights: --adapter NAME.")
        if one and one[1] not in options.adapters:
            raise ValueError(f"{name}: no adapter has this label; give one by --adapter {one[1]}=NAME.")
        context = kind.removeprefix("delta").removeprefix("+") or "none"
        for label in [one[1]] if one else options.adapters:
            called = kind.replace("delta", f"delta[{label}]") if label else kind
            expanded.append(Chosen(called, context, options.adapters[label]))
    return list(dict.fromkeys(expanded))


@contextlib.contextmanager
def open_system(chosen: Chosen, backbone: Any, tokenizer: Any, options: SystemOptions) -> Iterator[System]:
    """The system (one of `expand_names`) on a backbone, which is itself again afterwards.

    Raises:
        ImportError: a package that the system needs is missing.
        ValueError, OSError: an adapter cannot be loaded, or is not for this backbone.
    """
    if chosen.context in ("lora", "prefix"):
        with _peft(getattr(options, chosen.context), chosen.context, backbone) as model:
            yield StaticAdapter(model, tokenizer, **_common(options))
    elif chosen.adapter is not None:
        from ...model import DeltaMemModel

        model = DeltaMemModel.from_pretrained(backbone, chosen.adapter)
        try:
            beside = None if chosen.context == "none" else _context(chosen.context, model, tokenizer, options)
            chunk = options.write_chunk
            yield Memory(model, tokenizer, context=beside, write_chunk=chunk, **_common(options))
        finally:
            model.detach()
    else:
        yield _context(chosen.context, backbone, tokenizer, options)


def _common(options: SystemOptions) -> dict[str, Any]:
    return {"batch_size": options.batch_size, "context_tokens": options.context_tokens}


def _context(name: str, model: Any, tokenizer: Any, options: SystemOptions) -> Context:
    settings = _common(options)
    if name == "window":
        return WindowContext(model, tokenizer, messages=options.window, **settings)
    if name == "bm25":
        return BM25Context(model, tokenizer, top_k=options.top_k, **settings)
    if name == "dense":
        encoder = load_encoder(options.encoder, model.device)
        return DenseContext(model, tokenizer, top_k=options.top_k, encoder=encoder, **settings)
    return (FullContext if name == "full" else NoContext)(model, tokenizer, **settings)


@contextlib.contextmanager
def _peft(path: str, kind: str, backbone: Any) -> Iterator[Any]:
    try:
        from peft import PeftConfig, PeftModel
    except ModuleNotFoundError:
        raise ImportError(f"{kind} needs peft: pip install peft") from None
    if not os.path.isdir(path):  # peft itself asks the hub for long
        download(path, ["adapter_config.json"])
    config = PeftConfig.from_pretrained(path)
    if config.is_prompt_learning != (kind == "prefix"):
        raise ValueError(f"--{kind} {path}: is an adapter of PEFT's kind {config.peft_type.value}.")
    trainable = [p for p in backbone.parameters() if p.requires_grad]
    try:
        model = PeftModel.from_pretrained(backbone, path)
    except (RuntimeError, KeyError) as error:
        raise ValueError(
            f"--{kind} {path}: does not fit this backbone ({str(error).splitlines()[0]})."
        ) from None
    try:
        yield model.eval()
    finally:
        if kind == "lora":
            model.unload()
        for parameter in trainable:
            parameter.requires_grad_(True)
