"""`delta-mem train`: an adapter for a frozen backbone, from episodes in JSON Lines files.

Settings come from the command line, then from the recipe (`--config`), then from the paper. A recipe is YAML
with the options' names as keys; what has no option goes under `adapter:` (`DeltaMemConfig`) and
`trainer:` (`MemoryTrainingArguments`). The run's own recipe is kept in its output folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import os
import shlex
from collections.abc import Iterator, Mapping
from datetime import timedelta
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from ..config import DeltaMemConfig
from .common import (
    INTERRUPTED,
    Dtype,
    DtypeOption,
    complain,
    err,
    find_adapter,
    find_model,
    load_backbone,
    new_folder,
    option,
    out,
    plural,
)

if TYPE_CHECKING:
    from ..model import DeltaMemModel
    from ..training import MemoryTrainer, MemoryTrainingArguments

RECIPE_FILE = "recipe.yaml"
SHOWN_PROBLEMS = 20  # of lines that cannot be used; the rest are counted


class Write(str, Enum):
    token = "token"
    message = "message"
    sentence = "sentence"


class Keep(str, Enum):
    newest = "newest"
    oldest = "oldest"


# Options and the fields that they set; the fields are then refused under `adapter:` and `trainer:`.
ADAPTER_FIELDS = {
    "rank": "rank",
    "alpha": "alpha",
    "states": "num_states",
    "heads": "heads",
    "write": "write",
    "layers": "layers",
}
TRAINER_FIELDS = {
    "output": "output_dir",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "accumulate": "gradient_accumulation_steps",
    "gradient_checkpointing": "gradient_checkpointing",
    "seed": "seed",
    "save_every": "save_steps",
    "report_to": "report_to",
    "sparsity_weight": "sparsity_weight",
    "sparsity_target": "sparsity_target",
    "distill_weight": "distill_weight",
    "show_history": "show_history",
    "clear_memory": "clear_memory",
    "write_questions": "write_questions",
    "write_chunk": "write_chunk",
    "gradient_chunks": "gradient_chunks",
}
# Those of the trainer that the command sets itself.
OWN_FIELDS = ("disable_tqdm",)
# What a recipe may hold beside options.
SECTIONS = ("adapter", "trainer")
# The paper's where it says something. `trainer:` may set them otherwise.
TRAINER_DEFAULTS = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # a share of all steps
    "logging_steps": 10,
    "logging_first_step": True,
}


# ---- the command -----------------------------------------------------------------------------------


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Puts a recipe's settings where the options look for values that the command line does not give."""
    if path is not None and not context.resilient_parsing:
        with _user_errors():
            context.default_map = read_recipe(path, context)
    return path


def _share(help: str, metavar: str) -> Any:
    """An option between 0 and 1."""
    return option(help=help, metavar=metavar, min=0, max=1, show_default=True)


def _field_help(name: str) -> str:
    (field,) = (field for field in dataclasses.fields(DeltaMemConfig) if field.name == name)
    return field.metadata["help"]


