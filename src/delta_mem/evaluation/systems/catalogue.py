"""The systems by name, put on a backbone and taken off again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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


def expand_names(names: Sequence[str], options: SystemOptions) -> list[str]:
    """The systems that `names` stand for: "delta" is one for each adapter, "delta[tsw]" and "delta[ssw]".

    Raises:
        ValueError: an unknown name, or one that needs an adapter that is not given.
    """
    expanded: list[str] = []
    for name in names:
        if name not in NAMES:
            raise ValueError(f"there is no system {name!r}; there are {', '.join(NAMES)}.")
        if name in ("lora", "prefix") and getattr(options, name) is None:
            raise ValueError(f"{name} needs a PEFT adapter trained for this backbone: --{name} NAME.")
        if name.startswith("delta") and not options.adapters:
            raise ValueError(f"{name} needs the memory's trained weights: --adapter NAME.")
        labels = options.adapters if name.startswith("delta") else [""]
        expanded += [name.replace("delta", f"delta[{label}]") if label else name for label in labels]
    return list(dict.fromkeys(expanded))


@contextlib.contextmanager
def open_system(name: str, backbone: Any, tokenizer: Any, options: SystemOptions) -> Iterator[System]:
    """The system of that name (one of `expand_names`) on a backbone, which is itself again afterwards.

    Raises:
        ImportError: a package that the system needs is missing.
        ValueError, OSError: an adapter cannot be loaded, or is not for this backbone.
    """
    adapter, _, context = name.partition("+")
    common = {"batch_size": options.batch_size, "context_tokens": options.context_tokens}

    def on(model: Any, context: str) -> Context:
        return _contexts(options, backbone)[context](model, tokenizer, **common)

    if adapter in ("lora", "prefix"):
        with _peft(getattr(options, adapter), adapter, backbone) as model:
            yield StaticAdapter(model, tokenizer, **common)
    elif adapter.startswith("delta"):
        from ...model import DeltaMemModel

        model = DeltaMemModel.from_pretrained(backbone, options.adapters[adapter[len("delta[") : -1]])
        try:
            beside = on(model, context) if context else None
            yield Memory(model, tokenizer, context=beside, write_chunk=options.write_chunk, **common)
        finally:
            model.detach()
    else:
        yield on(backbone, adapter)


def _contexts(options: SystemOptions, backbone: Any) -> dict[str, Callable[..., Context]]:
    def dense(*settings: Any, **named: Any) -> DenseContext:
        encoder = load_encoder(options.encoder, backbone.device)
        return DenseContext(*settings, top_k=options.top_k, encoder=encoder, **named)

    return {
        "none": NoContext,
        "full": FullContext,
        "window": lambda *settings, **named: WindowContext(*settings, messages=options.window, **named),
        "bm25": lambda *settings, **named: BM25Context(*settings, top_k=options.top_k, **named),
        "dense": dense,
    }


@contextlib.contextmanager
def _peft(path: str, kind: str, backbone: Any) -> Iterator[Any]:
    try:
        from peft import PeftConfig, PeftModel
    except ModuleNotFoundError:
        raise ImportError(f"{kind} needs peft: pip install peft") from None
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
