"""What δ-mem costs on this machine: `delta-mem bench`, and the tables in docs/performance.md.

Everything is measured in alternation: in every round each variant runs once, so whatever else the machine
does meets all of them, and what counts is the ratio within a round, never one absolute time. Model rows are
relative to the frozen backbone (training rows to LoRA), operator rows to the first backend.

A row is a dict: what was measured (`name`, `variant`), `seconds` (median), `low`, `high` (the fastest and the
slowest round), `ratio` (the median of the rounds' ratios), and `bytes`: the most memory that was in use above
what was in use before.
"""

from __future__ import annotations

import copy
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .config import DeltaMemConfig
from .model import DeltaMemModel

Row = dict[str, Any]

VARIANTS = {
    "delta TSW": DeltaMemConfig(),
    "delta SSW": DeltaMemConfig(write="message"),
    "delta MSW": DeltaMemConfig(num_states=4),
}
SMALL = dict(
    hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=4, head_dim=64, vocab_size=8192, max_position_embeddings=131072,
)  # fmt: skip
QWEN3_4B = dict(
    hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=131072,
    tie_word_embeddings=True,
)  # fmt: skip


# ---- measuring -----------------------------------------------------------------------------------


def alternate(
    name: str, variants: dict[str, Callable[[], None]], device: str, rounds: int, warm_up: int = 2
) -> Iterator[Row]:
    """One row per variant: each runs once a round, after `warm_up` rounds that do not count.

    The first variant is the one that the others are compared with.
    """
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    peaks = dict.fromkeys(variants, 0)
    for round in range(-warm_up, rounds):
        for variant, run in variants.items():
            with _PeakMemory(device) as memory:
                start = time.perf_counter()
                run()
                _wait(device)
                elapsed = time.perf_counter() - start
            if round >= 0:
                times[variant].append(elapsed)
                peaks[variant] = max(peaks[variant], memory.bytes or 0)
    base = next(iter(times.values()))
    for variant, seconds in times.items():
        yield {
            "name": name,
            "variant": variant,
            "seconds": statistics.median(seconds),
            "low": min(seconds),
            "high": max(seconds),
            "ratio": statistics.median(own / other for own, other in zip(seconds, base, strict=True)),
            "bytes": peaks[variant] or None,
        }


class _PeakMemory:
    """The most memory in use inside the block, above what was in use before; None where unknown."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.bytes: int | None = None

    def __enter__(self) -> _PeakMemory:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.cuda:
            self.bytes = torch.cuda.max_memory_allocated() - self.before


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def machine(device: str) -> dict[str, str]:
    """What the numbers were measured on."""
    about = {
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else platform.processor() or platform.machine(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
    }
    for package in ("torch", "transformers", "triton", "numba", "peft"):
        try:
            about[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            about[package] = "not installed"
    return about


# ---- the operator --------------------------------------------------------------------------------


def operator(device: str, rounds: int = 7) -> Iterator[Row]:
    """Each backend over 1 to 65,536 tokens of rank 8: forward, and forward with backward."""
    for tokens in (1, 128, 2048, 8192, 65536):
        # The loop takes minutes where the others take milliseconds.
        names = [name for name in available_backends(device) if name != "naive" or tokens <= 8192]
        inputs = operator_inputs(device, batch=1, tokens=tokens, states=1, rank=8)
        few = rounds if tokens <= 2048 else max(3, rounds // 2)
        for backward in (False, True):
            variants = {name: _operator_run(inputs, name, backward) for name in names}
            what = "forward + backward" if backward else "forward"
            yield from alternate(f"{what}, {tokens:,} tokens", variants, device, few, warm_up=1)


def available_backends(device: str) -> list[str]:
    """The backends that run on this device, the definition first."""
    probe = torch.zeros(1, 1, 1, 4, device=device)
    names = []
    for name in ops.BACKENDS:
        try:
            ops.delta_rule(*[probe] * 6, backend=name)
            names.append(name)
        except (ImportError, ValueError):
            pass
    return names


def operator_inputs(device: str, batch: int, tokens: int, states: int, rank: int) -> list[Tensor]:
    """q, k, v, keep, erase, write as an untrained adapter makes them."""
    torch.manual_seed(0)
    q, k, v, gate = torch.randn(4, batch, tokens, states, rank, device=device)
    write = torch.sigmoid(gate - 1.5)
    q, k = (nn.functional.normalize(x.tanh(), dim=-1) for x in (q, k))
    return [x.contiguous() for x in (q, k, v, 1 - write, write, write)]


def _operator_run(inputs: list[Tensor], backend: str, backward: bool) -> Callable[[], None]:
    leaves = [x.clone().requires_grad_(backward) for x in inputs]

    def run() -> None:
        with torch.set_grad_enabled(backward):
            reads, state = ops.delta_rule(*leaves, backend=backend)
            if backward:
                torch.autograd.grad(reads.sum() + state.sum(), leaves)

    return run


# ---- the model around it -------------------------------------------------------------------------


def backbone(device: str) -> nn.Module:
    """A Qwen3 with random weights: the shape of Qwen3-4B in bfloat16 on a GPU, a small one on a CPU."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(**(QWEN3_4B if device == "cuda" else SMALL))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def twin(model: nn.Module) -> nn.Module:
    """The same model with hooks of its own and the same weights, which are not copied."""
    return copy.deepcopy(model, {id(p): p for p in (*model.parameters(), *model.buffers())})


