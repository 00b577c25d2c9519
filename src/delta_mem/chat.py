"""`ChatSession`: a conversation whose old turns leave the context and stay in the memory.

    chat = ChatSession(model, tokenizer, window=2)
    chat.send("My sister Ada lives in Lisbon.")
    for piece in chat.stream("Where does my sister live?"):
        print(piece, end="")

The context holds the system prompts and the last `window` messages. Every message's own tokens are written
into the memory exactly once, when the message is new; when they are read again as part of the context, they
are only read. System prompts and the chat template's glue are never written. A reply is written token by
token while it is generated, and its last token, which `generate` leaves unfed, right after.

A reply depends on messages, memory and window alone: no KV cache outlives its turn, so a session that was
saved and loaded goes on as if it never stopped. Whatever fails leaves the session as it was.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS
from transformers.generation.streamers import TextStreamer
from transformers.utils import TransformersKwargs

from .backbones import causal_lm
from .errors import AdapterFormatError
from .files import check_header, read_json, write_together
from .generation import end_tokens
from .model import DeltaMemModel
from .segments import SYSTEM_ROLES, Encoded, encode_messages
from .state import MemoryState

logger = logging.getLogger(__name__)

# Keywords of generate that would make a turn something else than one reply to these messages.
_OWN = {
    "inputs", "input_ids", "attention_mask", "memory", "write", "segment_ids", "keep_segment_open",
    "past_key_values", "use_cache", "num_beams", "num_return_sequences", "return_dict_in_generate",
    "custom_generate", "token_healing",
}  # fmt: skip

FORMAT = "delta-mem-session"
FORMAT_VERSION = 1
SESSION_FILE = "session.json"
ABANDONED = 600  # seconds after which a memory's file that no session.json names is left of a crash
_SAVED = re.compile(r"(memory|before)-\d+-[0-9a-f]{8}\.safetensors")  # files that `save` makes beside it


class ChatSession:
    """One conversation of one user with a `DeltaMemModel`.

    Args:
        model: the model; any number of sessions may share it, in any number of threads.
        tokenizer: a tokenizer with a chat template.
        memory: what the session remembers, batch size 1, advanced in place; None: an empty one.
        window: messages kept in the context, the new one included (at least 1), system prompts not counted;
            None: all of them.
        system: a system prompt; always in the context, never written.
        generate_kwargs: defaults for every reply, such as `max_new_tokens` (512 unless said), `do_sample`.

    Attributes:
        messages: [{"role": …, "content": …}, …], the whole conversation, the system prompt first.
        memory: the memory.
        window: may be changed at any time.

    Raises:
        TypeError: a model that is no DeltaMemModel, a memory that is no MemoryState, or a system prompt that
            is no string.
        ValueError: no chat template, a memory of more than one row, a window below 1, or an option that the
            chat decides itself or `generate` does not know.
        IncompatibleMemoryError: a memory of another adapter.
    """

    def __init__(
        self,
        model: DeltaMemModel,
        tokenizer: Any,
        memory: MemoryState | None = None,
        window: int | None = None,
        system: str | None = None,
        **generate_kwargs: Any,
    ):
        _check_model(model)
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template; set tokenizer.chat_template.")
        memory = model.new_memory() if memory is None else memory
        if isinstance(memory, MemoryState) and memory.batch_size != 1:
            raise ValueError(
                f"a chat has a memory of one row, this one has {memory.batch_size}: pass memory[i]."
            )
        model.check_memory(memory, 1)
        _check_options(model, generate_kwargs)
        self.model, self.tokenizer, self.memory = model, tokenizer, memory
        self.window = window
        self.messages = [] if system is None else [_message("system", system)]
        self.generate_kwargs = generate_kwargs
        self._before: tuple[MemoryState, int] | None = None  # memory and messages before the last reply
        self._written = int(memory.tokens_written)  # when the last turn ended
        self._busy = threading.Lock()

    @property
    def window(self) -> int | None:
        return self._window

    @window.setter
    def window(self, window: int | None) -> None:
        if not _is_window(window):
            raise ValueError(f"window must be None or an integer of at least 1, got {window!r}.")
        self._window = window

    # ---- talking ---------------------------------------------------------------------------------

    def send(self, text: str, **generate_kwargs: Any) -> str:
        """Says `text` as the user and returns the reply.

        Args:
            text: the user's message.
            generate_kwargs: any of `generate`'s, for this reply only.

        Raises:
            ValueError: an empty message, one whose content the chat template leaves out, or an option that
                the chat decides itself or `generate` does not know.
            jinja2.TemplateError: the chat template refuses the conversation.
            IncompatibleMemoryError: the model's adapter has changed since the memory was written.
            RuntimeError: the session is busy with another call.
        """
        with self._alone():
            return self._reply(_user_message(text), generate_kwargs)

    def stream(self, text: str, **generate_kwargs: Any) -> Iterator[str]:
        """Says `text` and yields the reply piece by piece, as it is generated.

        Closing the iterator early (`break`, Ctrl-C) stops the model after the token it is at. What was
        said until then stays, as the reply in `messages` and in the memory.

        Raises:
            ValueError: an empty message. All else that `send` raises comes with the first piece.
        """
        return self._stream(_user_message(text), generate_kwargs)

    def add(self, role: str, content: str) -> None:
        """Takes in a message without replying: a transcript's line, a document, a tool's result.

        It is read with the context of its turn, and written into the memory. One of a system role ("system",
        "developer") is not written: it stays in the context.

        Raises:
            TypeError: a role that is no string, or a content that is neither a string nor None.
            ValueError: a content that the chat template leaves out.
            jinja2.TemplateError: the chat template refuses it, as some refuse a system role in the middle.
            IncompatibleMemoryError: the model's adapter has changed since the memory was written.
            RuntimeError: the session is busy with another call.
        """
        with self._alone():
            self._take_turn([*self.messages, _message(role, content)], len(self.messages))

    def regenerate(self, **generate_kwargs: Any) -> str:
        """Takes the last reply back, out of the memory too, and replies anew.

        Raises:
            ValueError: there is no reply to take back, or memory or messages were changed since; and all
                that `send` raises.
        """
        with self._alone():
            if self._before is None:
                raise ValueError("there is no reply to regenerate.")
            if int(self.memory.tokens_written) != self._written:
                raise ValueError("the memory has been written to since the reply: it cannot be taken back.")
            memory, count = self._before
            if len(self.messages) != count + 2:
                raise ValueError("messages were changed since the reply: it cannot be taken back.")
            undone = copy.copy(self)
            undone.memory, undone.messages = memory.fork(), self.messages[:count]
            reply = undone._reply(self.messages[count], generate_kwargs)
            self._commit(undone.memory, undone.messages, undone._before)
            return reply

    def reset(self) -> None:
        """Forgets the conversation and the memory; system prompts stay.

        Raises:
            RuntimeError: the session is busy with another call.
        """
        with self._alone():
            self._commit(
                self.model.new_memory(), [m for m in self.messages if m["role"] in SYSTEM_ROLES], None
            )

    def fork(self) -> ChatSession:
        """An independent session with the same past.

        Raises:
            IncompatibleMemoryError: the model's adapter has changed since the memory was written.
            RuntimeError: the session is busy with another call.
        """
        with self._alone():
            other = ChatSession(self.model, self.tokenizer, self.memory.fork(), self.window)
            other.generate_kwargs = dict(self.generate_kwargs)
            other.messages = copy.deepcopy(self.messages)
            if self._before is not None:
                other._before = (self._before[0].fork(), self._before[1])
            other._written = self._written
            return other

    # ---- files -----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Saves messages and memory to a folder. `session.json` is replaced last: a crash loses nothing.

        Raises:
            FileExistsError: `path` is a file.
            ValueError: the memory holds NaN or infinity, or `messages` something else than messages.
            RuntimeError: the session is busy with another call.
        """
        with self._alone():
            folder = Path(path)
            if not _are_messages(self.messages):
                raise ValueError("messages must be dicts with a role and a content that is a string or None.")
            if folder.is_file():
                raise FileExistsError(f"{folder} is a file; name a folder.")
            folder.mkdir(parents=True, exist_ok=True)
            memories = {"memory": self.memory}
            if self._before is not None:
                memories["before"] = self._before[0]
            before = _files_of(folder)
            # Never a name that there was: another save, earlier or at the same time, is not overwritten.
            files = {
                name: f"{name}-{len(self.messages)}-{os.urandom(4).hex()}.safetensors" for name in memories
            }
            values = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "window": self.window,
                "messages": self.messages,
                "memory": files["memory"],
                "before": None
                if self._before is None
                else {"memory": files["before"], "messages": self._before[1]},
            }
            data = {folder / files[name]: memory.to_bytes() for name, memory in memories.items()}
            data[folder / SESSION_FILE] = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
            write_together(data)
            for file in folder.glob("*-*-*.safetensors"):
                if not _SAVED.fullmatch(file.name) or file.name in files.values():
                    continue
                with contextlib.suppress(FileNotFoundError):
                    # Others that are new may be those of a save that is not done yet.
                    if file.name in before or time.time() - file.stat().st_mtime > ABANDONED:
                        file.unlink()

    @classmethod
    def load(
        cls, path: str | os.PathLike, model: DeltaMemModel, tokenizer: Any, **generate_kwargs: Any
    ) -> ChatSession:
        """A session that `save` saved, to go on with.

        Raises:
            TypeError: a model that is no DeltaMemModel; or a memory, a window or a system prompt is given.
            ValueError: no chat template, or an option that the chat decides itself or `generate` knows not.
            FileNotFoundError: no session there.
            AdapterFormatError: a broken file; file and field are named.
            IncompatibleMemoryError: its memory was written by another adapter.
        """
        _check_model(model)
        taken = sorted({"memory", "window", "system"}.intersection(generate_kwargs))
        if taken:
            raise TypeError(f"a saved chat brings its own {', '.join(taken)}; leave it out.")
        folder = Path(path)

        def memory(name):
            loaded = model.place(MemoryState.load(folder / name))
            model.check_memory(loaded, 1)
            return loaded

        while True:
            named = _files_of(folder)
            try:
                values = read_session(folder)
                before = values["before"]
                now, then = memory(values["memory"]), None if before is None else memory(before["memory"])
                break
            except (FileNotFoundError, AdapterFormatError):
                if _files_of(folder) == named:
                    raise
                # Else another save has taken this one's place in between.
        session = cls(model, tokenizer, now, values["window"], **generate_kwargs)
        session.messages = values["messages"]
        if before is not None:
            session._before = (then, before["messages"])
        return session

    # ---- one turn --------------------------------------------------------------------------------

    def _reply(self, message: dict, generate_kwargs: dict, streamer=None, stop=None) -> str:
        """Takes `message` in, generates the reply and takes that in too."""
        _check_options(self.model, generate_kwargs)
        options = {**self.generate_kwargs, **generate_kwargs}
        if streamer is not None and options.get("streamer") is not None:
            raise ValueError("stream() has a streamer of its own; pass streamer= to send().")
        options["streamer"] = streamer or options.get("streamer")
        if stop is not None:
            criteria = StoppingCriteriaList(options.get("stopping_criteria") or [])
            options["stopping_criteria"] = StoppingCriteriaList([*criteria, stop])
        return self._take_turn([*self.messages, message], len(self.messages), options)

    def _take_turn(self, messages: list[dict], first_new: int, options: dict | None = None) -> str:
        """Writes messages from `first_new` on and, given `options`, generates a reply.

        Memory and messages change together at the end, or not at all.
        """
        before = None if options is None else (self.memory.fork(), first_new)
        ids, write, segments = self._context(messages, first_new, add_generation_prompt=options is not None)
        places = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if places is not None and len(ids) > places:
            logger.warning(
                "the context has %d tokens, more than the model's %d positions: keep fewer messages in it.",
                len(ids), places,
            )  # fmt: skip
        memory, device = self.memory.fork(), self.model.device
        self.model.close_segment(memory)  # one that was open before the chat is no part of its messages
        inputs, write, segments = (torch.tensor([row], device=device) for row in (ids, write, segments))
        reply = ""
        with torch.no_grad():
            if options is None:
                self.model.write(memory, inputs, write=write, segment_ids=segments)
            else:
                config, options = self._generation_config(options, inputs.shape[1])
                output = self.model.generate(
                    inputs, memory=memory, write=write, segment_ids=segments, keep_segment_open=True,
                    attention_mask=torch.ones_like(inputs), generation_config=config, **options,
                )  # fmt: skip
                said = output.sequences[0, inputs.shape[1] :].tolist()
                self._take_last_token(output, config.eos_token_id, memory, segments)
                reply = self.tokenizer.decode(said, skip_special_tokens=True)
                messages = [*messages, {"role": "assistant", "content": reply}]
        self._commit(memory, messages, before)
        return reply

    def _take_last_token(self, output: Any, ends: list[int], memory: MemoryState, segments: Tensor) -> None:
        """Feeds the token that `generate` sampled last, unless it only says that the reply is over."""
        last = output.sequences[:, -1:]
        if int(last) in ends:
            self.model.close_segment(memory)
            return
        self.model(
            last, torch.ones_like(output.sequences), memory=memory, past_key_values=output.past_key_values,
            segment_ids=segments.amax(1, keepdim=True) + 1, use_cache=True,
        )  # fmt: skip

    def _context(
        self, messages: list[dict], first_new: int, add_generation_prompt: bool
    ) -> tuple[list[int], list[bool], list[int]]:
        """ids, which of them to write, and their segments, of what the model is to see."""
        roles = [message["role"] for message in messages]
        turns = [i for i, role in enumerate(roles) if role not in SYSTEM_ROLES]
        turns = turns[-self.window if self.window else 0 :]
        kept = sorted([*turns, *(i for i, role in enumerate(roles) if role in SYSTEM_ROLES)])
        try:
            encoded = self._encode([messages[i] for i in kept], add_generation_prompt)
        except TemplateError:
            # Some templates want a conversation to begin with the user.
            head = turns[0] if turns else first_new
            if head >= first_new or messages[head]["role"] != "assistant":
                raise
            kept.remove(head)
            encoded = self._encode([messages[i] for i in kept], add_generation_prompt)
        ids, segments, owners = (column.tolist() for column in encoded)
        new = [
            segment >= 0 and kept[message] >= first_new
            for segment, message in zip(segments, owners, strict=True)
        ]
        if self.model.delta_config.write == "token":
            return ids, new, segments
        # Glue between the new messages is not written for its segment id, but must end their segments.
        first = new.index(True) if True in new else len(new)
        return ids, [False] * first + [True] * (len(new) - first), segments

    def _encode(self, messages: list[dict], add_generation_prompt: bool) -> Encoded:
        return encode_messages(self.tokenizer, messages, self.model.delta_config.write, add_generation_prompt)

    def _generation_config(self, options: dict, prompt: int) -> tuple[GenerationConfig, dict]:
        """How to generate one reply after `prompt` tokens, and what else generate is to be given."""
        given = options.pop("generation_config", None) or self.model.generation_config
        config = copy.deepcopy(given)
        options = config.update(**{key: value for key, value in options.items() if value is not None})
        if config.stop_strings:
            options.setdefault("tokenizer", self.tokenizer)
        if config.max_new_tokens is None and config.max_length is None:
            config.max_new_tokens = 512
        config.eos_token_id = end_tokens(config, self.tokenizer)
        if config.pad_token_id is None:
            pad = self.tokenizer.pad_token_id
            config.pad_token_id = pad if pad is not None else next(iter(config.eos_token_id), 0)
        if config.cache_implementation in ALL_STATIC_CACHE_IMPLEMENTATIONS:
            # It is made to measure, without room for the last token, which is fed afterwards.
            length = config.max_length if config.max_new_tokens is None else prompt + config.max_new_tokens
            config.max_cache_len = max(length, config.max_cache_len or 0)
        config.use_cache = config.return_dict_in_generate = True
        config.num_beams = config.num_return_sequences = 1
        return config, options

    # ---- streaming -------------------------------------------------------------------------------

    def _stream(self, message: dict, generate_kwargs: dict) -> Iterator[str]:
        pieces = _Pieces(self.tokenizer)
        stop = _Stop()
        device = self.model.device.type
        autocast = functools.partial(  # the caller's, which is a thread's own
            torch.autocast, device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        )

        def run():
            try:
                with autocast():
                    self._reply(message, generate_kwargs, pieces, stop)
            except BaseException as error:  # handed to the thread that reads
                pieces.queue.put(error)
            finally:
                pieces.queue.put(None)

        thread = threading.Thread(target=run, name="delta-mem-stream", daemon=True)
        with self._alone():
            thread.start()
            try:
                while (piece := pieces.queue.get()) is not None:
                    if isinstance(piece, BaseException):
                        raise piece
                    yield piece
            finally:
                stop.now = True
                while thread.is_alive():
                    # A second Ctrl-C must not leave the session while its turn is still being written.
                    with contextlib.suppress(KeyboardInterrupt):
                        thread.join()

    def _alone(self) -> _Alone:
        return _Alone(self._busy)

    def _commit(
        self, memory: MemoryState, messages: list[dict], before: tuple[MemoryState, int] | None
    ) -> None:
        """Where a turn, or what else changes a conversation, ends."""
        written = int(memory.tokens_written)
        self.memory.assign(memory)
        self.messages, self._before, self._written = messages, before, written


