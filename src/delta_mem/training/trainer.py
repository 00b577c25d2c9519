"""`MemoryTrainer`: `transformers.Trainer` for adapters.

Its loop, logging, evaluation, mixed precision and processes are the library's. Different is only this:

* a batch is a batch of episodes, whose writing and reading are one forward of one module
  (`EpisodeModule`), so that whatever wraps modules (DDP, FSDP, autocast) wraps the whole;
* a checkpoint holds the adapter as `DeltaMemModel.save_pretrained` writes it, never the backbone;
* metrics are means over answer tokens, whichever step and process they were seen in.

With DDP every process has the whole model. With FSDP (version 2) the backbone is sharded layer by layer, and
the adapters are part of the outermost unit, which is whole from a step's start to its end: they belong to no
decoder layer, and one step writes and reads through all layers many times.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from .. import checkpoint
from ..backbones import causal_lm, find_attention_layers
from ..model import DeltaMemModel
from .data import EpisodeCollator
from .objectives import EpisodeObjective, counted

logger = logging.get_logger(__name__)


@dataclass
class MemoryTrainingArguments(TrainingArguments):
    """`TrainingArguments`, and the fields of `EpisodeObjective`: see there.

    Raises:
        ValueError: a value out of its range, or an option that does not go together with episodes.
    """

    sparsity_weight: float = field(default=0.01, metadata={"help": "Weight of the write gates' pull."})
    sparsity_target: float = field(default=0.05, metadata={"help": "Mean write gate that is aimed at."})
    distill_weight: float = field(
        default=0.0, metadata={"help": "Share of the divergence from the backbone that sees the history."}
    )
    show_history: float = field(
        default=0.0, metadata={"help": "Probability that questions are read with the history in the context."}
    )
    clear_memory: float = field(
        default=0.0, metadata={"help": "Probability that the memory is cleared where the history is shown."}
    )
    write_questions: float = field(
        default=0.0, metadata={"help": "Probability that questions are written while they are read."}
    )
    write_chunk: int | None = field(
        default=None, metadata={"help": "Tokens of the history written at a time; default all."}
    )
    gradient_chunks: int | None = field(
        default=None, metadata={"help": "Chunks, from the last, that get gradients; default all."}
    )
    # Episodes are no model's keywords, which is what the Trainer keeps columns by.
    remove_unused_columns: bool = False
    # Every weight takes part in every step, so nobody need look for those that do not.
    ddp_find_unused_parameters: bool | None = False
    # To look for NaN would make the host wait for the device at every step, and hide it.
    logging_nan_inf_filter: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.objective()
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor does not go together with episodes; leave it at 0.")
        if (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "reentrant checkpointing gives a memory wrong gradients; leave use_reentrant out."
            )
        if self.fsdp and int(self.fsdp_config.get("version", 2)) != 2:
            raise ValueError("the memory needs FSDP version 2; leave fsdp_config's version out.")
        if self.data_seed is None:
            # Or else the order of the data would hang on what drew random numbers before.
            self.data_seed = self.seed
        # Otherwise one process would cut batches up for the others, and questions off their episodes.
        self.accelerator_config.dispatch_batches = False
        self.accelerator_config.split_batches = False

    def objective(self) -> EpisodeObjective:
        """The objective that these arguments describe."""
        return EpisodeObjective(**{f.name: getattr(self, f.name) for f in fields(EpisodeObjective)})


class EpisodeModule(nn.Module):
    """A model and its objective as one module: its forward is a whole batch of episodes.

    Args:
        model: the model that is trained.
        objective: its loss.
    """

    # What the Trainer asks a model: to count items over processes and accumulation steps; which input's
    # tokens to count.
    accepts_loss_kwargs = True
    main_input_name = "write_ids"

    def __init__(self, model: DeltaMemModel, objective: EpisodeObjective):
        super().__init__()
        self.model = model
        self.objective = objective
        self.train(model.training)

    def forward(
        self,
        num_items_in_batch: Tensor | int | None = None,
        draw_seed: int = 0,
        first_row: int = 0,
        **batch: Tensor,
    ) -> dict[str, Any]:
        """One batch.

        Args:
            num_items_in_batch: answer tokens that the loss is divided by; None: the batch's own.
            draw_seed: of the objective's random draws.
            first_row, batch: as for `EpisodeObjective.by_episode`.

        Returns:
            "loss", a scalar; "sums" [B, n], what `by_episode` gives, detached; and "names", of its n columns.
        """
        generator = torch.Generator().manual_seed(draw_seed)
        sums = self.objective.by_episode(self.model, batch, generator, first_row)
        items = sums["tokens"].sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        table = torch.stack([values.detach() for values in sums.values()], 1)
        return {"loss": sums["loss"].sum() / items, "sums": table, "names": list(sums)}

    def train(self, mode: bool = True) -> EpisodeModule:
        """As for any module; but the backbone, which does not learn, stays as in use: without dropout."""
        super().train(mode)
        for module in self.model.backbone.modules():
            # In training mode only, layers compute their activations again.
            module.training = mode and getattr(module, "gradient_checkpointing", False)
        return self

    @property
    def hf_device_map(self) -> dict[str, Any]:
        """The backbone's, if it is spread over devices."""
        return causal_lm(self.model.backbone).hf_device_map

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's: a unit of its own under FSDP."""
        return self.model.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The backbone's."""
        return self.model.backbone.get_output_embeddings()

    @property
    def _no_split_modules(self) -> list[str]:
        """The classes of the backbone's layers: FSDP's units."""
        return causal_lm(self.model.backbone)._no_split_modules

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """The backbone's, never reentrant."""
        causal_lm(self.model.backbone).gradient_checkpointing_enable(
            {**(gradient_checkpointing_kwargs or {}), "use_reentrant": False}, **options
        )


