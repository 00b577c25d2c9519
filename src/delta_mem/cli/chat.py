"""`delta-mem chat`: talk to a model whose old turns leave the context and stay in the memory.

At a terminal it prompts; fed from a pipe it takes one message (or /command) a line, prints the replies to
stdout, and exits with 1 if a line failed. A line that begins with a space is always a message.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from .common import (
    DeviceOption,
    Dtype,
    DtypeOption,
    alone_in,
    catch_interrupts,
    complain,
    err,
    facts_table,
    find_adapter,
    find_model,
    holds,
    layer_grid,
    load_backbone,
    option,
    out,
    plural,
    printable,
    size,
    user_errors,
)

if TYPE_CHECKING:
    from ..chat import ChatSession
    from ..model import DeltaMemModel

WINDOW = 4


def chat(
    model: Annotated[
        str,
        option(
            "--model",
            "-m",
            metavar="NAME",
            help="The backbone: a folder, a hub id, or 'offline', the small model that comes with delta-mem.",
        ),
    ],
    adapter: Annotated[
        str | None,
        option(
            "--adapter",
            "-a",
            metavar="NAME",
            help="Its adapter: a folder, or a hub id; tsw, ssw or msw of the offline model. "
            "The offline model's is tsw if none is named; of others it is then untrained.",
        ),
    ] = None,
    window: Annotated[
        str | None,
        option(
            metavar="N|all",
            help="Messages kept in the context, the new one included.",
            show_default=f"{WINDOW}, or as saved",
        ),
    ] = None,
    system: Annotated[
        str | None,
        option(metavar="TEXT", help="A system prompt; always in the context."),
    ] = None,
    session: Annotated[
        Path | None,
        option(
            metavar="DIR",
            help="Go on with the chat saved in this folder, if any; save it there after every message.",
        ),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.auto,
    max_new_tokens: Annotated[
        int | None,
        option(metavar="N", min=1, help="Longest reply, in tokens.", show_default="the model's own, or 512"),
    ] = None,
    temperature: Annotated[
        float | None,
        option(
            metavar="T", min=0, help="Of sampling; 0: the likeliest token.", show_default="the model's own"
        ),
    ] = None,
) -> None:
    """Chat with a model that remembers what has left its context.

    /help lists what can be done meanwhile: look into the memory, save it, fork it, forget. Ctrl-C stops a
    reply, Ctrl-D leaves. From a pipe, every line is a message.

    Example: delta-mem chat -m Qwen/Qwen3-4B -a my-adapter --session ada
    """
    options: dict[str, Any] = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    if temperature is not None:
        options |= {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with user_errors(), contextlib.ExitStack() as held:
        messages = None if window is None else parse_window(window)
        own = find_model(model, dtype)[1]
        adapter = find_adapter(adapter, own) if adapter else next(iter(own.values()), None)
        there = session is not None and _holds_chat(session)
        if there:
            held.enter_context(alone_in(session))
        with _loading(model):
            loaded, tokenizer = _load(model, adapter, device, dtype)
        if session is not None and not there:
            held.enter_context(alone_in(session))  # if this fails, then before the chat
        resume = session is not None and _holds_chat(session)
        if adapter is None:
            err.print(
                "warning: no --adapter, so this is an untrained one: it remembers nothing useful.",
                style="yellow",
                soft_wrap=True,
            )
        from ..chat import ChatSession

        if resume:
            first = ChatSession.load(session, loaded, tokenizer, **options)
            if window is not None:
                first.window = messages
            if system is not None:
                err.print("note: --system is ignored, for the saved chat goes on as it was.", style="yellow")
        else:
            chosen = WINDOW if window is None else messages
            first = ChatSession(loaded, tokenizer, window=chosen, system=system, **options)
        held = held.pop_all()

    conversation = Conversation(
        first, lambda path: ChatSession.load(path, loaded, tokenizer, **options), sys.stdin.isatty(), session
    )
    if resume:
        err.print(f"Going on with {session}: {_told(first)}.", markup=False, soft_wrap=True)
    if conversation.interactive:
        err.print("/help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves.", style="dim")
    with held:
        try:
            conversation.run()
        finally:
            if session is not None:
                with user_errors():
                    conversation.sessions[0].save(session)
                told = f"Saved {session}: {_told(conversation.sessions[0])}."
                if len(conversation.sessions) > 1:
                    told += " The copy is gone with this; /save keeps one."
                err.print(told, markup=False, soft_wrap=True)
    if conversation.failed and not conversation.interactive:
        raise typer.Exit(1)


def _loading(name: str) -> contextlib.AbstractContextManager[Any]:
    """Says so while it lasts. A download has progress bars of its own, which a spinner would hide."""
    line = Text(f"Loading {name} …", style="dim")
    if Path(name).is_dir():
        return err.status(line)
    err.print(line, soft_wrap=True)
    return contextlib.nullcontext()


def _load(name: str, adapter: str | None, device: str, dtype: Dtype) -> tuple[DeltaMemModel, Any]:
    import torch

    from .. import DeltaMemModel
    from ..checkpoint import load_adapter

    if adapter is not None:
        load_adapter(adapter)  # a wrong path shows here, before the minutes that a large backbone takes
    backbone, tokenizer = load_backbone(name, device, dtype)
    if adapter is not None:
        return DeltaMemModel.from_pretrained(backbone, adapter), tokenizer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same adapter at every start, so that a saved chat can be gone on with
        return DeltaMemModel(backbone), tokenizer


def _holds_chat(folder: Path) -> bool:
    """Whether `folder` holds a saved chat. If not, it must be free to hold one."""
    from ..chat import SESSION_FILE

    return holds(folder, SESSION_FILE, "saved chat")


def parse_window(text: str) -> int | None:
    """A number of messages, or None for "all"."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"the window is a number of messages, at least 1, or 'all', not {text!r}.")
    return int(text)


