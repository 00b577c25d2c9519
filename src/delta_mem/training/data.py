"""Episodes: what a memory is trained on, from JSON Lines to batches.

An episode is a history, which is written into the memory, then one or more questions, each with an answer
that is read with the memory and without the history. A line of a data file is one of

    {"messages": [{"role": "user", "content": "…"}, …]}
    {"history": [{"role": …, "content": …}, …], "query": "…", "answer": "…"}
    {"history": […], "questions": [{"query": "…", "answer": "…"}, …]}

In the first, the last assistant message is the answer, the messages right before it are the query
(`recent_messages`, 1) and all before those the history. A query is one user message's text or a list of
messages. Other keys are left alone.

    episodes = load_episodes(["train.jsonl"], tokenizer, write="token")
    batch = EpisodeCollator(tokenizer.pad_token_id)([episodes[0], episodes[1]])

`datasets` keeps the tokens in its cache, so that a file is tokenized once. Streaming keeps nothing, and a run
is trained on pass after pass:

    stream = load_episodes(["train.jsonl"], tokenizer, write="token", streaming=True).endless(seed=0)
"""

from __future__ import annotations

import copy
import gzip
import hashlib
import itertools
import json
import logging
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from .. import __version__, segments
from ..config import Write
from ..segments import encode_messages

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

Keep = Literal["newest", "oldest"]

MAX_WRITE_TOKENS = 8192
MAX_READ_TOKENS = 512
SHUFFLE_BUFFER = 256  # episodes held to draw from while streaming


class LineError(ValueError):
    """A line that cannot be used, as "file:line: reason", or a whole file, as "file: reason"."""


# ---- what a line says ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """Something to ask of the memory.

    Attributes:
        query: messages, the last of which asks.
        answer: what the assistant is to say then; not blank.
    """

    query: list[dict[str, Any]]
    answer: str


@dataclass(frozen=True)
class Episode:
    """A training example.

    Attributes:
        history: the messages that are written into the memory; not empty.
        questions: what is asked afterwards, each with the memory as the history left it; not empty.
    """

    history: list[dict[str, Any]]
    questions: list[Question]


def parse_episode(line: Mapping[str, Any], recent_messages: int = 1) -> Episode:
    """The episode in one line of a data file.

    Args:
        line: the line's JSON object; see this module's docstring for its three shapes.
        recent_messages: with "messages": how many of them before the answer are the query.

    Raises:
        ValueError: the line is not an episode. The message says what is wrong with which field.
    """
    if not isinstance(line, Mapping):
        raise ValueError(f"not an object but {_kind(line)}")
    if "messages" in line:
        for name in ("history", "query", "answer", "questions"):
            if name in line:
                raise ValueError(f"has both messages and {name}")
        return _split(_messages(line["messages"], "messages"), recent_messages)
    if "history" not in line:
        raise ValueError("has neither messages nor history")
    if line["history"] == []:
        raise ValueError("no history to write")
    history = _messages(line["history"], "history")
    if "questions" not in line:
        return Episode(history, [_question(line, "")])
    for name in ("query", "answer"):
        if name in line:
            raise ValueError(f"has both questions and {name}")
    asked = line["questions"]
    if not isinstance(asked, list):
        raise ValueError(f"questions: not a list but {_kind(asked)}")
    if not asked:
        raise ValueError("questions: empty")
    return Episode(history, [_question(question, f"questions[{i}]") for i, question in enumerate(asked)])


def _split(messages: list[dict[str, Any]], recent_messages: int) -> Episode:
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not places:
        raise ValueError("messages: no assistant message, so no answer")
    last = places[-1]
    if not (messages[last]["content"] or "").strip():
        raise ValueError(f"messages[{last}]: the answer is empty")
    first = last - recent_messages
    if first < 0:
        raise ValueError("messages: no query before the answer")
    if first == 0:
        raise ValueError("no history to write")
    return Episode(messages[:first], [Question(messages[first:last], messages[last]["content"].strip())])


def _question(value: Any, where: str) -> Question:
    """The query and the answer in `value`, which is at `where` in the line."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: not an object but {_kind(value)}")
    dot = f"{where}." if where else ""
    for name in ("query", "answer"):
        if name not in value:
            raise ValueError(f"{dot}{name}: missing")
    query, answer = value["query"], value["answer"]
    if isinstance(query, str):
        if not query.strip():
            raise ValueError(f"{dot}query: empty")
        query = [{"role": "user", "content": query}]
    if not isinstance(answer, str):
        raise ValueError(f"{dot}answer: not a text but {_kind(answer)}")
    if not answer.strip():
        raise ValueError(f"{dot}answer: empty")
    return Question(_messages(query, f"{dot}query"), answer.strip())


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: not a list of messages but {_kind(value)}")
    if not value:
        raise ValueError(f"{where}: empty")
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise ValueError(f"{where}[{i}]: not a message but {_kind(message)}")
        for name in ("role", "content"):
            if name not in message:
                raise ValueError(f"{where}[{i}]: no {name}")
        if not isinstance(message["role"], str) or not message["role"]:
            raise ValueError(f"{where}[{i}].role: not a name but {_kind(message['role'])}")
        # A message that only calls a tool says nothing.
        silent = message["content"] is None and message.get("tool_calls")
        if not isinstance(message["content"], str) and not silent:
            raise ValueError(f"{where}[{i}].content: not a text but {_kind(message['content'])}")
    return value