def train(
    context: typer.Context,
    model: Annotated[
        str, option("--model", "-m", metavar="NAME", help="The backbone: a folder, a hub id, or 'offline'.")
    ],
    data: Annotated[
        list[Path], option("--data", "-d", metavar="FILE", help="Episodes, .jsonl or .jsonl.gz; repeatable.")
    ],
    output: Annotated[
        Path, option("--output", "-o", metavar="DIR", help="A new folder, for checkpoints and the adapter.")
    ],
    config: Annotated[
        Path | None,
        option(
            "--config",
            "-c",
            metavar="FILE",
            help="A recipe: YAML with these options' names as keys. The command line wins over it.",
            is_eager=True,
            callback=_read_config,
        ),
    ] = None,
    resume: Annotated[
        bool, option("--resume", help="Go on from the last checkpoint in --output, with the same settings.")
    ] = False,
    eval_data: Annotated[
        list[Path] | None,
        option(
            "--eval-data",
            metavar="FILE",
            help="Held-out episodes, scored at every checkpoint and at the end; repeatable.",
        ),
    ] = None,
    # The adapter.
    init_from: Annotated[
        str | None,
        option(
            "--init-from",
            metavar="NAME",
            help="Train this adapter on, with its settings: a folder, or a hub id.",
        ),
    ] = None,
    rank: Annotated[int, option(help=_field_help("rank"), metavar="R", min=1, show_default=True)] = 8,
    alpha: Annotated[float, option(help=_field_help("alpha"), metavar="A", show_default=True)] = 16.0,
    states: Annotated[int, option(help=_field_help("num_states"), metavar="H", min=1, show_default=True)] = 1,
    heads: Annotated[str, option(help=_field_help("heads"), metavar="LIST", show_default=True)] = "q,o",
    write: Annotated[
        Write,
        option(
            help="What is written: token (TSW), message or sentence (SSW).", metavar="WHAT", show_default=True
        ),
    ] = Write.token,
    layers: Annotated[
        str | None,
        option(
            help="Layers with a memory, such as 4,8,12.",
            metavar="LIST",
            show_default="every softmax-attention layer",
        ),
    ] = None,
    # Episodes.
    write_tokens: Annotated[
        int, option(help="Longest history, in tokens.", metavar="N", min=1, show_default=True)
    ] = 8192,
    read_tokens: Annotated[
        int,
        option(help="Longest query and answer together, in tokens.", metavar="N", min=1, show_default=True),
    ] = 512,
    keep: Annotated[
        Keep,
        option(help="Tokens kept of a longer history: newest or oldest.", metavar="WHICH", show_default=True),
    ] = Keep.newest,
    recent_messages: Annotated[
        int,
        option(
            help='With "messages" lines: how many messages before the answer are the query.',
            metavar="N",
            min=1,
            show_default=True,
        ),
    ] = 1,
    strict: Annotated[
        bool, option("--strict", help="Stop at the first line that cannot be used; otherwise it is skipped.")
    ] = False,
    streaming: Annotated[
        bool,
        option("--streaming", help="Read and tokenize while training, without a cache; needs --steps."),
    ] = False,
    # The objective.
    sparsity_weight: Annotated[
        float,
        option(help="Weight of the pull on the mean write gate.", metavar="W", min=0, show_default=True),
    ] = 0.01,
    sparsity_target: Annotated[float, _share("Mean write gate that it pulls to.", "G")] = 0.05,
    distill_weight: Annotated[
        float,
        _share(
            "Share of the divergence from the backbone that sees the history; the rest: cross-entropy.", "W"
        ),
    ] = 0.0,
    show_history: Annotated[
        float,
        _share("Probability that a batch's questions are read with the history in the context too.", "P"),
    ] = 0.0,
    clear_memory: Annotated[
        float,
        _share("Probability that the memory is cleared where the history is shown.", "P"),
    ] = 0.0,
    write_questions: Annotated[
        float,
        _share("Probability that a batch's questions are written while they are read, as in a chat.", "P"),
    ] = 0.0,
    write_chunk: Annotated[
        int | None,
        option(
            help="Write a history N tokens at a time, for long ones.",
            metavar="N",
            min=1,
            show_default="all at once",
        ),
    ] = None,
    gradient_chunks: Annotated[
        int | None,
        option(help="Back-propagate through the last N chunks only.", metavar="N", min=1, show_default="all"),
    ] = None,
    # The run.
    epochs: Annotated[
        float, option(help="Passes over the data, or a part of one.", metavar="N", show_default=True)
    ] = 1.0,
    steps: Annotated[
        int | None, option(help="Stop after so many steps, whatever --epochs says.", metavar="N", min=1)
    ] = None,
    lr: Annotated[float, option(help="Peak learning rate.", metavar="RATE", min=0, show_default=True)] = 2e-4,
    batch_size: Annotated[
        int, option(help="Episodes per process and forward pass.", metavar="N", min=1, show_default=True)
    ] = 1,
    accumulate: Annotated[
        int, option(help="Forward passes per step.", metavar="N", min=1, show_default=True)
    ] = 4,
    dtype: DtypeOption = Dtype.auto,
    gradient_checkpointing: Annotated[
        bool,
        option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Compute activations again instead of keeping them: slower, for much less memory.",
        ),
    ] = False,
    seed: Annotated[
        int,
        option(
            help="Of the new adapter, the order of episodes and all else.", metavar="N", show_default=True
        ),
    ] = 42,
    save_every: Annotated[
        int, option(help="Steps between checkpoints.", metavar="N", min=1, show_default=True)
    ] = 500,
    report_to: Annotated[
        list[str] | None, option(help="tensorboard, wandb, …; repeatable.", metavar="NAME")
    ] = None,
) -> None:
    """Train an adapter to answer from its memory.

    A history is written into the memory, then questions are answered without it. Defaults are the paper's.
    Ctrl-C finishes the step, saves a checkpoint and says how to go on. On several GPUs: torchrun
    --nproc-per-node 8 --no-python delta-mem train …

    Example: delta-mem train -m Qwen/Qwen3-4B-Instruct-2507 -d train.jsonl -o my-adapter --write-tokens 2048
    """
    settings = {**context.params, **{section: context.meta.get(section, {}) for section in SECTIONS}}
    with _user_errors(), new_folder(output):
        _check_installed()
        from ..checkpoint import load_adapter
        from ..training.data import check_file

        for file in [*data, *(eval_data or [])]:
            check_file(file)  # a wrong path shows here, before the minutes that a large backbone takes
        adapter = _adapter_config(context, settings)
        arguments = make_arguments(settings)
        loud = arguments.process_index == 0
        checkpoint = _check_output(output, resume, loud)
        if checkpoint is not None:
            _check_same_adapter(checkpoint, adapter)
            _compare_with_recipe(output, settings, loud)
        loaded, tokenizer = _load(settings, adapter, arguments)
        if checkpoint is not None:
            loaded.load_weights(load_adapter(checkpoint))  # shows that it fits before there is a recipe
        options = _episode_options(settings, adapter.write, arguments)
        skipped = _Skipped(loud)
        episodes = _episodes(data, tokenizer, {**options, "streaming": streaming}, skipped)
        # Held-out episodes are read again and again.
        held_out = _episodes(eval_data, tokenizer, options, _Skipped(loud)) if eval_data else None
        if streaming:
            episodes = episodes.endless(seed)
        from .train_callbacks import LogTheLast, ProgressBar, StopOnSignal

        bar, stop = ProgressBar(), StopOnSignal(loud)
        callbacks = [stop, LogTheLast(), *([bar] if loud else [])]
        trainer = _trainer(loaded, arguments, episodes, held_out, tokenizer, callbacks)
        if loud:
            write_recipe(output / RECIPE_FILE, settings)

    if loud:
        count = "" if streaming else f"{plural(len(episodes), 'episode')}, "
        err.print(f"{count}{plural(loaded.get_nb_trainable_parameters()[0], 'parameter')} to train.")
    try:
        with _training_errors(), bar, stop:
            trainer.train(resume_from_checkpoint=checkpoint)
            _check_trained(trainer)
            if not stop.stopped:
                if held_out is not None and not _evaluated(trainer.state):
                    trainer.evaluate()
                trainer.save_model(str(output))
    except KeyboardInterrupt:
        if loud:
            _say_what_is_left(output)
        raise typer.Exit(INTERRUPTED) from None
    if streaming:
        skipped.tell_count()
    if stop.stopped:
        if loud:
            _say_how_to_go_on(output, trainer.state.global_step)
        raise typer.Exit(INTERRUPTED)
    if loud:
        out.print(f"Saved the adapter in {output}.", markup=False, soft_wrap=True)
        talk = shlex.join(["delta-mem", "chat", "--model", model, "--adapter", str(output)])
        err.print(f"Chat with it: {talk}", markup=False, soft_wrap=True)