class _Counted:
    """A collator whose batches say what the host must know of them: asked of a device, that makes it wait."""

    def __init__(self, collator: Callable[[list[Any]], Mapping[str, Any]]):
        self.collator = collator

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        batch = self.collator(rows)
        return {**batch, **counted(batch)}


@contextlib.contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Within it torch's attention does without cuDNN, for all threads.

    On H100 and H200, in half precision, cuDNN gives NaN gradients for padded batches of some lengths (64
    tokens are one) once a row's scores are all low: torch 2.11, pytorch issue 196678.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


class MemoryTrainer(Trainer):
    """Trains the adapter of a `DeltaMemModel` on episodes.

    Beside the Trainer's own numbers it logs those of `EpisodeObjective.by_episode`, and evaluates to
    them: `eval_loss`, `eval_answer_accuracy`, …

    Args:
        model: its adapter is trained, in place. The backbone's weights stay as they are; what `args` switch
            on in it, such as gradient checkpointing, stays on. `model.eval()` before it is used.
        args: with the objective's settings.
        data_collator: makes batches for the objective; None: an `EpisodeCollator`.
        train_dataset, eval_dataset: encoded episodes, as `load_episodes` gives them.
        processing_class: the tokenizer; saved with every checkpoint.
        kwargs: any of `Trainer`'s.

    Raises:
        ValueError: neither a collator nor a tokenizer was given.
    """

    def __init__(
        self,
        model: DeltaMemModel,
        args: MemoryTrainingArguments,
        data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ):
        if data_collator is None:
            if processing_class is None:
                raise ValueError("pass the tokenizer as processing_class=, or a data_collator=.")
            data_collator = EpisodeCollator(processing_class.pad_token_id or 0)
        if args.n_gpu > 1:
            # The Trainer would cut batches up for nn.DataParallel, and questions off their episodes.
            logger.warning("Training on one of %d GPUs; for all of them start it with torchrun.", args.n_gpu)
            args._n_gpu = 1
        self.memory_model = model
        self._names: list[str] = []  # of the columns of "sums"
        self._sums: Tensor | None = None  # of this process, since the last log
        self._regathers: list[Any] = []  # handles of hooks, under FSDP
        self._drawn = (0, 0)  # batches drawn for, of which optimizer step
        super().__init__(
            EpisodeModule(model, args.objective()),
            args,
            _Counted(data_collator),
            train_dataset,
            eval_dataset,
            processing_class,
            **kwargs,
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, but see `without_cudnn_attention`."""
        with without_cudnn_attention():
            return super().train(*args, **kwargs)

    # ---- the loss --------------------------------------------------------------------------------

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if self.is_fsdp_enabled and self.args.write_chunk:
            # The processes gather each layer's weights together: all must write as many chunks.
            for name, padding in (("write_ids", 0), ("write_mask", 0), ("write_segments", -1)):
                inputs[name] = self.accelerator.pad_across_processes(inputs[name], 1, padding)
        return inputs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        first_row = self.args.process_index * self.args.per_device_train_batch_size
        inputs = {**inputs, "draw_seed": self._draw_seed(), "first_row": first_row}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        sums = outputs["sums"].sum(0)
        self._names, self._sums = outputs["names"], sums if self._sums is None else self._sums + sums
        return (loss, outputs) if return_outputs else loss

    def _draw_seed(self) -> int:
        """Of the seed, the step, and the batch within the step: a resumed run draws what it would have."""
        step = self.state.global_step
        batch = self._drawn[0] if self._drawn[1] == step else 0
        self._drawn = (batch + 1, step)
        return random.Random(f"{self.args.seed} {step} {batch}").getrandbits(63)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`, with the means of the objective's metrics since the last time.

        Raises:
            FloatingPointError: the loss is not finite, and the weights are not: training is of no use.
        """
        if "loss" in logs and self._sums is not None:
            means = _means(self._names, self.accelerator.reduce(self._sums, "sum"))
            logs |= {name: mean for name, mean in means.items() if name != "loss"}
            self._sums = None
        super().log(logs, start_time)
        if not math.isfinite(logs.get("loss", 0)):
            self._check_weights()

    def _check_weights(self) -> None:
        if (name := checkpoint.not_finite(self.memory_model.named_weights())) is not None:
            raise FloatingPointError(
                f"{name} holds NaN or infinity at step {self.state.global_step}; go on from the last "
                "checkpoint, with a lower learning rate or in float32."
            )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # The Trainer asks only after a step whether it is done: a finished run would go on by one.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    # ---- evaluation ------------------------------------------------------------------------------

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss; and, as predictions, what `by_episode` gives, [B, n]."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        self._names = outputs["names"]
        return outputs["loss"], outputs["sums"], None

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        means = _means(self._names, output.predictions.sum(0))
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in means.items()})
        return output

    # ---- what is trained -------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices: biases, scales and norms are not pulled towards zero."""
        return [name for name, parameter in model.named_parameters() if parameter.dim() > 1]

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        from accelerate.utils import AutocastKwargs

        args = super()._build_accelerator_args(**kwargs)
        # Older versions of torch use a cast made without gradients, in an early chunk, again with gradients.
        args["kwargs_handlers"].append(AutocastKwargs(cache_enabled=False))
        return args

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True):
        # Under FSDP accelerate leaves mixed precision to FSDP, which would round adapters and losses with it.
        return self.accelerator.autocast() if self.is_fsdp_enabled else contextlib.nullcontext()

    def _prepare_for_training(self, *args, **kwargs):
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_fsdp_enabled and not self._regathers:
            self._regathers = _regather(self.memory_model)
        return prepared

    # ---- checkpoints -----------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with _whole(self.model):
            if self.args.should_save:
                self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        self._check_weights()
        self.memory_model.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        adapter = checkpoint.load_adapter(Path(resume_from_checkpoint).absolute())
        with _whole(self.model):
            self.memory_model.load_weights(adapter)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        # The Trainer's own would save the whole backbone with it.
        from accelerate.utils import save_fsdp_optimizer

        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    # ---- the hub ---------------------------------------------------------------------------------

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `save_pretrained` has written the adapter's card."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.should_save:
            for name in (checkpoint.WEIGHTS_FILE, checkpoint.CONFIG_FILE, "README.md"):
                shutil.copy(os.path.join(checkpoint_folder, name), self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)