def _kind(value: Any) -> str:
    """What JSON calls it."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    names = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__) if value != "" else "an empty text"


# ---- as tokens -------------------------------------------------------------------------------------


def encode_episode(
    tokenizer: Any,
    episode: Episode,
    write: Write,
    max_write_tokens: int = MAX_WRITE_TOKENS,
    max_read_tokens: int = MAX_READ_TOKENS,
    keep: Keep = "newest",
    with_context: bool = False,
) -> dict[str, list]:
    """The tokens of an episode, as the tokenizer's chat template renders it.

    The history, and each query with the header of the answer to come, are rendered as chats of their own. The
    answer is what the template puts after that header, its end-of-turn token included.

    Args:
        tokenizer: a tokenizer with a chat template.
        episode: what to encode.
        write: how the memory writes, which decides what a segment is.
        max_write_tokens: limit of the history, at least 1.
        max_read_tokens: limit of a query and its answer together. The query loses its oldest tokens first,
            down to the header of the answer; then the answer loses its end.
        keep: which tokens of a history beyond the limit are kept.
        with_context: with `context_ids`, for objectives that show the history as well.

    Returns:
        `write_ids`, `write_segments` [tokens]: the history, and the segment of each of its tokens (-1:
        template glue and system prompts); `query_ids`, `query_segments`, `answer_ids` [[tokens], …]: one list
        per question; and `context_ids` [[tokens], …]: history and query rendered as one chat, of which the
        newest `max_write_tokens + max_read_tokens` tokens are kept.

    Raises:
        ValueError: no chat template, a limit that leaves no room, nothing in the history that can be written,
            or a message that the template leaves out.
        jinja2.TemplateError: the chat template refuses the messages. As templates compute, it may also be
            any other error.
    """
    if keep not in get_args(Keep):
        raise ValueError(f"keep must be one of {', '.join(get_args(Keep))}, not {keep!r}.")
    if max_write_tokens < 1:
        raise ValueError(f"max_write_tokens must be at least 1, got {max_write_tokens}.")
    history = encode_messages(tokenizer, episode.history, write)
    kept = slice(-max_write_tokens, None) if keep == "newest" else slice(max_write_tokens)
    written = history.segment_ids[kept].tolist()
    if max(written, default=-1) < 0:
        raise ValueError("no history to write")
    questions = [_encode_question(tokenizer, one, write, max_read_tokens) for one in episode.questions]
    encoded = {"write_ids": history.input_ids[kept].tolist(), "write_segments": written}
    encoded |= zip(_ABOUT_QUESTIONS, (list(column) for column in zip(*questions, strict=True)), strict=True)
    if with_context:
        limit = max_write_tokens + max_read_tokens
        encoded["context_ids"] = [
            _tokens(tokenizer, _render(tokenizer, [*episode.history, *question.query]))[-limit:]
            for question in episode.questions
        ]
    return encoded


_ABOUT_QUESTIONS = ("query_ids", "query_segments", "answer_ids")


def _encode_question(
    tokenizer: Any, question: Question, write: Write, limit: int
) -> tuple[list[int], list[int], list[int]]:
    """Query tokens and their segments; and answer tokens, at most `limit` with the query's."""
    asked = encode_messages(tokenizer, question.query, write, add_generation_prompt=True)
    query, segments = asked.input_ids.tolist(), asked.segment_ids.tolist()
    message = {"role": "assistant", "content": question.answer}
    ids, _, owners = (column.tolist() for column in encode_messages(tokenizer, [*question.query, message]))
    content = [i for i, owner in enumerate(owners) if owner == len(question.query)]
    if not content:
        raise ValueError("the chat template leaves nothing of the answer")
    # Where the template does not go on from its own header (it drops the thinking that the header asks for),
    # the answer is the content alone.
    first = len(query) if ids[: len(query)] == query else content[0]
    special = {*tokenizer.all_special_ids, *_special_ids(tokenizer)}
    end = next((i + 1 for i in range(content[-1] + 1, len(ids)) if ids[i] in special), len(ids))
    answer = ids[first:end]
    if len(query) + len(answer) > limit:
        header = _header(tokenizer, question.query)
        if header >= limit:
            raise ValueError(f"a limit of {limit} tokens leaves no room for an answer")
        kept = max(header, limit - len(answer), 1)
        query, segments = query[-kept:], segments[-kept:]
        answer = answer[: limit - len(query)]
    return query, segments, answer