def _check_installed() -> None:
    for package in ("accelerate", "datasets"):
        if find_spec(package) is None:
            raise ValueError(f'training needs {package}: pip install -e ".[train]"')


def _check_output(output: Path, resume: bool, loud: bool) -> str | None:
    """The checkpoint to go on from. Without `resume` the folder must be free for a new run."""
    from ..training import last_checkpoint

    passed_over: list[str] = []
    checkpoint = last_checkpoint(output, passed_over.append)
    if resume:
        for report in passed_over if loud else ():
            _warn(f"{report}; passed over")
        if checkpoint is None:
            raise ValueError(f"{output} holds no checkpoint to go on from; leave --resume out.")
        return checkpoint
    if output.is_dir() and any(entry.name != RECIPE_FILE for entry in output.iterdir()):
        raise ValueError(
            f"{output} is not empty; name another folder"
            + (", or --resume to go on with the run in it." if checkpoint else ".")
        )
    return None


def _adapter_config(context: typer.Context, settings: Mapping[str, Any]) -> DeltaMemConfig:
    """Of a new adapter, or of that of --init-from, which what is given must agree with."""
    from ..checkpoint import load_adapter

    if settings["init_from"] is None:
        return make_adapter_config(settings)
    config = load_adapter(_init_from(settings)).config
    own = make_adapter_config({**settings, "adapter": {}})
    given = {
        name: getattr(own, name) for option, name in ADAPTER_FIELDS.items() if _is_given(context, option)
    }
    wanted = dataclasses.replace(config, **given, **settings["adapter"])
    others = ", ".join(
        f"{f.name} is {getattr(config, f.name)!r}, not {getattr(wanted, f.name)!r}"
        for f in dataclasses.fields(config)
        if getattr(config, f.name) != getattr(wanted, f.name)
    )
    if others:
        raise ValueError(f"--init-from brings the adapter's own settings: {others}.")
    return config


