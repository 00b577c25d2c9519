"""The small offline model: a tokenizer, a backbone and three adapters that come with the package.

    model, tokenizer = load_offline_model()        # the adapter that writes token by token
    chat = ChatSession(model, tokenizer, window=1)
    chat.send("My sister lives in Oslo.")
    chat.send("Where does my sister live?")        # "Your sister lives in Oslo."

It was trained from scratch by `recipes/offline_model.py` on generated conversations
(`evaluation/tasks/recall.py`) and knows the words of those and nothing else: enough to see a memory at work
without a network, in seconds, on any CPU.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .model import DeltaMemModel

NAME = "delta-mem offline model"
ADAPTERS = ("tsw", "ssw", "msw")
FOLDER = Path(str(resources.files(__package__).joinpath("assets")))


def load_offline_model(adapter: str = "tsw", device: torch.device | str = "cpu") -> tuple[DeltaMemModel, Any]:
    """The offline model and its tokenizer, in float32.

    Args:
        adapter: "tsw" (writes every token), "ssw" (once per message) or "msw" (four states side by side).
        device: where to put it.

    Raises:
        ValueError: an unknown adapter.
    """
    if adapter not in ADAPTERS:
        raise ValueError(f"the offline model's adapters are {', '.join(ADAPTERS)}, not {adapter!r}.")
    backbone = AutoModelForCausalLM.from_pretrained(FOLDER / "backbone", dtype=torch.float32).to(device)
    backbone.config._name_or_path = NAME
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "backbone")
    return DeltaMemModel.from_pretrained(backbone.eval(), FOLDER / adapter), tokenizer