def _header(tokenizer: Any, query: list[dict[str, Any]]) -> int:
    """Tokens at the end of a rendered query that say that the answer comes."""
    prompt = _render(tokenizer, query)
    asked = _render(tokenizer, query, add_generation_prompt=False)
    return len(_tokens(tokenizer, prompt[len(asked) :])) if prompt.startswith(asked) else 0


def _render(tokenizer: Any, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _special_ids(tokenizer: Any) -> Iterator[int]:
    """Also those special tokens that the tokenizer has no name for, as many ends of turns are."""
    return (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)


# ---- files -----------------------------------------------------------------------------------------


def load_episodes(
    files: str | os.PathLike | Sequence[str | os.PathLike],
    tokenizer: Any,
    write: Write = "token",
    max_write_tokens: int = MAX_WRITE_TOKENS,
    max_read_tokens: int = MAX_READ_TOKENS,
    keep: Keep = "newest",
    with_context: bool = False,
    recent_messages: int = 1,
    strict: bool = False,
    streaming: bool = False,
    on_skip: Callable[[str], None] = logger.warning,
) -> datasets.Dataset | EpisodeStream:
    """The episodes of JSON Lines files (`.jsonl`, or `.jsonl.gz`), as `encode_episode` encodes them.

    The tokens are kept in the cache of `datasets`; the same files with the same tokenizer and options are not
    tokenized again, wherever the files have moved.

    Args:
        files: a path, or several, read in this order.
        tokenizer, write, max_write_tokens, max_read_tokens, keep, with_context: as in `encode_episode`.
        recent_messages: as in `parse_episode`.
        strict: stop at the first line that cannot be used; otherwise such lines are left out.
        streaming: read and tokenize while training, and keep nothing: for files larger than the disk. The
            stream is one pass in the files' order; training takes its `endless`.
        on_skip: told of every line left out, as "file:line: reason", also when they come from the cache;
            while streaming, once, by whichever process reads.

    Raises:
        ImportError: `datasets` is not installed, which all but streaming needs.
        OSError: a file that cannot be read.
        LineError: with `strict`, for the first line that cannot be used; otherwise if none can. While
            streaming, lines are read, and their errors raised, when they are asked for.
        ValueError: no file, what is not a regular file, or a file without a line.
    """
    if not files:
        raise ValueError("no data file given.")
    if recent_messages < 1:
        raise ValueError(f"recent_messages must be at least 1, got {recent_messages}.")
    files = [files] if isinstance(files, (str, os.PathLike)) else files
    files = [os.fspath(file) for file in files]
    limits = {"max_write_tokens": max_write_tokens, "max_read_tokens": max_read_tokens, "keep": keep}
    options = {"write": write, **limits, "with_context": with_context}
    encode = partial(_encode_line, tokenizer, recent_messages, options)
    for file in files:
        check_file(file)
        if not any(line.strip() for line in _lines(file)):
            raise ValueError(f"{file}: empty.")
    if streaming:
        return EpisodeStream(files, encode, strict, on_skip)

    datasets = _import_datasets()
    fingerprint = _fingerprint(files, tokenizer, {**options, "recent_messages": recent_messages})
    try:
        rows = datasets.Dataset.from_generator(
            _rows,
            _features(datasets, with_context),
            gen_kwargs={"files": files, "encode": encode, "strict": strict},
            fingerprint=fingerprint,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None
    about = rows.select_columns(_ABOUT)
    usable = [i for i, row in enumerate(about) if row["problem"] is None]
    if len(usable) < len(about):
        reports = (_report(files, row) for row in about if row["problem"] is not None)
        if strict or not usable:
            first = next(reports)
            raise LineError(first if strict else f"not one line can be used; the first is {first}")
        for report in reports:
            on_skip(report)
        rows = rows.select(usable)
    return rows.remove_columns(_ABOUT)


# Beside its tokens, a row says where its line is and why it cannot be used: so a cache knows its bad lines.
_ABOUT = ["file", "line", "problem"]


def _features(datasets: Any, with_context: bool) -> Any:
    row, rows = datasets.List(datasets.Value("int32")), datasets.List(datasets.List(datasets.Value("int32")))
    features = {"write_ids": row, "write_segments": row, **dict.fromkeys(_ABOUT_QUESTIONS, rows)}
    if with_context:
        features["context_ids"] = rows
    about = (datasets.Value("int64"), datasets.Value("int64"), datasets.Value("string"))
    return datasets.Features({**features, **dict(zip(_ABOUT, about, strict=True))})


def _rows(
    files: list[str], encode: Callable[[bytes], dict], strict: bool, reader: int = 0, readers: int = 1
) -> Iterator[dict[str, Any]]:
    """One row per line that is not blank; of several readers, each gets its own lines."""
    count = itertools.count()
    for index, file in enumerate(files):
        for number, line in enumerate(_lines(file), 1):
            if not line.strip() or next(count) % readers != reader:
                continue
            row = {**encode(line), "file": index, "line": number}
            if strict and row["problem"] is not None:
                raise LineError(_report(files, row))
            yield row


def _lines(file: str) -> Iterator[bytes]:
    try:
        with (gzip.open if file.endswith(".gz") else open)(file, "rb") as lines:
            yield from lines
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise LineError(f"{file}: cannot be unpacked ({error})") from None


def check_file(file: str | os.PathLike) -> None:
    """Sees that a file can be read, and again.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a regular file. Files are read more than once, which a pipe cannot be.
    """
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise ValueError(f"{os.fspath(file)}: not a regular file.")
    open(file, "rb").close()


def _encode_line(tokenizer: Any, recent_messages: int, options: dict, line: bytes) -> dict[str, Any]:
    """A row without its place: tokens, or a problem."""
    empty = {"write_ids": [], "write_segments": [], **{name: [] for name in _ABOUT_QUESTIONS}}
    if options["with_context"]:
        empty["context_ids"] = []
    try:
        episode = parse_episode(_read_json(line), recent_messages)
    except ValueError as error:
        return {**empty, "problem": str(error)}
    try:
        return {**encode_episode(tokenizer, episode, **options), "problem": None}
    except (TemplateError, ArithmeticError, LookupError) as error:
        return {**empty, "problem": f"the chat template refuses it ({error})"}
    except (TypeError, ValueError) as error:
        # A TypeError is the template's, which adds texts and lists, or the tokenizer's, which knows no halves
        # of surrogate pairs.
        return {**empty, "problem": str(error)}


def _read_json(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig").strip())
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("not JSON that can be read (nested too deeply)") from None


def _report(files: list[str], row: dict[str, Any]) -> str:
    return f"{files[row['file']]}:{row['line']}: {' '.join(row['problem'].split())}"


def _fingerprint(files: list[str], tokenizer: Any, options: dict[str, Any]) -> str:
    """Changes with all that the tokens depend on: contents of files, tokenizer, options, and this code."""
    digest = hashlib.sha256(f"{__version__} {json.dumps(options, sort_keys=True)}".encode())
    for code in (__file__, segments.__file__):
        digest.update(Path(code).read_bytes())
    digest.update(_tokenizer_settings(tokenizer).encode())
    for file in files:
        contents = hashlib.sha256()
        with open(file, "rb") as data:
            while block := data.read(1 << 20):
                contents.update(block)
        digest.update(contents.digest())
    return digest.hexdigest()[:32]


def _tokenizer_settings(tokenizer: Any) -> str:
    settings: dict[str, Any] = {"vocabulary": None}
    if tokenizer.is_fast:
        settings = json.loads(tokenizer.backend_tokenizer.to_str())
        # What the last call asked for, not what the tokenizer is.
        settings["truncation"] = settings["padding"] = None
    else:
        settings = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    named = {"template": tokenizer.chat_template, "special": tokenizer.special_tokens_map}
    return json.dumps([settings, named], sort_keys=True, default=str)


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise ImportError('training data needs datasets: pip install -e ".[train]"') from None
    return datasets


# ---- streams ---------------------------------------------------------------------------------------


class EpisodeStream(IterableDataset):
    """The episodes of files, read and tokenized when they are asked for.

    Iterated over, it is one pass in the files' order. The worker processes of a `DataLoader` share the lines.

    Args:
        files: paths.
        encode: makes a row of a line, with the reason if it cannot be used.
        strict, on_skip: as in `load_episodes`.

    Raises:
        LineError: while iterating, if not one line can be used or, with `strict`, for the first that cannot.
    """

    def __init__(
        self,
        files: list[str],
        encode: Callable[[bytes], dict[str, Any]],
        strict: bool,
        on_skip: Callable[[str], None],
    ):
        self.files = files
        self.encode = encode
        self.strict = strict
        self.on_skip = on_skip
        self._told = False  # of the lines left out: a whole pass has been
        self._shuffle: tuple[int, int] | None = None

    def endless(self, seed: int, buffer_size: int = SHUFFLE_BUFFER) -> EpisodeStream:
        """Pass after pass, each in another order: what a run is trained on.

        One pass would do as well, since the Trainer asks for it again and again; but a run that goes on from
        a checkpoint finds its place in an endless stream only.

        Args:
            seed: of the orders.
            buffer_size: episodes that are held, to draw the next one from.
        """
        stream = copy.copy(self)
        stream._shuffle = seed, buffer_size
        return stream

    def __iter__(self) -> Iterator[dict[str, list]]:
        if self._shuffle is None:
            yield from self._pass()
            return
        seed, buffer_size = self._shuffle
        for number in itertools.count():
            row = None
            for row in _shuffled(self._pass(), Random(f"{seed} {number}"), buffer_size):
                yield row
            if row is None:  # a worker's share holds nothing to be used
                return

    def _pass(self) -> Iterator[dict[str, list]]:
        worker = get_worker_info()
        reader, readers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        first, usable = None, False
        for row in _rows(self.files, self.encode, self.strict, reader, readers):
            if row["problem"] is None:
                usable = True
                yield {name: value for name, value in row.items() if name not in _ABOUT}
                continue
            first = first or _report(self.files, row)
            if not self._told:
                self.on_skip(_report(self.files, row))
        self._told = True
        if not usable and readers == 1:
            raise LineError(f"not one line can be used; the first is {first}")


def _shuffled(rows: Iterable[Any], rng: Random, buffer_size: int) -> Iterator[Any]:
    buffer: list[Any] = []
    for row in rows:
        if len(buffer) < buffer_size:
            buffer.append(row)
            continue
        place = rng.randrange(buffer_size)
        yield buffer[place]
        buffer[place] = row
    rng.shuffle(buffer)
    yield from buffer


# ---- batches ---------------------------------------------------------------------------------------


class EpisodeCollator:
    """Makes a batch of encoded episodes: int64 tensors, padded on the right.

    Args:
        pad_token_id: what padding is filled with; masked, so that any id will do.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, episodes: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch of these episodes (B of them, with N questions in all).

        Args:
            episodes: as `encode_episode` returns them.

        Returns:
            `write_ids`, `write_mask`, `write_segments` [B, tokens]: the histories; padding has segment -1.
            `read_ids`, `read_mask`, `labels` [N, tokens]: query and answer; labels -100 but on the answer.
            `read_segments` [N, tokens]: theirs, as in the histories; an answer is a segment of its own. Only
            if all episodes have `query_segments`.
            `read_rows` [N]: the episode that a question belongs to.
            `context_ids`, `context_mask`, `context_labels` [N, tokens]: the same answers after history and
            query, if the episodes have `context_ids`.
        """
        histories = [list(episode["write_ids"]) for episode in episodes]
        answers = [answer for episode in episodes for answer in episode["answer_ids"]]
        batch = {
            "write_ids": _pad(histories, self.pad_token_id),
            "write_mask": _pad([[1] * len(history) for history in histories], 0),
            "write_segments": _pad([list(episode["write_segments"]) for episode in episodes], -1),
        }
        prompts = [query for episode in episodes for query in episode["query_ids"]]
        batch |= zip(("read_ids", "read_mask", "labels"), self._answered(prompts, answers), strict=True)
        rows = [row for row, episode in enumerate(episodes) for _ in episode["query_ids"]]
        batch["read_rows"] = torch.tensor(rows, dtype=torch.int64)
        if all(episode.get("query_segments") is not None for episode in episodes):
            segments = [one for episode in episodes for one in episode["query_segments"]]
            batch["read_segments"] = _pad(
                [
                    [*query, *[max(query, default=-1) + 1] * len(answer)]
                    for query, answer in zip(segments, answers, strict=True)
                ],
                -1,
            )
        if "context_ids" in episodes[0]:
            prompts = [context for episode in episodes for context in episode["context_ids"]]
            names = ("context_ids", "context_mask", "context_labels")
            batch |= zip(names, self._answered(prompts, answers), strict=True)
        return batch

    def _answered(self, prompts: list[list[int]], answers: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """(ids, mask, labels) of each prompt with its answer."""
        pairs = [(list(prompt), list(answer)) for prompt, answer in zip(prompts, answers, strict=True)]
        return (
            _pad([prompt + answer for prompt, answer in pairs], self.pad_token_id),
            _pad([[1] * (len(prompt) + len(answer)) for prompt, answer in pairs], 0),
            _pad([[-100] * len(prompt) + answer for prompt, answer in pairs], -100),
        )


def _pad(rows: list[list[int]], value: int) -> Tensor:
    """int64 [rows, tokens of the longest], filled up with `value`."""
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows], dtype=torch.int64)