def read_session(path: str | os.PathLike) -> dict[str, Any]:
    """What a saved session's `session.json` holds: `window`, `messages`, and the memories' file names.

    Raises:
        FileNotFoundError: no session there.
        AdapterFormatError: broken; file and field are named.
    """
    folder = Path(path)
    file = folder / SESSION_FILE
    values = read_json(file)
    check_header(file, values, FORMAT, FORMAT_VERSION, ("window", "messages", "memory", "before"))
    if not _are_messages(values["messages"]):
        wrong = "messages"
    elif not _is_window(values["window"]):
        wrong = "window"
    elif not _is_file_in(folder, values["memory"]):
        if isinstance(values["memory"], str) and _SAVED.fullmatch(values["memory"]):
            raise AdapterFormatError(f"{folder / values['memory']}: missing.")
        wrong = "memory"
    elif not _is_place(folder, values["before"], len(values["messages"])):
        wrong = "before"
    else:
        return values
    raise AdapterFormatError(f"{file}: {wrong}: {str(values[wrong])[:60]} is not what save() writes.")


def _files_of(folder: Path) -> list[str]:
    """The memories' files of the chat that is saved there, if one is."""
    try:
        values = read_json(folder / SESSION_FILE)
    except (OSError, AdapterFormatError):
        return []
    before = values.get("before")
    names = values.get("memory"), before.get("memory") if isinstance(before, dict) else None
    return [name for name in names if isinstance(name, str) and _SAVED.fullmatch(name)]


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content", 0), str | None)
        for m in value
    )


