"""δ-mem: an online memory for frozen language models (Lei et al., arXiv 2605.12357).

import delta_mem as dm

model = dm.DeltaMemModel(backbone, dm.DeltaMemConfig())
memory = model.new_memory()
model.write(memory, input_ids)
answer = model.generate(prompt_ids, memory=memory)
"""

from . import ops
from .chat import ChatSession
from .config import DeltaMemConfig
from .errors import AdapterFormatError, IncompatibleMemoryError, UnsupportedBackboneError
from .model import DeltaMemModel
from .state import MemoryState

__version__ = "0.1.0"

__all__ = [
    "AdapterFormatError",
    "ChatSession",
    "DeltaMemConfig",
    "DeltaMemModel",
    "IncompatibleMemoryError",
    "MemoryState",
    "UnsupportedBackboneError",
    "ops",
]
