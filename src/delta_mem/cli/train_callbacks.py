"""What `delta-mem train` adds to the Trainer: a progress bar, and an end that Ctrl-C may ask for.

Apart from `train.py`, because it needs transformers, for which `delta-mem --help` does not wait.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

from .common import err


class ProgressBar(TrainerCallback):
    """Steps, the last loss and the time left. Without a terminal, a line for every log.

    It is a context manager, for an error must end it too.
    """

    def __init__(self):
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=err,
        )

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.bar.live.is_started:
            self.bar.stop()

    def on_train_begin(self, args, state, control, **kwargs):
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)
        if err.is_terminal:
            self.bar.start()

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs: Mapping[str, Any], **kwargs):
        if "loss" in logs:
            told = _told(logs, "")
            self.bar.update(self.task, description=told)
            if not err.is_terminal:
                err.print(f"step {state.global_step}/{state.max_steps}: {told}", soft_wrap=True)

    def on_evaluate(self, args, state, control, metrics: Mapping[str, Any], **kwargs):
        err.print(f"held out, step {state.global_step}: {_told(metrics, 'eval_')}", soft_wrap=True)

    def on_train_end(self, args, state, control, **kwargs):
        self.__exit__()


def _told(logs: Mapping[str, Any], prefix: str) -> str:
    right = logs[f"{prefix}answer_accuracy"]
    return f"loss {float(logs[f'{prefix}loss']):.4f}, {float(right):.1%} of answer tokens right"


class LogTheLast(TrainerCallback):
    """Has the last step logged, too. For all processes: what is logged, they add up together."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            control.should_log = True


class StopOnSignal(TrainerCallback):
    """Within it, SIGINT and SIGTERM end the training after the step it is at, with a checkpoint.

    In a run of several processes, all stop at the same step, whichever was told first. A single process that
    is told a second time does not wait.

    Args:
        loud: says so on stderr.

    Attributes:
        stopped: training was ended before its last step.
    """

    def __init__(self, loud: bool):
        self.loud = loud
        self.asked = self.stopped = False
        self.alone = True

    def __enter__(self) -> StopOnSignal:
        self._before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        # torchrun passes on a Ctrl-C that the terminal has sent to its processes already.
        if self.asked and self.alone and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.loud and not self.asked:
            more = " Ctrl-C again stops at once, without saving." if self.alone else ""
            # Not through `err`, which a signal may find in the middle of a line.
            os.write(2, f"\nFinishing this step, then saving.{more}\n".encode())
        self.asked = True

    def on_train_begin(self, args, state, control, **kwargs):
        self.alone = args.world_size == 1

    def on_step_end(self, args, state, control, **kwargs):
        asked = self.asked
        if not self.alone:
            flag = torch.tensor(float(asked), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            asked = bool(flag)
        if asked and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = control.should_training_stop = True