def _is_given(context: typer.Context, option: str) -> bool:
    return context.get_parameter_source(option).name != "DEFAULT"


def _init_from(settings: Mapping[str, Any]) -> str:
    return find_adapter(settings["init_from"], find_model(settings["model"], Dtype.auto)[1])


# What may well differ from one part of a run to the next.
_MAY_CHANGE = {"output", "steps", "epochs", "save_every", "report_to", *ADAPTER_FIELDS, *SECTIONS}

# What a checkpoint's optimizer brings with it, whatever is asked for.
_OPTIMIZER = ("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
_KEPT = ("--lr", *(f"trainer.{name}" for name in _OPTIMIZER))


def _compare_with_recipe(output: Path, settings: Mapping[str, Any], loud: bool) -> None:
    """A run may go on with other settings, but hardly without knowing.

    Raises:
        ValueError: another setting of the optimizer, which would be without effect.
    """
    import yaml

    recipe = None
    with contextlib.suppress(OSError, yaml.YAMLError):  # a run need not have a recipe
        recipe = yaml.safe_load((output / RECIPE_FILE).read_text(encoding="utf-8"))
    if not isinstance(recipe, dict):
        return
    changed = _changed({str(name).replace("_", "-"): value for name, value in recipe.items()}, settings)
    for name in _KEPT:
        if name in changed:
            now, was = changed[name]
            raise ValueError(f"{output} was begun with {name} {was}; --resume goes on with that, not {now}.")
    if loud and changed:
        others = "; ".join(f"{name} {now}, so far {was}" for name, (now, was) in changed.items())
        _warn(f"{output} goes on with other settings: {others}")


def _changed(recipe: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """{setting: (as it is now, as the recipe has it)} of those that matter."""
    now = _as_recipe(settings)
    pairs = {
        f"--{name}": (now.get(name), recipe.get(name))
        for name in {**recipe, **now}
        if name.replace("-", "_") not in _MAY_CHANGE and (name != "lr" or name in recipe)
    }
    fields, fields_before, unsaid = settings["trainer"], recipe.get("trainer"), _trainer_defaults()
    fields_before = fields_before if isinstance(fields_before, dict) else {}
    for name in {**fields_before, **fields}:
        pairs[f"trainer.{name}"] = tuple(f.get(name, unsaid.get(name)) for f in (fields, fields_before))
    return {name: (_spoken(now), _spoken(was)) for name, (now, was) in pairs.items() if now != was}


def _trainer_defaults() -> dict[str, Any]:
    from ..training import MemoryTrainingArguments

    return {f.name: f.default for f in dataclasses.fields(MemoryTrainingArguments)} | TRAINER_DEFAULTS


def _spoken(value: Any) -> str:
    if value is None:
        return "not set"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _check_same_adapter(checkpoint: str, config: DeltaMemConfig) -> None:
    from ..checkpoint import load_adapter

    before, now = (dataclasses.asdict(c) for c in (load_adapter(checkpoint).config, config))
    others = ", ".join(
        f"{name} {before[name]!r}, not {now[name]!r}" for name in now if now[name] != before[name]
    )
    if others:
        raise ValueError(f"{checkpoint} has {others}; --resume goes on with the same adapter.")


def _load(
    settings: Mapping[str, Any], adapter: DeltaMemConfig, arguments: MemoryTrainingArguments
) -> tuple[DeltaMemModel, Any]:
    """(backbone with its adapter, a new one or that of --init-from; tokenizer)."""
    from transformers import set_seed

    from .. import DeltaMemModel

    # Whoever shards the backbone takes it from the CPU, where all of it fits.
    sharded = arguments.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    device = "cpu" if sharded else str(arguments.device)
    name = settings["model"]
    if arguments.process_index == 0:
        err.print(f"Loading {name} …", style="dim", markup=False, soft_wrap=True)
    backbone, tokenizer = load_backbone(name, device, settings["dtype"])
    if settings["init_from"] is not None:
        return DeltaMemModel.from_pretrained(backbone, _init_from(settings)), tokenizer
    set_seed(arguments.seed)
    return DeltaMemModel(backbone, adapter), tokenizer


def _episode_options(
    settings: Mapping[str, Any], write: str, arguments: MemoryTrainingArguments
) -> dict[str, Any]:
    """Keywords of `load_episodes`. An adapter that is trained on writes as it did."""
    return {
        "write": write,
        "max_write_tokens": settings["write_tokens"],
        "max_read_tokens": settings["read_tokens"],
        "keep": settings["keep"].value,
        "with_context": arguments.objective().needs_context,
        "recent_messages": settings["recent_messages"],
        "strict": settings["strict"],
    }


class _Skipped:
    """Tells of the first lines that cannot be used, and counts them all, also in worker processes."""

    def __init__(self, loud: bool):
        self.loud = loud
        self.count = multiprocessing.Value("q")

    def __call__(self, report: str) -> None:
        with self.count.get_lock():
            self.count.value += 1
            number = self.count.value
        if self.loud and number <= SHOWN_PROBLEMS:
            _warn(f"{report}; skipped")

    def tell_count(self) -> None:
        count = self.count.value
        if self.loud and count:
            shown = f", of which {SHOWN_PROBLEMS} are shown" if count > SHOWN_PROBLEMS else ""
            err.print(f"Skipped {plural(count, 'line')}{shown}.", style="yellow")


def _warn(text: str) -> None:
    # A worker process has a copy of `err`, with the bar and perhaps with a lock that nobody will open.
    console = err if multiprocessing.parent_process() is None else Console(stderr=True, highlight=False)
    console.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)


def _episodes(files: list[Path], tokenizer: Any, options: dict[str, Any], skipped: _Skipped) -> Any:
    import datasets

    from ..training import load_episodes

    if not (skipped.loud and err.is_terminal):
        datasets.disable_progress_bars()
    episodes = load_episodes(files, tokenizer, **options, on_skip=skipped)
    skipped.tell_count()
    return episodes


def _trainer(
    loaded: DeltaMemModel,
    arguments: MemoryTrainingArguments,
    episodes: Any,
    held_out: Any,
    tokenizer: Any,
    callbacks: list[Any],
) -> MemoryTrainer:
    from transformers.trainer_callback import PrinterCallback

    from ..training import EpisodeCollator, MemoryTrainer

    # Padding is masked, so that any id will do.
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    try:
        trainer = MemoryTrainer(
            loaded, arguments, EpisodeCollator(pad), episodes, held_out, tokenizer, callbacks=callbacks
        )
    except RuntimeError as error:
        raise ValueError(str(error)) from None  # a package that --report-to needs is not there
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """As `user_errors`, for one process or several."""
    try:
        yield
    except (ValueError, OSError) as error:
        _fail(error)


@contextlib.contextmanager
def _training_errors() -> Iterator[None]:
    """What a user can cause while training ends the command with one line."""
    from safetensors import SafetensorError
    from torch import OutOfMemoryError

    from ..errors import AdapterFormatError
    from ..training.data import LineError

    try:
        yield
    except (LineError, AdapterFormatError, SafetensorError, FloatingPointError, OSError) as error:
        if str(error).startswith("Caught "):  # in a worker process: the rest is its traceback
            error = ValueError(str(error).strip().splitlines()[-1].partition(": ")[2])
        _fail(error)
    except OutOfMemoryError as error:
        advice = "try --gradient-checkpointing, --write-chunk, or a lower --batch-size or --write-tokens"
        _fail(ValueError(f"{str(error).splitlines()[0]} ({advice})"))
    except RuntimeError as error:
        if "inline_container" not in str(error):  # where torch.save is when it cannot write
            raise
        _fail(ValueError(f"a checkpoint cannot be written; is the disk full? ({error})"))


def _fail(error: Exception) -> NoReturn:
    if not _told_by_another_process(str(error)):
        complain(error)
    raise typer.Exit(1) from None


def _told_by_another_process(text: str) -> bool:
    """Whether this is a run of several processes, and one of them has come with the same."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    from torch.distributed import TCPStore

    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    with contextlib.suppress(RuntimeError):  # nobody there
        store = TCPStore(*address, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"{os.environ['TORCHELASTIC_RESTART_COUNT']} {text}", 1) > 1
    return False


def _check_trained(trainer: MemoryTrainer) -> None:
    """Sees that there has been a step.

    Raises:
        LineError: there was nothing to train on, as workers that share a stream leave it.
    """
    from ..training.data import LineError

    if trainer.state.global_step == 0:
        raise LineError("--data: not one line can be used.")


def _evaluated(state: Any) -> bool:
    """Whether the last step has been scored."""
    return any("eval_loss" in logs and logs["step"] == state.global_step for logs in state.log_history)


def _say_how_to_go_on(output: Path, step: int) -> None:
    saved = output / f"checkpoint-{step}"
    err.print(f"Stopped after step {step}, saved as {saved}. {_again(output)}", markup=False, soft_wrap=True)


def _say_what_is_left(output: Path) -> None:
    from ..training import last_checkpoint

    checkpoint = last_checkpoint(output, lambda report: None)
    left = "there was no checkpoint yet." if checkpoint is None else f"{checkpoint} is left. {_again(output)}"
    err.print(f"Stopped at once, without saving; {left}", markup=False, soft_wrap=True)


def _again(output: Path) -> str:
    again = shlex.join(["delta-mem", "train", "--config", str(output / RECIPE_FILE), "--resume"])
    return f"Go on with: {again}"


# ---- settings --------------------------------------------------------------------------------------


def read_recipe(path: Path, context: typer.Context) -> dict[str, Any]:
    """A recipe's settings by parameter name, checked as the options of the command in `context` would be.

    Raises:
        OSError: a file that cannot be read.
        ValueError: not YAML, an unknown key, or a value of the wrong kind; file and key are named.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({error}).") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds no settings; it takes lines such as 'rank: 8'.")
    parameters = {p.name: p for p in context.command.params if p.name not in ("config", "resume", "help")}
    recipe: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in SECTIONS:
            context.meta[name] = _read_section(name, value, path)
        elif name not in parameters:
            known = ", ".join(sorted([*(p.replace("_", "-") for p in parameters), *SECTIONS]))
            raise ValueError(f"{path}: {key}: unknown key; known: {known}.")
        elif value is not None:
            recipe[name] = _as_given(value, parameters[name], context, f"{path}: {key}")
    return recipe