def with_memory(frozen: nn.Module, config: DeltaMemConfig) -> DeltaMemModel:
    return DeltaMemModel(twin(frozen), config)


def _around(frozen: nn.Module, run: Callable[[nn.Module], Callable[[], None]]) -> dict[str, Callable]:
    """What `run` makes of the frozen model, and of it with each memory."""
    own = {name: run(with_memory(frozen, config)) for name, config in VARIANTS.items()}
    return {"frozen": run(twin(frozen)), **own}


def _empty_memory(model: nn.Module, batch: int = 1) -> dict[str, Any]:
    """Keywords for a call without a past."""
    return {"memory": model.new_memory(batch)} if isinstance(model, DeltaMemModel) else {}


def _per_token(rows: Iterator[Row], tokens: int) -> Iterator[Row]:
    for row in rows:
        yield {**row, **{key: row[key] / tokens for key in ("seconds", "low", "high")}}


def prefill(frozen: nn.Module, device: str, tokens: int, rounds: int) -> Iterator[Row]:
    """Reading a prompt of `tokens` with a KV cache."""
    ids = _ids(frozen, device, 1, tokens)

    def run(model: nn.Module) -> Callable[[], None]:
        def call() -> None:
            with torch.no_grad():
                model(ids, use_cache=True, logits_to_keep=1, **_empty_memory(model))

        return call

    variants, lora = _around(frozen, run), _lora(frozen)
    if lora is not None:
        variants["LoRA r=8"] = run(lora)
    yield from alternate(f"prefill {tokens:,}", variants, device, rounds)


def decode(
    frozen: nn.Module, device: str, context: int, batch: int, compiled: bool, rounds: int, steps: int = 16
) -> Iterator[Row]:
    """One token per sequence after `context` tokens; with `compiled`, as CUDA graphs on a static cache.

    Compiled it is measured twice, with torch.compile's guards and without. They run on the processor before
    each token: the GPU waits for those of a round's first, and works on while those of the others run.
    """
    from transformers import DynamicCache, StaticCache

    ids = _ids(frozen, device, batch, context + 1)
    # One for all: where in the GPU's memory it lies makes reading it faster or slower.
    static = StaticCache(frozen.config, max_cache_len=context + steps)

    def run(model: nn.Module) -> Callable[[], None]:
        cache = static if compiled else DynamicCache(config=frozen.config)
        if compiled:
            cache.reset()
        options = {"use_cache": True, "past_key_values": cache}
        if memory := _empty_memory(model, batch):
            options |= {**memory, "keep_segment_open": True}
        with torch.no_grad():
            model(ids[:, :context], logits_to_keep=1, **options)
        step = torch.compile(model, mode="reduce-overhead", fullgraph=True) if compiled else model
        token, position = ids[:, -1:].clone(), torch.full((batch, 1), context, device=device)

        def call() -> None:
            with torch.no_grad():
                for _ in range(steps):
                    if compiled:  # always the same place in the cache, so that it never fills up
                        torch.compiler.cudagraph_mark_step_begin()
                        for layer in cache.layers:
                            layer.cumulative_length.fill_(context)
                        step(token, position_ids=position, **options)
                    else:
                        step(token, **options)
            if not compiled:
                cache.crop(-steps)

        return call

    variants = _around(frozen, run)
    ways = {"eager": variants}
    if compiled:
        free = {name: _without_guards(call) for name, call in variants.items()}
        ways = {"compiled": variants, "no guards": free}
    for how, calls in ways.items():
        name = f"decode at {context:,}, batch {batch}, {how}"
        yield from _per_token(alternate(name, calls, device, rounds, warm_up=4), steps)


