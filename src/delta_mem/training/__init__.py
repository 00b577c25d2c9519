"""Training an adapter: episodes (`data`), what they are scored by (`objectives`), and the loop (`trainer`).

    from delta_mem.training import MemoryTrainer, MemoryTrainingArguments, load_episodes

    episodes = load_episodes(["train.jsonl"], tokenizer, write=model.delta_config.write)
    arguments = MemoryTrainingArguments("runs/first", learning_rate=2e-4)
    MemoryTrainer(model, arguments, train_dataset=episodes, processing_class=tokenizer).train()

Names are imported when they are first asked for: `transformers.Trainer` takes seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import (
        Episode,
        EpisodeCollator,
        EpisodeStream,
        Question,
        encode_episode,
        load_episodes,
        parse_episode,
    )
    from .objectives import EpisodeObjective
    from .trainer import MemoryTrainer, MemoryTrainingArguments, last_checkpoint

__all__ = [
    "Episode",
    "EpisodeCollator",
    "EpisodeObjective",
    "EpisodeStream",
    "MemoryTrainer",
    "MemoryTrainingArguments",
    "Question",
    "encode_episode",
    "last_checkpoint",
    "load_episodes",
    "parse_episode",
]

_HOMES = {
    "Episode": "data",
    "EpisodeCollator": "data",
    "EpisodeObjective": "objectives",
    "EpisodeStream": "data",
    "MemoryTrainer": "trainer",
    "MemoryTrainingArguments": "trainer",
    "Question": "data",
    "encode_episode": "data",
    "last_checkpoint": "trainer",
    "load_episodes": "data",
    "parse_episode": "data",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