def _read_section(section: str, values: Any, path: Path) -> dict[str, Any]:
    """What stands under `adapter:` or `trainer:`."""
    if section == "adapter":
        fields, options = dataclasses.fields(DeltaMemConfig), ADAPTER_FIELDS
    else:
        from ..training import MemoryTrainingArguments

        fields, options = dataclasses.fields(MemoryTrainingArguments), TRAINER_FIELDS
    if not isinstance(values, dict):
        raise ValueError(f"{path}: {section}: takes fields and their values.")
    known = {
        field.name: field.type.__name__ if isinstance(field.type, type) else str(field.type)
        for field in fields
        if field.init
    }
    own = {field: option.replace("_", "-") for option, field in options.items()}
    for name in values:
        if name in own:
            raise ValueError(f"{path}: {section}.{name}: is '{own[name]}:' outside of {section}.")
        if name not in known:
            raise ValueError(f"{path}: {section}.{name}: unknown field.")
        if section == "trainer" and name in OWN_FIELDS:
            raise ValueError(f"{path}: {section}.{name}: is set by the command.")
    values = {name: _number(value, known[name]) for name, value in values.items()}
    for name, value in values.items():
        kinds = known[name].removesuffix(" | None").split(" | ")
        if section == "trainer" and isinstance(value, str) and {"int", "float", "bool"}.issuperset(kinds):
            raise ValueError(f"{path}: {section}.{name}: {value!r} is no {' or '.join(kinds)}.")
    return values


