"""What every task has in common: examples to answer, a score for each answer, and reading data files."""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

logger = logging.getLogger(__name__)

Message = dict[str, str]
Report = Callable[[str], None]
Row = tuple[str, Any]  # where it is, as "file:line" or "file, row n", and what it says


@dataclass(frozen=True)
class Question:
    """One question about a history.

    Attributes:
        id: unique in the task.
        query: the user's message: the question, with how to answer it.
        answer: what the task's `score` compares with; JSON values only.
        category: the group of questions that it is reported in.
        max_new_tokens: longest answer.
        search: the question without how to answer it, by which systems find what fits it; None: the query.
    """

    id: str
    query: str
    answer: Any
    category: str | None
    max_new_tokens: int
    search: str | None = None


@dataclass(frozen=True)
class Example:
    """A history, and what is asked when it is gone.

    Attributes:
        id: unique in the task.
        history: messages; beside "role" and "content" one may have a "date", which a system that takes it out
            of its place in the history should show with it.
        questions: not empty; each is asked by itself.
    """

    id: str
    history: list[Message]
    questions: list[Question]


@dataclass
class Task(ABC):
    """A benchmark. Its dataclass fields, if any, are its options.

    Attributes:
        name: what it is called on the command line and in tables.
        metric: the score that speaks for it in a table.
    """

    name: ClassVar[str]
    metric: ClassVar[str]

    @property
    def spec(self) -> str:
        """The name with the options that are not the defaults, as `tasks.parse` reads it."""
        set_to = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed = [
            f"{f.name}={set_to[f.name]}" for f in dataclasses.fields(self) if set_to[f.name] != f.default
        ]
        return self.name + (":" + ",".join(changed) if changed else "")

    def examples(
        self,
        data: Path | None = None,
        limit: int | None = None,
        seed: int = 0,
        report: Report = logger.warning,
    ) -> Iterator[Example]:
        """The examples, always the same ones in the same order.

        Args:
            data: the file or folder to read; None: generated, or from the hub.
            limit: stop after this many questions.
            seed: of all that is drawn: wordings, the order of options.
            report: told of every row that cannot be used, as "file, row: reason".

        Raises:
            OSError: a file that cannot be read.
            ValueError: a file of another kind, none of whose rows can be used, or no data: what to fetch.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}.")
        seen: set[str] = set()
        left = limit
        for example in self.read(data, seed, report):
            fresh = []
            for question in example.questions:
                if question.id in seen:
                    report(f"{self.name}: a second question is called {question.id}: left out")
                    continue
                seen.add(question.id)
                fresh.append(question)
            fresh = fresh[:left]
            if fresh:
                yield replace(example, questions=fresh)
            if left is not None:
                left -= len(fresh)
                if not left:
                    return
        if not seen:
            raise ValueError(f"{data or self.name}: no question in it can be used.")

    @abstractmethod
    def read(self, data: Path | None, seed: int, report: Report) -> Iterator[Example]:
        """All examples; arguments and errors as in `examples`."""

    @abstractmethod
    def score(self, question: Question, prediction: str) -> dict[str, float]:
        """The scores of an answer, 0 to 1, by name; `metric` is one of them."""


# ---- rows ----------------------------------------------------------------------------------------


class RowError(ValueError):
    """Why a row cannot be used."""


def usable(rows: Iterator[Row], make: Callable[[Any], Any], report: Report) -> Iterator[Any]:
    """What `make` makes of each row; rows for which it raises `RowError` are reported and left out."""
    for place, row in rows:
        try:
            if isinstance(row, RowError):
                raise row
            yield make(row)
        except RowError as error:
            report(f"{place}: {error}: left out")


def field(row: Any, name: str, kind: type | tuple[type, ...] = str) -> Any:
    """`row[name]`, which must be of this kind and, if a text, one that is not blank.

    Raises:
        RowError: otherwise.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"not an object but {type(row).__name__}")
    if name not in row or row[name] is None:
        raise RowError(f"no {name!r}")
    value = row[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RowError(f"{name!r} is a {type(value).__name__}")
    if isinstance(value, str):
        text(value, repr(name))
        if not value.strip():
            raise RowError(f"{name!r} is empty")
    return value


def text(value: Any, what: str) -> str:
    """`value`, which must be a text that a tokenizer takes: JSON may hold halves of surrogate pairs.

    Raises:
        RowError: otherwise; it says that `what` is not a text.
    """
    if not isinstance(value, str):
        raise RowError(f"{what} is not a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{what} is not a text: half a surrogate pair at {error.start}") from None
    return value


def file_rows(data: Path) -> Iterator[Row]:
    """The rows of a `.jsonl`, `.json` (a list) or `.parquet` file, the first two also with `.gz`.

    Of a folder, those of all its `.jsonl` and `.parquet` files, by name. A line that is not JSON is a
    `RowError` in the place of its row.

    Raises:
        OSError: it cannot be read.
        ValueError: a file of another kind, or a folder without a data file.
    """
    if data.is_dir():
        files = sorted(path for path in data.iterdir() if _kind(path) in (".jsonl", ".parquet"))
        if not files:
            raise ValueError(f"{data}: no .jsonl or .parquet file in this folder.")
        for file in files:
            yield from file_rows(file)
        return
    kind = _kind(data)
    if kind == ".jsonl":
        for number, line in enumerate(_lines(data), 1):
            if line.strip():
                yield f"{data}:{number}", _json(line)
    elif kind == ".json":
        rows = whole_json(data)
        if not isinstance(rows, list):
            raise ValueError(f"{data}: not a list of rows.")
        yield from ((f"{data}, row {number}", row) for number, row in enumerate(rows, 1))
    elif kind == ".parquet":
        yield from _parquet_rows(data)
    else:
        raise ValueError(f"{data}: not a .jsonl, .json or .parquet file.")


def whole_json(path: Path) -> Any:
    """What a JSON file says.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON.
    """
    value = _json(b"".join(_lines(path)))
    if isinstance(value, RowError):
        raise ValueError(f"{path}: {value}.")
    return value


def hub_rows(name: str, splits: Sequence[str], config: str | None = None) -> Iterator[Row]:
    """The rows of a dataset on the hub.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: the dataset cannot be fetched; what to do instead.
    """
    datasets = _import_datasets()
    _quiet_hub()
    for split in splits:
        try:
            rows = datasets.load_dataset(name, config, split=split)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{_unreachable(name)} ({_first_line(error)})") from None
        yield from ((f"{name}, {split}, row {number}", row) for number, row in enumerate(rows, 1))


def hub_file(name: str, file: str) -> Path:
    """A file of a dataset on the hub.

    Raises:
        ValueError: it cannot be fetched; what to do instead.
    """
    from huggingface_hub import hf_hub_download

    _quiet_hub()
    try:
        return Path(hf_hub_download(name, file, repo_type="dataset"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: {_unreachable(name)} ({_first_line(error)})") from None


def _unreachable(name: str) -> str:
    return (
        f"{name} cannot be fetched: download it from https://huggingface.co/datasets/{name} where there is a "
        "network, and give the file or folder with --data"
    )


def _quiet_hub() -> None:
    """Without a network it would tell of every try; the error tells of the last one."""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _import_datasets() -> Any:
    try:
        import datasets
    except ModuleNotFoundError:
        raise ImportError('this task needs datasets: pip install -e ".[eval]"') from None
    return datasets


def _kind(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def _lines(path: Path) -> Iterator[bytes]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            yield from file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: not a whole gzip file ({error}).") from None


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:  # also of bytes that are not UTF-8
        return RowError(f"not JSON ({error})")


def _parquet_rows(path: Path) -> Iterator[Row]:
    _import_datasets()  # which brings pyarrow
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in table.iter_batches(batch_size=16):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file: {_first_line(error)}") from None


# ---- histories -----------------------------------------------------------------------------------


def read_aloud(texts: Sequence[str]) -> list[Message]:
    """Texts as a conversation: the user shows them one by one, the assistant notes each."""
    return [
        message
        for text in texts
        for message in (
            {"role": "user", "content": text},
            {"role": "assistant", "content": "I have read it."},
        )
    ]