def _is_window(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)


def _is_file_in(folder: Path, name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and (folder / name).is_file()


def _is_place(folder: Path, value: Any, messages: int) -> bool:
    """Whether `value` is what save() writes of the moment before the last reply."""
    if value is None:
        return True
    if not isinstance(value, dict) or not _is_file_in(folder, value.get("memory")):
        return False
    return isinstance(value.get("messages"), int) and 0 <= value["messages"] < messages


class _Alone:
    """Holds a session for one operation at a time; a second one is told, not made to wait."""

    def __init__(self, lock: threading.Lock):
        self.lock = lock

    def __enter__(self) -> None:
        if not self.lock.acquire(blocking=False):
            raise RuntimeError("this session is busy: finish or close the running stream first.")

    def __exit__(self, *error: Any) -> None:
        self.lock.release()


class _Pieces(TextStreamer):
    """Puts the reply's text, piece by piece, into a queue."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.queue: queue.Queue[str | BaseException | None] = queue.Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.queue.put(text)


class _Stop(StoppingCriteria):
    """Ends a generation from outside."""

    now = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.now, dtype=torch.bool, device=input_ids.device)


def _check_model(model: Any) -> None:
    if not hasattr(model, "check_memory"):  # what torch.compile returns is no DeltaMemModel, and will do
        raise TypeError(
            f"model must be a DeltaMemModel, got {type(model).__name__}: give a backbone its adapter with "
            "DeltaMemModel.from_pretrained(backbone, adapter)."
        )


def _check_options(model: DeltaMemModel, options: dict[str, Any]) -> None:
    taken = sorted(_OWN.intersection(options))
    if taken:
        raise ValueError(f"a chat decides {', '.join(taken)} itself; leave it out.")
    backbone = causal_lm(model.backbone)
    config = options.get("generation_config") or backbone.generation_config
    known = {*vars(GenerationConfig()), *vars(config), "tokenizer", "assistant_tokenizer"}
    known |= TransformersKwargs.__annotations__.keys()
    for function in (backbone.generate, backbone.forward):
        parameters = inspect.signature(function).parameters.values()
        known |= {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    unknown = sorted(name for name, value in options.items() if value is not None and name not in known)
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: generate knows no such option.")


def _user_message(text: str) -> dict[str, str]:
    if not isinstance(text, str) or not text.strip():
        raise ValueError("the message is empty.")
    return _message("user", text)


def _message(role: str, content: str | None) -> dict[str, str | None]:
    for name, value, kind in (("role", role, str), ("content", content, str | None)):
        if not isinstance(value, kind):
            raise TypeError(f"a message's {name} must be a string, got {type(value).__name__}.")
    return {"role": role, "content": content}
