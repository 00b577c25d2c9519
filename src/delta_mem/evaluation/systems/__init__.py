"""Systems: ways to answer questions about a history, behind one small interface.

A system keeps something of each history once (`keep`), then answers any number of questions from it
(`answer`). Tasks know nothing of systems, nor systems of tasks: whatever asks, this is how it is answered.

    kept = system.keep(histories)
    replies = system.answer(kept, rows=[0, 0, 1], queries=["Where do I live?", "Who am I?", "Any pets?"])

`none`, `full`, `window`, `bm25` and `dense` choose what of the history stands in the context (`context.py`);
`delta` answers from a memory, alone or together with any of these (`memory.py`); `lora` and `prefix` are
adapters that were trained once and for all and know of no history (`static.py`). `catalogue.py` makes them by
name.
"""

from .base import Reply, System
from .catalogue import Chosen, SystemOptions, expand_names, open_system
from .context import BM25Context, Context, DenseContext, FullContext, NoContext, WindowContext
from .memory import Memory
from .static import StaticAdapter

__all__ = [
    "BM25Context",
    "Chosen",
    "Context",
    "DenseContext",
    "FullContext",
    "Memory",
    "NoContext",
    "Reply",
    "StaticAdapter",
    "System",
    "SystemOptions",
    "WindowContext",
    "expand_names",
    "open_system",
]
