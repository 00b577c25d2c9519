"""Running tasks on systems: every prediction is written down as it is made, and none is made twice.

    with Predictions(folder) as predictions:
        for chosen in systems:
            with open_system(chosen, backbone, tokenizer, options) as system:
                predict(system, chosen.name, task, examples, predictions)

Predictions are lines of JSON in `predictions.jsonl`; of a run of several processes, each after the first has
a file of its own, `predictions-1.jsonl` and so on. A run that was killed goes on where it was. What follows
from predictions is in `report.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

try:
    import psutil
except ImportError:
    raise ImportError('an evaluation needs psutil: pip install -e ".[eval]"') from None

from .systems import System
from .tasks import Example, Question, Task

Key = tuple[str, str, str]  # task, system, question
Line = dict[str, Any]

# Questions gathered, at least, before they are answered: enough to make batches of prompts of like length.
BATCHES_AT_ONCE = 8


class Predictions:
    """The predictions in a folder, and this process's file to add to.

    Args:
        folder: where they are, or will be; it exists.
        process: this process's number.

    Attributes:
        lines: what was there, by task, system and question, with what has been added since.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: a line is no prediction; file and line are named.
    """

    def __init__(self, folder: Path, process: int = 0):
        self.path = folder / (f"predictions-{process}.jsonl" if process else "predictions.jsonl")
        _mend(self.path)
        self.lines = read_predictions(folder)
        self._file = self.path.open("a", encoding="utf-8")

    def __enter__(self) -> Predictions:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def add(self, line: Line) -> None:
        """Writes one line, at once."""
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()
        self.lines[_key(line)] = line


def read_predictions(folder: Path) -> dict[Key, Line]:
    """The predictions of all processes. A last line that was not finished is left out.

    Raises:
        OSError: a file cannot be read.
        ValueError: a line is no prediction; file and line are named.
    """
    found: dict[Key, Line] = {}
    for path in sorted(folder.glob("predictions*.jsonl")):
        *lines, _ = path.read_bytes().split(b"\n")
        for number, text in enumerate(lines, 1):
            try:
                line = json.loads(text)
                found.setdefault(_key(line), line)
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{path}:{number}: not a prediction; delete the line to have it made again."
                ) from None
    return found


def _key(line: Line) -> Key:
    return line["task"], line["system"], line["question"]


def _mend(path: Path) -> None:
    """Takes away a last line that was not finished."""
    if path.exists():
        data = path.read_bytes()
        if not data.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)


WARM_UP = [
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "How are you?"},
]


def predict(
    system: System,
    name: str,
    task: Task,
    examples: Sequence[Example],
    predictions: Predictions,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Asks a system all questions of the examples that it has not answered before.

    Args:
        system: what answers.
        name: what it is called in the predictions.
        task: what scores the answers; the predictions call it by its `spec`.
        examples: whose questions.
        predictions: where what is answered is looked up and added.
        advance: told of every batch that is done, by its number of questions.
    """
    blocks = _blocks(name, task, examples, predictions, BATCHES_AT_ONCE * system.batch_size)
    first = next(blocks, None)
    if first is None:
        return
    # What is loaded and compiled once is no question's cost.
    system.answer(system.keep([WARM_UP[:2]]), [0], [WARM_UP[2]["content"]], [1])
    with PeakMemory(system.model.device) as memory:
        for block in itertools.chain([first], blocks):
            _predict_block(system, name, task, block, predictions, memory, advance)


Block = list[tuple[Example, list[Question]]]


def _blocks(
    name: str, task: Task, examples: Sequence[Example], predictions: Predictions, size: int
) -> Iterator[Block]:
    """Examples with what is still to be asked about them, until that is `size` questions."""
    block: Block = []
    for example in examples:
        asked = [q for q in example.questions if (task.spec, name, q.id) not in predictions.lines]
        if asked:
            block.append((example, asked))
        if sum(len(questions) for _, questions in block) >= size:
            yield block
            block = []
    if block:
        yield block


def _predict_block(
    system: System,
    name: str,
    task: Task,
    block: Block,
    predictions: Predictions,
    memory: PeakMemory,
    advance: Callable[[int], None],
) -> None:
    kept, costs = [], []
    for example, _ in block:
        start = time.perf_counter()
        kept += system.keep([example.history])
        costs.append(
            {"bytes_kept": system.bytes_kept(kept[-1:]), "seconds_to_keep": time.perf_counter() - start}
        )
    asked = [(row, question) for row, (_, questions) in enumerate(block) for question in questions]
    replies = system.replies(
        kept,
        [row for row, _ in asked],
        [question.query for _, question in asked],
        [question.max_new_tokens for _, question in asked],
        [question.search for _, question in asked],
    )
    start = time.perf_counter()
    for batch in replies:
        seconds = (time.perf_counter() - start) / len(batch)
        peak = memory.peak()
        for index, reply in batch.items():
            row, question = asked[index]
            predictions.add(
                {
                    "task": task.spec,
                    "system": name,
                    "example": block[row][0].id,
                    "question": question.id,
                    "category": question.category,
                    "query": question.query,
                    "answer": question.answer,
                    "prediction": reply.text,
                    "scores": task.score(question, reply.text),
                    "tokens_read": reply.tokens_read,
                    "seconds": seconds,
                    **costs[row],
                    "peak_bytes": peak,
                }
            )
        advance(len(batch))
        start = time.perf_counter()


class PeakMemory:
    """The most memory in use since the block began, beyond what was in use then: beyond the weights.

    Of a GPU it is what torch has allocated; else the process's own, looked at every few milliseconds.
    """

    EVERY = 0.01

    def __init__(self, device: torch.device):
        self.cuda = device if device.type == "cuda" else None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.cuda is not None:
            torch.cuda.reset_peak_memory_stats(self.cuda)
            self._before = torch.cuda.memory_allocated(self.cuda)
            return self
        with contextlib.suppress(OSError, AttributeError):  # elsewhere than on Linux
            ctypes.CDLL(None).malloc_trim(0)  # what the system before has left unused
        self._before = self._most = _resident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="delta-mem-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.cuda is None:
            self._over.set()
            self._thread.join()

    def peak(self) -> int:
        """Bytes, until now."""
        if self.cuda is not None:
            return torch.cuda.max_memory_allocated(self.cuda) - self._before
        return self._most - self._before

    def _watch(self) -> None:
        while not self._over.wait(self.EVERY):
            self._most = max(self._most, _resident())


def _resident() -> int:
    return psutil.Process().memory_info().rss
