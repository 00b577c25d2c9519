"""Tasks: what is asked about a history, and how an answer is scored.

A task gives examples (`base.Example`: a history and questions about it) and scores answers; it knows nothing
of the systems that answer. On the command line a task is its name, with options where it has any:

    task = parse("recall:facts=8,other_talk=4")
    for example in task.examples(data=None, limit=100, seed=0): ...
    task.score(example.questions[0], "In Oslo.")   # {"contains": 1.0}
"""

from __future__ import annotations

import dataclasses
from importlib import import_module

from .base import Example, Question, Task

# Imported when they are asked for: some need libraries that the others do not.
TASKS = {
    "recall": "recall:RecallTask",
    "sgd": "sgd:SGD",
    "locomo": "locomo:LoCoMo",
    "memory-agent-bench": "memory_agent_bench:MemoryAgentBench",
    "hotpotqa": "hotpotqa:HotpotQA",
}

__all__ = ["TASKS", "Example", "Question", "Task", "parse"]


def parse(spec: str) -> Task:
    """The task that is written as `name` or `name:option=number,…`.

    Raises:
        ValueError: there is no such task or option, or the option's value is no number of its kind.
    """
    name, _, options = spec.partition(":")
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; there are {', '.join(TASKS)}.")
    module, _, attribute = TASKS[name].partition(":")
    task = getattr(import_module(f".{module}", __package__), attribute)
    kinds = {field.name: type(field.default) for field in dataclasses.fields(task)}
    chosen = {}
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        if key not in kinds:
            has = f"its options are {', '.join(kinds)}" if kinds else "it has none"
            raise ValueError(f"{name} has no option {key!r}; {has}.")
        try:
            chosen[key] = kinds[key](value)
        except ValueError:
            kind = "a whole number" if kinds[key] is int else "a number"
            raise ValueError(f"{spec}: {key} must be {kind}, not {value!r}.") from None
    return task(**chosen)