def last_checkpoint(folder: str | os.PathLike, on_skip: Callable[[str], None] = logger.warning) -> str | None:
    """The newest whole checkpoint in a run's folder, to go on from; None if there is none.

    Args:
        folder: `output_dir` of a `Trainer` of any kind; need not exist.
        on_skip: told of every newer checkpoint that is not whole, as a crash while it is saved leaves it.
    """
    found = {path.name.removeprefix("checkpoint-"): path for path in Path(folder).glob("checkpoint-*")}
    for step in sorted((step for step in found if step.isdecimal()), key=int, reverse=True):
        try:
            json.loads((found[step] / TRAINER_STATE_NAME).read_text(encoding="utf-8"))  # is written last
            return str(found[step])
        except (OSError, ValueError):
            on_skip(f"{found[step]}: not a whole checkpoint")
    return None


def _means(names: list[str], sums: Any) -> dict[str, float]:
    """Means over answer tokens, of sums [n] named by `names`; "tokens" is one of them."""
    by_name = dict(zip(names, sums.tolist(), strict=True))
    tokens = by_name.pop("tokens")
    return {name: value / max(tokens, 1) for name, value in by_name.items()}


def _regather(model: DeltaMemModel) -> list[Any]:
    """Hooks that bring a layer's weights together again when a gradient comes back through a memory.

    FSDP does so when one comes back through a layer's output. But a state leaves its layer on the side,
    and of a history's last layer nothing but the state is used.
    """

    def before(unit: FSDPModule, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: unit.unshard())

    attentions = [layer.module for layer in find_attention_layers(model.backbone).values()]
    return [
        attention.register_forward_pre_hook(partial(before, unit), with_kwargs=True)
        for unit in model.backbone.modules()
        if isinstance(unit, FSDPModule)
        for attention in unit.modules()
        if attention in attentions
    ]


@contextlib.contextmanager
def _whole(module: EpisodeModule) -> Iterator[None]:
    """Within it, adapters that FSDP has sharded are whole; what they then are is sharded again after.

    All processes must enter it together.
    """
    if isinstance(module, FSDPModule):
        module.reshard()  # what the last forward gathered is a copy of the weights
    sharded = [
        (adapter, name, parameter)
        for adapter in module.model.adapters.values()
        for name, parameter in adapter.named_parameters()
        if isinstance(parameter, DTensor)
    ]
    for adapter, name, parameter in sharded:
        adapter._parameters[name] = nn.Parameter(parameter.detach().full_tensor())
    try:
        yield
    finally:
        for adapter, name, parameter in sharded:
            whole = adapter._parameters[name].detach()
            with torch.no_grad():
                parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements))
            adapter._parameters[name] = parameter
