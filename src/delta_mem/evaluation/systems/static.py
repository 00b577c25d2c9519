"""A static adapter: what was trained into it is all it knows, whoever asks."""

from __future__ import annotations

from typing import Any

from .context import NoContext


class StaticAdapter(NoContext):
    """The question only, answered with a PEFT adapter on the backbone: LoRA, or a prefix of keys and values.

    Args:
        model: a `PeftModel`.
        settings: as for `System`.
    """

    def __init__(self, model: Any, *settings: Any, **named: Any):
        super().__init__(model, *settings, **named)
        (config,) = model.peft_config.values()
        self.name = "prefix" if config.is_prompt_learning else "lora"
        self.pads = not config.is_prompt_learning  # a prefix before padding would be at another distance
        self.hidden_tokens = getattr(config, "num_virtual_tokens", 0)