def _without_guards(call: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
            call()

    return run


def generation(
    frozen: nn.Module, device: str, context: int, compiled: bool, rounds: int, tokens: int = 64
) -> Iterator[Row]:
    """`generate`, of which a token counts: between two lies all that the loop around the model does, too.

    With `compiled` on a static cache, for which transformers compiles the step on a GPU.
    """
    ids = _ids(frozen, device, 1, context)
    options = dict(do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=tokens)
    if compiled:
        options["cache_implementation"] = "static"

    def run(model: nn.Module) -> Callable[[], None]:
        return lambda: model.generate(ids, **options, **_empty_memory(model))

    name = f"generate {tokens} after {context:,}, {'static cache' if compiled else 'eager'}"
    yield from _per_token(alternate(name, _around(frozen, run), device, rounds), tokens)


def training_step(frozen: nn.Module, device: str, write: int, read: int, rounds: int) -> Iterator[Row]:
    """Forward and backward of an episode, checkpointed: `write` tokens of history, `read` of question and
    answer.

    δ-mem's is the trainer's objective, with the metrics that it logs. LoRA, which has no memory, reads both
    as one sequence. The loss is on all but the first of the last `read` tokens.
    """
    from .training import EpisodeObjective
    from .training.objectives import counted

    history, answer = _ids(frozen, device, 1, write + read).split([write, read], 1)
    labels = answer.clone()
    labels[:, 0] = -100
    episode = {
        "write_ids": history,
        "write_mask": torch.ones_like(history),
        "write_segments": torch.zeros_like(history),
        "read_ids": answer,
        "read_mask": torch.ones_like(answer),
        "labels": labels,
        "read_rows": torch.zeros_like(answer[:, 0]),
    }
    episode |= counted(episode)

    def prepare(model: nn.Module, backbone: nn.Module) -> nn.Module:
        model.train()
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    def memory_step(config: DeltaMemConfig) -> Callable[[], None]:
        own, objective = with_memory(frozen, config), EpisodeObjective()
        model = prepare(own, own.backbone)

        def call() -> None:
            objective(model, episode)[0].backward()
            model.zero_grad(set_to_none=True)

        return call

    def lora_step(model: nn.Module) -> Callable[[], None]:
        prepare(model, model.get_base_model())
        ids = torch.cat([history, answer], 1)

        def call() -> None:
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=read).logits[0, :-1].float()
            nn.functional.cross_entropy(logits, answer[0, 1:]).backward()
            model.zero_grad(set_to_none=True)

        return call

    lora = _lora(frozen)
    variants = {} if lora is None else {"LoRA r=8": lora_step(lora)}
    variants |= {name: memory_step(config) for name, config in VARIANTS.items()}
    yield from alternate(
        f"training step, write {write:,} + read {read:,}", variants, device, rounds, warm_up=1
    )


def long_write(frozen: nn.Module, device: str) -> Iterator[Row]:
    """A long text written in chunks, no KV cache kept: time per chunk at its beginning and its end."""
    chunk, rounds = 2048, 3
    model = with_memory(frozen, DeltaMemConfig())
    ids, memory = _ids(frozen, device, 1, chunk), model.new_memory()

    def call() -> None:
        model.write(memory, ids)

    for tokens in (16384, 32768, 65536):
        while int(memory.tokens_written) < tokens - rounds * chunk:
            call()
        row = next(
            alternate(f"chunk of {chunk:,} up to {tokens:,} written", {"delta TSW": call}, device, rounds, 0)
        )
        yield {**row, "bytes": memory.nbytes}


def _lora(frozen: nn.Module) -> nn.Module | None:
    """A PEFT LoRA of rank 8 on the projections that the default memory corrects; None without peft."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return None
    return get_peft_model(twin(frozen), LoraConfig(r=8, target_modules=["q_proj", "o_proj"])).eval()


def _ids(model: nn.Module, device: str, batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(100, model.config.vocab_size, (batch, tokens), generator=generator).to(device)


def model(device: str, rounds: int = 7) -> Iterator[Row]:
    """All model rows, at the sizes that suit the device."""
    frozen = backbone(device)
    gpu = device == "cuda"
    parts = [lambda: prefill(frozen, device, 8192 if gpu else 2048, rounds)]
    for batch in (1, 32) if gpu else (1,):
        parts.append(lambda batch=batch: decode(frozen, device, 512, batch, False, rounds))
        if gpu:
            parts.append(lambda batch=batch: decode(frozen, device, 512, batch, True, rounds))
    parts.append(lambda: generation(frozen, device, 16, gpu, rounds))
    parts.append(
        lambda: training_step(frozen, device, *((8192, 512) if gpu else (512, 128)), max(3, rounds // 2))
    )
    if not gpu:
        parts.append(lambda: long_write(frozen, device))
    for part in parts:
        yield from part()
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()