def _as_given(value: Any, parameter: Any, context: typer.Context, where: str) -> Any:
    """`value` as the command line would have given it."""
    words = [str(item) for item in (value if isinstance(value, list) else [value])]
    value = words if parameter.multiple else ",".join(words)
    try:
        parameter.process_value(context, value)
    except typer.BadParameter as error:
        raise ValueError(f"{where}: {error.message}") from None
    return value


def _number(value: Any, kind: str) -> Any:
    """YAML takes 2e-4 for a text, since there is no dot in it."""
    if isinstance(value, str) and "float" in kind:
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def write_recipe(path: Path, settings: Mapping[str, Any]) -> None:
    """Writes settings, by parameter name, as a recipe that `read_recipe` reads."""
    import yaml

    from ..files import write_atomically

    write_atomically(path, yaml.safe_dump(_as_recipe(settings), sort_keys=False, allow_unicode=True))


def _as_recipe(settings: Mapping[str, Any]) -> dict[str, Any]:
    # Those of an adapter that is trained on are its own.
    left_out = {"config", "resume", *(ADAPTER_FIELDS if settings["init_from"] is not None else ())}
    return {
        name if name in SECTIONS else name.replace("_", "-"): _plain(value)
        for name, value in settings.items()
        if name not in left_out and value not in (None, {}, [])
    }


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def make_adapter_config(settings: Mapping[str, Any]) -> DeltaMemConfig:
    """The config of a new adapter.

    Raises:
        ValueError: a value that a field does not take.
    """
    values = {field: _plain(settings[option]) for option, field in ADAPTER_FIELDS.items()}
    values["heads"] = tuple(head.strip() for head in settings["heads"].split(","))
    if settings["layers"] is not None:
        try:
            values["layers"] = tuple(int(layer) for layer in settings["layers"].split(","))
        except ValueError:
            raise ValueError(f"--layers takes numbers such as 4,8,12, not {settings['layers']!r}.") from None
    try:
        return DeltaMemConfig(**values, **settings["adapter"])
    except TypeError as error:
        raise ValueError(str(error)) from None


def make_arguments(settings: Mapping[str, Any]) -> MemoryTrainingArguments:
    """The trainer's arguments.

    Raises:
        ValueError: a value that a field does not take, or values that contradict each other.
    """
    import torch

    from ..training import MemoryTrainingArguments

    if settings["streaming"] and settings["steps"] is None:
        raise ValueError("--streaming needs --steps: nobody knows how many episodes there are.")
    if not 0 < settings["epochs"] < math.inf:
        raise ValueError(f"--epochs must be above 0, not {settings['epochs']}.")
    given = {field: _plain(settings[option]) for option, field in TRAINER_FIELDS.items()}
    values = {**TRAINER_DEFAULTS, **{field: value for field, value in given.items() if value is not None}}
    values["report_to"] = given["report_to"] or "none"
    values["dataloader_pin_memory"] = torch.accelerator.is_available()
    if settings["eval_data"]:
        values |= {
            "eval_strategy": "steps",
            "eval_steps": settings["save_every"],
            "per_device_eval_batch_size": settings["batch_size"],
        }
    try:
        return MemoryTrainingArguments(**{**values, **settings["trainer"]}, disable_tqdm=True)
    except TypeError as error:
        raise ValueError(f"trainer: {error}") from None