# ---- the conversation ------------------------------------------------------------------------------


# name: (argument, what it does); done by the method `_name` of `Conversation`.
COMMANDS = {
    "memory": ("", "what the memory holds, and what is in the context"),
    "forget": ("", "empty the memory and the conversation"),
    "save": ("DIR", "save the chat to a folder"),
    "load": ("DIR", "go on in a copy of a saved chat; the original stays as it is"),
    "fork": ("", "go on in a copy; the original stays as it is"),
    "back": ("", "leave the copy and return to the original"),
    "window": ("N|all", "keep N messages in the context, or all"),
    "regenerate": ("", "take the last reply back and reply anew"),
    "help": ("", "this list"),
    "quit": ("", "leave; so does Ctrl-D"),
}


class Conversation:
    """Reads lines, replies, and does /commands.

    Args:
        session: what to talk to.
        load: opens a saved chat.
        interactive: there is a person at a terminal.
        folder: where the original is saved whenever it has changed, if anywhere.

    Attributes:
        sessions: the original, then copies: forks and loaded chats; the last one is talked to.
        failed: a line could not be done.
    """

    def __init__(
        self,
        session: ChatSession,
        load: Callable[[str], ChatSession],
        interactive: bool,
        folder: Path | None = None,
    ):
        self.sessions = [session]
        self.folder = None if folder is None else folder.resolve()
        self.own = {(session, self.folder)}  # folders that a session may be saved to unasked
        self.load = load
        self.interactive = interactive
        self.failed = False

    @property
    def session(self) -> ChatSession:
        return self.sessions[-1]

    def run(self) -> None:
        """Until the input ends, or /quit."""
        from jinja2 import TemplateError
        from torch import OutOfMemoryError

        catch_interrupts()
        for line in self._lines():
            if line.strip() == "/quit":
                return
            try:
                if line.startswith("/"):
                    self._command(line)
                elif line.strip():
                    self._say(line.strip())
            except BrokenPipeError:  # nobody reads the replies any more
                raise
            except (ValueError, OSError, TemplateError, OutOfMemoryError) as error:
                self.failed = True
                complain(error)
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                err.print("\nStopped; nothing has changed.", style="dim")

    def _lines(self) -> Iterator[str]:
        if not self.interactive:
            for line in sys.stdin:
                yield line.rstrip("\r\n")
            return
        # With readline, input() edits lines and recalls earlier ones.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
        while True:
            try:
                yield input("copy> " if len(self.sessions) > 1 else "> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                err.print("\nCtrl-D or /quit leaves.", style="dim")

    def _keep(self) -> None:
        """Saves the original, so that whatever ends the process loses nothing."""
        if self.folder is None or self.session is not self.sessions[0]:
            return
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self.session.save(self.folder)
        except OSError as error:
            raise OSError(f"done, but not saved: {error}") from None
        finally:
            signal.signal(signal.SIGINT, before)

    def _say(self, text: str) -> None:
        with _first_interrupt_only(), contextlib.closing(self.session.stream(text)) as pieces:
            try:
                for piece in pieces:
                    sys.stdout.write(printable(piece))
                    sys.stdout.flush()
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                sys.stdout.write(" …")
            print(flush=True)
            if self.interactive:
                print()
            self._keep()

    # ---- /commands ---------------------------------------------------------------------------------

    def _command(self, line: str) -> None:
        name, _, argument = line[1:].strip().partition(" ")
        argument = argument.strip()
        if name not in COMMANDS:
            raise ValueError(f"no command /{name}: /help lists them; a space before it makes it a message.")
        wanted = COMMANDS[name][0]
        if bool(argument) != bool(wanted):
            now = f" (now {self.session.window or 'all'})" if name == "window" else ""
            raise ValueError(f"usage: /{name} {wanted}".rstrip() + now)
        getattr(self, f"_{name}")(*([argument] if wanted else []))

    def _memory(self) -> None:
        from ..segments import SYSTEM_ROLES

        session, memory = self.session, self.session.memory
        turns = [message for message in session.messages if message["role"] not in SYSTEM_ROLES]
        kept = turns if session.window is None else turns[len(turns) - min(len(turns), session.window - 1) :]
        out.print(
            facts_table(
                {
                    "memory": f"{plural(int(memory.tokens_written), 'token')} written, {size(memory.nbytes)}",
                    "context": f"{len(kept)} of {plural(len(turns), 'message')} beside the next one "
                    f"(window {session.window or 'all'})",
                    **{f"  {index}": _excerpt(message) for index, message in _numbered(turns, kept)},
                }
            )
        )
        out.print("norm of the state, by layer", style="dim")
        out.print(layer_grid({layer: float(state.norm()) for layer, state in memory.layers.items()}))

    def _forget(self) -> None:
        if self.interactive and not _agrees("Forget the memory and the conversation? [y/N] "):
            out.print("Nothing is forgotten.")
            return
        self.session.reset()
        self._keep()
        out.print("Forgotten.")

    def _save(self, folder: str) -> None:
        place = Path(folder).resolve()
        if place == self.folder and self.session is not self.sessions[0]:
            raise ValueError(f"the original is saved to {folder}; name another folder.")
        _holds_chat(place)  # a wrong path shows before a folder is made
        with contextlib.nullcontext() if place == self.folder else alone_in(place):
            if _holds_chat(place) and (self.session, place) not in self.own:
                if not self.interactive:
                    raise ValueError(f"{folder} holds another chat; name another folder.")
                if not _agrees(f"{folder} holds another chat. Replace it? [y/N] "):
                    out.print("Nothing is saved.")
                    return
            self.session.save(folder)
        self.own.add((self.session, place))
        out.print(f"Saved to {folder}: {_told(self.session)}.", markup=False, soft_wrap=True)

    def _load(self, folder: str) -> None:
        copy = self.load(folder)
        out.print(f"Loaded {folder}: {_told(copy)}.", markup=False, soft_wrap=True)
        self._enter(copy)
        self.own.add((copy, Path(folder).resolve()))

    def _fork(self) -> None:
        self._enter(self.session.fork())

    def _enter(self, copy: ChatSession) -> None:
        self.sessions.append(copy)
        out.print("You are in a copy: /back drops it and returns, /save DIR keeps it.")

    def _back(self) -> None:
        if len(self.sessions) == 1:
            raise ValueError("this is the original; /fork and /load make copies.")
        self.sessions.pop()
        where = "the original" if len(self.sessions) == 1 else "the copy before"
        out.print(f"Back in {where}: {_told(self.session)}.")

    def _window(self, text: str) -> None:
        self.session.window = parse_window(text)
        self._keep()
        out.print(f"The context keeps {_window_name(self.session.window)}.")

    def _regenerate(self) -> None:
        with err.status("…"):
            reply = self.session.regenerate()
        print(printable(reply), flush=True)
        if self.interactive:
            print()
        self._keep()

    def _help(self) -> None:
        rows = {f"/{name} {argument}": Text(does) for name, (argument, does) in COMMANDS.items()}
        out.print(facts_table(rows))


@contextlib.contextmanager
def _first_interrupt_only() -> Iterator[None]:
    """Lets one Ctrl-C through and drops the others: the first has asked the model to stop, which it does
    after the token that it is at, and a second one would leave it running unattended."""

    def interrupt(number, frame):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _agrees(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


def _told(session: ChatSession) -> str:
    tokens = int(session.memory.tokens_written)
    return f"{plural(len(session.messages), 'message')}, {plural(tokens, 'token')} in the memory"


def _window_name(window: int | None) -> str:
    return "all messages" if window is None else f"{plural(window, 'message')}, the new one included"


def _numbered(turns: list[dict], kept: list[dict]) -> Iterator[tuple[int, dict]]:
    return enumerate(kept, len(turns) - len(kept) + 1)


def _excerpt(message: dict) -> Text:
    text = Text.assemble(
        (f"{message['role']}: ", "dim"), printable(" ".join((message["content"] or "").split()))
    )
    text.truncate(max(out.width - 12, 20), overflow="ellipsis")
    return text
