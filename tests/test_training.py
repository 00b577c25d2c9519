"""Training: what a trace sees, what the objective is, and that the trainer keeps its promises."""

import json
import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, masking_utils

import delta_mem as dm
from delta_mem.backbones import MemoryCall
from delta_mem.training import (
    EpisodeCollator,
    EpisodeObjective,
    MemoryTrainer,
    MemoryTrainingArguments,
    last_checkpoint,
    objectives,
)
from delta_mem.training.trainer import EpisodeModule
from families import backbone

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_CASES = [
    "tsw_qo", "tsw_qkvo", "msw4_qo", "tsw_uncoupled", "tsw_nolambda_scalar_gate",
    "tsw_scaled_normed", "tsw_layers", "smollm3_tsw_qo",
]  # fmt: skip
KINDS = {
    "TSW": dict(write="token"),
    "SSW": dict(write="message"),
    "MSW": dict(write="token", num_states=4, heads=("q", "k", "v", "o")),
}


def new_model(kind="TSW", seed=0, **changes):
    """A tiny model in training mode whose memory makes a difference."""
    torch.manual_seed(seed)
    base = backbone("qwen3", num_hidden_layers=2)
    model = dm.DeltaMemModel(base, dm.DeltaMemConfig(rank=4, init_gain=1.0, **KINDS[kind], **changes))
    with torch.no_grad():
        for name, weight in model.named_weights().items():
            if name.endswith(("beta_proj", "lambda_proj")):
                weight.normal_(std=0.3)
    return model.train()


def episodes(count, seed=0, context=False, longest=24):
    """Encoded episodes of random tokens: histories, questions and answers of unequal numbers and lengths."""
    rng = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=rng))

    def tokens(low, high):
        return torch.randint(3, 100, (number(low, high),), generator=rng).tolist()

    made = []
    for _ in range(count):
        history, queries = tokens(3, longest), [tokens(2, 5) for _ in range(number(1, 4))]
        # Messages of five tokens, each behind a token of the chat template's.
        segments = [-1 if place % 6 == 0 else place // 6 for place in range(len(history))]
        episode = {"write_ids": history, "write_segments": segments, "query_ids": queries}
        episode["answer_ids"] = [tokens(1, 4) for _ in queries]
        if context:
            episode["context_ids"] = [history + query for query in queries]
        made.append(episode)
    return made


def batch_of(rows):
    return EpisodeCollator(0)(rows)


def gradients(model, loss):
    parameters = list(model.adapters.parameters())
    return [torch.zeros_like(p) if g is None else g
            for p, g in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True)]  # fmt: skip


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def plain(**changes):
    """The objective without the pull on the gates, unless asked for."""
    return EpisodeObjective(**{"sparsity_weight": 0.0, **changes})


# ---- MemoryTrace ---------------------------------------------------------------------------------


def traced(model, ids, **options):
    """A forward with a trace, and what it should have seen: inputs, and outputs before and after hooks."""
    seen, handles = {}, []
    for index, layer in enumerate(model.backbone.model.layers):
        attention = layer.self_attn
        handles.append(attention.register_forward_pre_hook(
            lambda m, a, k, i=index: seen.update({(i, "h"): k["hidden_states"]}), with_kwargs=True))  # fmt: skip
        for head in "qo":
            projection = getattr(attention, f"{head}_proj")
            for when, first in (("before", True), ("after", False)):
                handles.append(projection.register_forward_hook(
                    lambda m, a, out, key=(index, head, when): seen.update({key: out.detach().clone()}),
                    prepend=first))  # fmt: skip
    trace = dm.MemoryTrace()
    model(ids, trace=trace, use_cache=False, **options)
    for handle in handles:
        handle.remove()
    return trace, seen


def test_a_trace_holds_the_gates_and_the_relative_sizes_of_corrections():
    model = new_model()
    ids, mask = torch.randint(3, 100, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    memory = model.new_memory(2)
    model(torch.randint(3, 100, (2, 9)), memory=memory, use_cache=False)
    writes = torch.rand(2, 9) < 0.5
    trace, seen = traced(model, ids, attention_mask=mask, memory=memory, write=writes)
    assert trace.written.equal(writes & mask.bool())
    for index in (0, 1):
        adapter = model.adapters[str(index)]
        beta = seen[index, "h"] @ adapter.split_in_proj()["beta"].T + adapter.split_gate_bias()["beta"]
        close(trace.gates[index][trace.written], torch.sigmoid(beta)[trace.written])
        for head in "qo":
            before, after = (seen[index, head, when][mask.bool()] for when in ("before", "after"))
            assert trace.corrections[index][head] > 0.01
            close(trace.corrections[index][head], (after - before).norm() / before.norm(), 1e-4)


def test_under_segment_writes_gates_are_those_of_the_segments_means():
    model = new_model("SSW")
    ids, segments = torch.randint(3, 100, (1, 7)), torch.tensor([[-1, 0, 0, 0, -1, 1, 1]])
    trace, seen = traced(model, ids, segment_ids=segments, memory=model.new_memory())
    assert trace.written.tolist() == [[False, False, False, True, False, False, True]]
    adapter = model.adapters["1"]
    means = torch.stack([seen[1, "h"][0, 1:4].mean(0), seen[1, "h"][0, 5:].mean(0)])
    beta = means @ adapter.split_in_proj()["beta"].T + adapter.split_gate_bias()["beta"]
    close(trace.gates[1][0, [3, 6]], torch.sigmoid(beta))


@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_changes_nothing_and_checkpointing_adds_nothing_to_it(kind):
    ids = torch.randint(3, 100, (2, 9))
    results = []
    for traced, checkpointed in ((False, False), (True, False), (True, True)):
        model = new_model(kind)
        if checkpointed:
            model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        memory, trace = model.new_memory(2), dm.MemoryTrace() if traced else None
        out = model(ids, memory=memory, labels=ids, use_cache=False, trace=trace)
        kept = {} if trace is None else dict(trace.gates)
        results.append((out.logits, *memory.layers.values(), *gradients(model, out.loss)))
        assert trace is None or trace.gates == kept  # the very tensors
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            close(a, b)


def test_gates_in_a_trace_are_differentiable_also_through_checkpointing():
    results = []
    for checkpointed in (False, True):
        model, trace = new_model(), dm.MemoryTrace()
        if checkpointed:
            model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        model(torch.arange(3, 12)[None], trace=trace, use_cache=False)
        results.append(gradients(model, sum(gates.mean() for gates in trace.gates.values())))
    assert any(gradient.abs().max() > 0.01 for gradient in results[0])
    for a, b in zip(*results, strict=True):
        close(a, b)


def test_a_call_that_only_reads_leaves_no_gates_in_a_trace():
    model, trace = new_model(), dm.MemoryTrace()
    model(torch.arange(3, 12)[None], trace=trace)
    model(torch.arange(3, 7)[None], write=False, trace=trace)
    assert trace.gates == {} and trace.written.shape == (1, 4) and not trace.written.any()


def test_a_second_forward_of_checkpointing_measures_nothing(monkeypatch):
    measured, measure = [], MemoryCall.measure
    monkeypatch.setattr(MemoryCall, "measure", lambda *args: (measured.append(args[2]), measure(*args)))
    model = new_model()
    model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.arange(3, 12)[None]
    model(ids, labels=ids, use_cache=False, trace=dm.MemoryTrace()).loss.backward()
    assert measured == ["q", "o"] * 2


# ---- the objective -------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 20])
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_gradients_are_the_recorded_ones(case, chunk):
    recorded = load_file(GOLDEN / case / "gradients.safetensors")
    base = AutoModelForCausalLM.from_pretrained(GOLDEN / case / "backbone", dtype=torch.float32)
    model = dm.DeltaMemModel.from_pretrained(base, GOLDEN / case).train()
    mask = recorded["write.attention_mask"]
    # The recorded history is padded on the left, batches are on the right.
    order = (torch.arange(mask.shape[1]) + (1 - mask).sum(1, keepdim=True)) % mask.shape[1]
    batch = {
        "write_ids": recorded["write.input_ids"].gather(1, order),
        "write_mask": mask.gather(1, order),
        "write_segments": mask.gather(1, order) - 1,
        "read_ids": recorded["read.input_ids"],
        "read_mask": torch.ones_like(recorded["read.input_ids"]),
        "labels": recorded["read.labels"],
        "read_rows": torch.arange(2),
    }
    loss, metrics = plain(write_chunk=chunk)(model, batch)
    close(loss, recorded["loss"][0], 1e-4)
    close(metrics["answer_loss"], recorded["loss"][0], 1e-4)
    loss.backward()

    theirs = {"memory_q_proj": "query_proj", "memory_k_proj": "key_proj", "memory_v_proj": "value_proj",
              "delta_scale_raw": "scale_raw", "delta_o_rmsnorm_weight": "o_norm_weight"}  # fmt: skip
    theirs |= {f"delta_{head}_proj": f"delta_{head}" for head in "qkvo"}
    grads = {}
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.copy_(parameter.grad)
        grads |= model.named_weights()
    checked = 0
    for key, expected in recorded.items():
        if key.startswith("grad."):
            layer, name = key.removeprefix("grad.model.layers.").split(".self_attn.")
            actual = grads[f"layers.{layer}.{theirs.get(name, name)}"]
            torch.testing.assert_close(actual, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
            checked += 1
    assert checked >= 7


def by_hand(model, rows, chunk=None, last=None):
    """The loss, states and gates of episodes one by one, chunk by chunk, without padding or checkpointing."""
    losses, states, penalties, accuracies = [], [], [], []
    for row in rows:
        memory, gates = model.new_memory(), []
        ids, segments = torch.tensor([row["write_ids"]]), torch.tensor([row["write_segments"]])
        longest = max(len(other["write_ids"]) for other in rows)
        starts = range(0, longest, chunk or longest)  # as the batch's longest row is cut
        for index, start in enumerate(starts):
            if last is not None and index == len(starts) - last:
                memory.detach()
                gates = [{i: g.detach() for i, g in chunk.items()} for chunk in gates]
            part, own = ids[:, start : start + starts.step], segments[:, start : start + starts.step]
            if not part.numel():
                continue
            after = segments[0, start + starts.step : start + starts.step + 1].tolist()
            goes_on = bool(after) and after[0] >= 0 and after[0] == int(own[0, -1])
            write = own >= 0 if model.delta_config.write == "token" else True
            trace = dm.MemoryTrace()
            model.write(memory, part, segment_ids=own, keep_segment_open=goes_on, write=write, trace=trace)
            gates.append({i: g[trace.written] for i, g in trace.gates.items()})
        states.append(memory.fork())
        penalty = [(torch.cat([g[i] for g in gates]).mean() - 0.05).square() for i in memory.layers]
        for query, answer in zip(row["query_ids"], row["answer_ids"], strict=True):
            out = model(torch.tensor([query + answer]), memory=memory.fork(), write=False, use_cache=False)
            logits, target = out.logits[0, len(query) - 1 : -1], torch.tensor(answer)
            losses.append(F.cross_entropy(logits, target, reduction="none"))
            accuracies.append((logits.argmax(-1) == target).float())
            penalties.append(torch.stack(penalty).mean().expand(len(answer)))
    return (
        torch.cat(losses).mean(),
        dm.MemoryState.stack(states),
        torch.cat(penalties).mean(),
        torch.cat(accuracies).mean(),
    )


@pytest.mark.parametrize("chunk, last", [(None, None), (5, None), (5, 1), (5, 2), (9, None), (9, 1), (9, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_loss_of_each_episode_alone_chunk_by_chunk(kind, chunk, last):
    model, rows = new_model(kind), episodes(4, seed=1)
    objective = EpisodeObjective(sparsity_weight=0.5, write_chunk=chunk, gradient_chunks=last)
    loss, metrics = objective(model, batch_of(rows))
    expected, states, penalty, accuracy = by_hand(model, rows, chunk, last)
    memory, _ = objective.write_history(model, batch_of(rows))
    for index, state in memory.layers.items():
        close(state, states.layers[index])
    assert memory.open_segment is None or not memory.open_segment.count.any()
    close(metrics["answer_loss"], expected.detach())
    close(metrics["sparsity_loss"], penalty.detach())
    close(metrics["answer_accuracy"], accuracy)
    close(loss, expected + 0.5 * penalty)
    norms = [state.detach().flatten(1).norm(dim=1) for state in states.layers.values()]
    tokens = torch.tensor([float(sum(map(len, row["answer_ids"]))) for row in rows])
    close(metrics["state_norm"], (torch.stack(norms).mean(0) * tokens).sum() / tokens.sum())
    for a, b in zip(gradients(model, loss), gradients(model, expected + 0.5 * penalty), strict=True):
        close(a, b)


def test_gradients_reach_the_last_chunks_only():
    model, batch = new_model(), batch_of(episodes(3, longest=60))
    every = gradients(model, plain(write_chunk=8)(model, batch)[0])
    assert len(range(0, batch["write_ids"].shape[1], 8)) > 4
    for chunks, same in ((100, True), (1, False)):
        some = gradients(model, plain(write_chunk=8, gradient_chunks=chunks)(model, batch)[0])
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(every, some, strict=True)) == same


@pytest.mark.parametrize("kind", KINDS)
def test_a_history_in_one_chunk_is_a_history_without_chunks(kind):
    model, batch = new_model(kind), batch_of(episodes(3))
    whole, chunk = (plain(write_chunk=size)(model, batch)[0] for size in (None, 1000))
    assert whole.equal(chunk)
    for a, b in zip(gradients(model, whole), gradients(model, chunk), strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_history_leaves_the_memory_empty(kind):
    model, rows = new_model(kind), episodes(2)
    for row in rows:
        row |= {"write_ids": [], "write_segments": []}
    memory, _ = plain().write_history(model, batch_of(rows))
    assert all(not state.any() for state in memory.layers.values())
    loss, _ = plain()(model, batch_of(rows))
    # Every weight is in the graph: otherwise DDP would wait for it.
    assert all(g is not None for g in torch.autograd.grad(loss, list(model.adapters.parameters())))


@pytest.mark.parametrize("objective", [plain(), plain(show_history=1.0, distill_weight=0.5)])
@pytest.mark.parametrize("kind", KINDS)
def test_questions_without_padding_need_no_mask(kind, objective, monkeypatch):
    model, rows = new_model(kind), episodes(2, context=True)
    for row in rows:  # each one question, all of a length
        row["query_ids"], row["answer_ids"] = [row["query_ids"][0][:2]], [[7, 8, 9]]
        row["context_ids"] = [row["write_ids"][:3] + row["query_ids"][0]]
    batch, masks, run = batch_of(rows), [], model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: (masks.append(a[1]), run(*a, **k))[1])

    def both(batch):
        loss, metrics = objective(model, batch)
        return loss, metrics, gradients(model, loss)

    without, masks_without = both(batch), masks.copy()
    masks.clear()
    counts = {"answer_tokens": 3, "read_padded": True, "context_padded": True}
    close(without, both(batch | counts))
    assert all(mask is None for mask in masks_without) and len(masks_without) == len(masks)
    assert any(mask is not None for mask in masks)


def test_whether_rows_are_packed_is_asked_by_others_only(monkeypatch):
    model, rows = new_model(), episodes(2)
    asked, ask = [], masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda x: asked.append(x) or ask(x))
    for row in rows:
        row["query_ids"], row["answer_ids"] = [row["query_ids"][0][:2]], [[7, 8, 9]]
    objectives._answer_for_transformers.cache_clear()
    try:
        loss, _ = plain(write_chunk=8)(model, batch_of(rows))
        loss.backward()
        assert not asked
        ids, places = torch.tensor([[3, 4, 5, 6, 7]]), torch.tensor([[0, 1, 2, 0, 1]])
        alone = model.backbone(ids[:, 3:]).logits
        with objectives._not_packed(), ThreadPoolExecutor() as pool:
            other = pool.submit(model.backbone, ids, position_ids=places, use_cache=False)
            packed = other.result().logits
        assert asked
        close(packed[:, 3:], alone)
    finally:
        objectives._answer_for_transformers.cache_clear()


def test_the_pull_on_the_gates_goes_to_the_target():
    model, batch = new_model(), batch_of(episodes(3))
    optimizer = torch.optim.Adam(model.adapters.parameters(), lr=0.05)
    objective = EpisodeObjective(sparsity_weight=100.0, sparsity_target=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        loss, metrics = objective(model, batch)
        loss.backward()
        optimizer.step()
    assert abs(metrics["gate"] - 0.3) < 0.02


def zero_corrections(model):
    with torch.no_grad():
        for name, parameter in model.adapters.named_parameters():
            if "delta_" in name:
                parameter.zero_()
    return model


def test_distillation_is_zero_where_model_and_teacher_agree():
    batch = batch_of(episodes(3, context=True))
    objective = plain(distill_weight=1.0, show_history=1.0)
    assert objective(zero_corrections(new_model()), batch)[0].abs() < 1e-6
    assert objective(new_model(), batch)[0] > 1e-3


def test_distillation_compares_answers_with_and_without_the_history():
    model, rows = new_model(), episodes(3, context=True)
    loss, metrics = plain(distill_weight=0.25)(model, batch_of(rows))
    divergences = []
    for row in rows:
        memory = model.new_memory()
        write = torch.tensor([row["write_segments"]]) >= 0
        model.write(memory, torch.tensor([row["write_ids"]]), write=write)
        for query, context, answer in zip(
            row["query_ids"], row["context_ids"], row["answer_ids"], strict=True
        ):
            student = model(torch.tensor([query + answer]), memory=memory.fork(), write=False).logits
            with model.disable_adapter(), torch.no_grad():
                teacher = model(torch.tensor([context + answer])).logits
            student, teacher = (x[0, -len(answer) - 1 : -1].log_softmax(-1) for x in (student, teacher))
            divergences.append((teacher.exp() * (teacher - student)).sum(-1))
    close(metrics["distill_loss"], torch.cat(divergences).mean().detach())
    close(loss, 0.75 * metrics["answer_loss"] + 0.25 * torch.cat(divergences).mean())


def test_draws_are_those_of_the_generator_and_of_the_row_in_all_processes():
    model, rows = new_model(), episodes(6, context=True)
    objective = plain(show_history=0.5, clear_memory=0.5)

    def draw(seed, rows=rows, first_row=0):
        generator = torch.Generator().manual_seed(seed)
        return objective.by_episode(model, batch_of(rows), generator, first_row)["answer_loss"].detach()

    every = [draw(seed) for seed in range(12)]
    assert all(a.equal(draw(seed)) for seed, a in enumerate(every))
    assert len({tuple(losses.tolist()) for losses in every}) > 3
    for seed, losses in enumerate(every):
        close(draw(seed, rows[4:], 4), losses[4:])


def test_what_is_cleared_is_read_as_by_the_frozen_backbone():
    model, batch = new_model(), batch_of(episodes(3, context=True))
    cleared = plain(show_history=1.0, clear_memory=1.0)(model, batch)[0]
    close(cleared, plain(show_history=1.0)(zero_corrections(new_model()), batch)[0])
    assert (cleared - plain(show_history=1.0)(model, batch)[0]).abs() > 1e-3


def test_nothing_is_drawn_in_evaluation():
    model, rows = new_model().eval(), episodes(3, context=True)
    shown = plain(show_history=1.0, clear_memory=1.0)(model, batch_of(rows))[0]
    assert shown.equal(plain()(model, batch_of(rows))[0])


def test_a_batch_without_context_is_refused_where_it_is_needed():
    for options in (dict(show_history=0.5), dict(distill_weight=0.5)):
        with pytest.raises(ValueError, match="with_context=True"):
            plain(**options)(new_model(), batch_of(episodes(2)))
    with pytest.raises(ValueError, match="query_segments"):
        plain(write_questions=0.5)(new_model(), batch_of(episodes(2)))


@pytest.mark.parametrize("kind", KINDS)
def test_questions_are_written_as_in_a_chat(kind):
    model, rows = new_model(kind), episodes(4, seed=1)
    for row in rows:  # the first token of a query is the template's, each other token a message
        row["query_segments"] = [list(range(-1, len(query) - 1)) for query in row["query_ids"]]
    objective = plain(write_questions=1.0)
    loss, _ = objective(model, batch_of(rows))
    memory, losses = objective.write_history(model, batch_of(rows))[0], []
    for index, row in enumerate(rows):
        for query, answer in zip(row["query_ids"], row["answer_ids"], strict=True):
            segments = torch.tensor([[*range(-1, len(query) - 1), *[len(query) - 1] * len(answer)]])
            write = segments >= 0 if model.delta_config.write == "token" else True
            one = dict(memory=memory[index], write=write, segment_ids=segments, use_cache=False)
            logits = model(torch.tensor([query + answer]), **one).logits[0, len(query) - 1 : -1]
            losses.append(F.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    close(loss, torch.cat(losses).mean())
    assert (loss - plain()(model, batch_of(rows))[0]).abs() > 1e-4
    assert plain(write_questions=1.0)(model.eval(), batch_of(rows))[0].equal(
        plain()(model, batch_of(rows))[0]
    )


@pytest.mark.parametrize(
    "options",
    [dict(sparsity_weight=-1), dict(sparsity_target=2), dict(distill_weight=1.1), dict(show_history=-0.1),
     dict(write_questions=2), dict(clear_memory=0.5), dict(write_chunk=0), dict(gradient_chunks=2), dict(write_chunk=4, gradient_chunks=0)],
)  # fmt: skip
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(reversed(options))):
        EpisodeObjective(**options)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations made and that are still alive."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage):
        key = storage._cdata
        if key in self.known or not storage.nbytes():
            return
        self.known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, key, storage.nbytes())

    def forget(self, key, size):
        self.known.discard(key)
        self.now -= size


def peak_of_a_step(tokens, chunk, last=None, kind="TSW"):
    model = new_model(kind)
    row = episodes(1)[0]
    row |= {"write_ids": [7] * tokens, "write_segments": [place // 50 for place in range(tokens)]}
    batch = batch_of([row])
    with LiveBytes() as live:
        plain(write_chunk=chunk, gradient_chunks=last)(model, batch)[0].backward()
    return live.peak


@pytest.mark.parametrize("kind, last", [("TSW", None), ("SSW", None), ("TSW", 1)])
def test_a_history_takes_the_memory_of_one_chunk_and_the_states_between(kind, last):
    few, many = (peak_of_a_step(256 * chunks, 256, last, kind) for chunks in (4, 32))
    # What grows: ids, masks and their like, and a state per layer and chunk.
    assert many - few < 28 * 256 * 32
    assert peak_of_a_step(256 * 4, None, None, kind) > 2 * few


def test_a_history_of_65536_tokens_trains():
    model, row = new_model(), episodes(1)[0]
    row |= {"write_ids": [5, 9] * 32768, "write_segments": [0] * 65536}
    loss, _ = plain(write_chunk=2048)(model, batch_of([row]))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.adapters.parameters())


# ---- the trainer ---------------------------------------------------------------------------------


def trainer(folder, rows, kind="TSW", context=False, collator=None, **options):
    options = {
        "per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 3,
    } | options  # fmt: skip
    arguments = MemoryTrainingArguments(str(folder), **options)
    evaluated = episodes(5, seed=9, context=context)
    return MemoryTrainer(new_model(kind), arguments, batch_of, rows, evaluated)


@pytest.mark.parametrize("logging_steps", [1, 10], ids=["logged", "saved-before-logged"])
def test_a_run_that_becomes_nan_stops_and_keeps_its_last_whole_checkpoint(tmp_path, logging_steps):
    one = trainer(tmp_path, episodes(8), save_strategy="steps", save_steps=1, logging_steps=logging_steps)
    poisoned = next(one.memory_model.adapters.parameters())

    def poison(step):
        def after(optimizer, *_):
            if one.state.global_step == step:
                with torch.no_grad():
                    poisoned.fill_(torch.nan)

        return after

    one.create_optimizer()
    one.optimizer.register_step_post_hook(poison(1))
    with pytest.raises(FloatingPointError, match=r"in_proj|query_proj holds NaN or infinity at step 2"):
        one.train()
    names = sorted(path.parent.name for path in tmp_path.glob("checkpoint-*/delta_mem.safetensors"))
    assert names == ["checkpoint-1"]


def test_no_cudnn_attention_while_a_run_lasts(tmp_path):
    allowed = torch.backends.cuda.cudnn_sdp_enabled
    one, seen = trainer(tmp_path, episodes(4), max_steps=1), []
    one.create_optimizer()
    one.optimizer.register_step_post_hook(lambda *_: seen.append(allowed()))
    assert allowed()
    one.train()
    assert seen == [False] and allowed()


def weights(trained):
    return {name: tensor.detach().clone() for name, tensor in trained.memory_model.named_weights().items()}


def logged(trained, name="loss"):
    return [entry[name] for entry in trained.state.log_history if name in entry]


@pytest.mark.parametrize(
    "options",
    [dict(), dict(show_history=0.5, clear_memory=0.5, gradient_accumulation_steps=2, write_chunk=6, num_train_epochs=2)],
    ids=["plain", "everything"],
)  # fmt: skip
def test_going_on_from_a_checkpoint_is_never_having_stopped(tmp_path, options):
    rows = episodes(9, context=True)
    options = options | dict(max_steps=6, save_steps=3, save_strategy="steps", context=True)
    whole = trainer(tmp_path / "whole", rows, **options)
    whole.train()
    resumed = trainer(tmp_path / "resumed", rows, **options)
    torch.manual_seed(99)  # nothing but the checkpoint may matter
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    for name, tensor in weights(whole).items():
        assert tensor.equal(weights(resumed)[name]), name
    ours, theirs = (t.optimizer.state_dict()["state"] for t in (whole, resumed))
    assert ours.keys() == theirs.keys() and len(ours) > 4
    for index, state in ours.items():
        for name, tensor in state.items():
            assert tensor.equal(theirs[index][name])
    assert logged(whole)[3:] == logged(resumed)[3:]


@pytest.mark.parametrize("options", [dict(max_steps=3), dict(max_steps=-1, num_train_epochs=0.5)])
def test_going_on_from_the_end_takes_no_step(tmp_path, options):
    options = dict(save_strategy="steps", save_steps=3, **options)
    whole, again = (trainer(tmp_path, episodes(12), **options) for _ in range(2))
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == 3
    for name, tensor in weights(whole).items():
        assert tensor.equal(weights(again)[name])


def test_the_last_checkpoint_is_the_newest_whole_one(tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") is None
    for step in (5, 20, 100, 200, 300):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    told = []
    assert last_checkpoint(tmp_path, told.append) is None and len(told) == 5
    for step in (5, 20, 100):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-200" / "trainer_state.json").write_text('{"global_st')
    assert last_checkpoint(tmp_path, told.append) == str(tmp_path / "checkpoint-100")
    assert told[5:] == [f"{tmp_path / f'checkpoint-{step}'}: not a whole checkpoint" for step in (300, 200)]


def test_a_checkpoint_is_an_adapter_without_the_backbone(tmp_path):
    trained = trainer(tmp_path, episodes(6), max_steps=2, save_strategy="steps", save_steps=2)
    before = {name: tensor.clone() for name, tensor in trained.memory_model.backbone.state_dict().items()}
    start = weights(trained)
    trained.train()
    for name, tensor in trained.memory_model.backbone.state_dict().items():
        assert tensor.equal(before[name])
    assert all(not tensor.equal(start[name]) for name, tensor in weights(trained).items())
    trained.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "checkpoint-2", tmp_path / "final"):
        assert not (folder / "model.safetensors").exists()
        stored = load_file(folder / "delta_mem.safetensors")
        assert stored.keys() == start.keys()
        loaded = dm.DeltaMemModel.from_pretrained(backbone("qwen3", num_hidden_layers=2), folder)
        for name, tensor in loaded.named_weights().items():
            assert tensor.equal(weights(trained)[name])


def test_the_backbones_config_is_left_alone(tmp_path):
    trained = trainer(tmp_path, episodes(4), max_steps=1)
    before = trained.memory_model.config.to_dict()
    trained.train()
    assert trained.memory_model.config.to_dict() == before


def test_logs_are_means_over_the_answers_of_all_steps_between(tmp_path):
    rows = episodes(8)
    trained = trainer(tmp_path, rows, learning_rate=0.0, logging_steps=4, max_steps=4)
    trained.train()
    _, expected = EpisodeObjective()(new_model(), batch_of(rows))
    for name in ("answer_loss", "answer_accuracy", "gate", "sparsity_loss", "state_norm"):
        assert logged(trained, name) == [pytest.approx(float(expected[name]), abs=1e-5)]
    assert 0 < logged(trained, "correction")[0] < 10


def test_evaluation_is_the_objective_over_all_answers(tmp_path):
    trained = trainer(tmp_path, None, per_device_eval_batch_size=2)
    metrics = trained.evaluate()
    _, expected = EpisodeObjective()(new_model().eval(), batch_of(episodes(5, seed=9)))
    assert metrics["eval_loss"] == pytest.approx(float(expected["loss"]), abs=1e-5)
    for name in ("answer_loss", "answer_accuracy", "gate", "correction"):
        assert metrics[f"eval_{name}"] == pytest.approx(float(expected[name]), abs=1e-2)


def test_the_best_checkpoint_comes_back_at_the_end(tmp_path):
    trained = trainer(
        tmp_path, episodes(4), learning_rate=0.5, max_steps=3, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="answer_loss",
        greater_is_better=False,
    )  # fmt: skip
    trained.train()
    best = trained.state.best_model_checkpoint
    assert logged(trained, "eval_answer_loss").index(min(logged(trained, "eval_answer_loss"))) + 1 == int(
        best[-1]
    )
    for name, tensor in load_file(Path(best) / "delta_mem.safetensors").items():
        assert tensor.equal(weights(trained)[name])


def test_accumulated_steps_are_those_of_the_larger_batch(tmp_path):
    rows = episodes(12)
    options = dict(max_steps=3, context=False)
    large = trainer(tmp_path / "large", rows, per_device_train_batch_size=4, **options)
    small = trainer(
        tmp_path / "small", rows, gradient_accumulation_steps=4, per_device_train_batch_size=1, **options
    )
    for trained in (large, small):
        trained.train()
    assert logged(large) == pytest.approx(logged(small), abs=1e-5)
    for name, tensor in weights(large).items():
        close(tensor, weights(small)[name], 1e-4)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(episodes(16))


def test_a_stream_of_episodes_trains_as_a_list_does(tmp_path):
    listed = trainer(tmp_path / "list", episodes(16), train_sampling_strategy="sequential")
    streamed = trainer(tmp_path / "stream", Stream())
    for trained in (listed, streamed):
        trained.train()
    assert logged(streamed) == logged(listed) and len(logged(streamed)) == 4


def test_gradient_checkpointing_and_chunks_change_nothing(tmp_path):
    results = []
    for options in (dict(), dict(gradient_checkpointing=True)):
        trained = trainer(tmp_path, episodes(6), write_chunk=7, **options)
        trained.train()
        results.append((logged(trained), weights(trained)))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    for name, tensor in results[0][1].items():
        close(tensor, results[1][1][name], 1e-4)


@pytest.mark.parametrize(("history", "computed_again"), [(40, 2), (4, 3), (3, 4)])
def test_questions_keep_the_activations_that_writing_has_room_for(history, computed_again):
    model = new_model()
    model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    episode = {"write_ids": list(range(3, 3 + history)), "write_segments": [0] * history}
    batch = batch_of([episode | {"query_ids": [[5, 6, 7, 8]], "answer_ids": [[9, 10]]}])
    loss, _ = plain()(model, batch)
    forwards = []
    for layer in model.backbone.model.layers:
        assert layer.gradient_checkpointing
        layer.self_attn.register_forward_pre_hook(lambda *_: forwards.append(1))
    loss.backward()
    assert len(forwards) == computed_again  # of four: two layers, writing and reading


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
def test_the_backbones_dropout_is_off(checkpointing):
    model, batch = new_model(), batch_of(episodes(3, context=True))
    forwards = []
    for layer in model.backbone.model.layers:
        layer.self_attn.attention_dropout = 0.5
        layer.register_forward_pre_hook(lambda *_: forwards.append(1))
    module = EpisodeModule(model, plain(distill_weight=0.5)).train()
    if checkpointing:
        module.gradient_checkpointing_enable()
        module.train()
    one, two = (module(**batch)["loss"] for _ in range(2))
    assert one.equal(two)
    forwards.clear()
    one.backward()
    assert bool(forwards) == checkpointing


def test_bfloat16_trains_float32_adapters(tmp_path):
    trained, exact = (trainer(tmp_path, episodes(6), bf16=bf16, write_chunk=8) for bf16 in (True, False))
    for each in (trained, exact):
        each.train()
    assert all(tensor.dtype == torch.float32 for tensor in weights(trained).values())
    assert logged(trained) == pytest.approx(logged(exact), rel=0.02)


def test_only_matrices_decay(tmp_path):
    trained = trainer(tmp_path, episodes(2), weight_decay=0.1)
    trained.memory_model = model = new_model(trainable_scale="head", o_norm=True)
    trained.model.model = model
    trained.create_optimizer()
    decayed, spared = trained.optimizer.param_groups
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0
    names = {id(p): name.split(".")[-1] for name, p in model.adapters.named_parameters()}
    assert {names[id(p)] for p in spared["params"]} == {"gate_bias", "scale_raw", "o_norm_weight"}
    assert len(decayed["params"]) + len(spared["params"]) == len(names)  # nothing of the backbone


@pytest.mark.parametrize(
    "options, message",
    [(dict(label_smoothing_factor=0.1), "label_smoothing"), (dict(sparsity_target=3), "sparsity_target"),
     (dict(gradient_checkpointing_kwargs={"use_reentrant": True}), "use_reentrant")],
)  # fmt: skip
def test_arguments_that_would_train_something_else_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        MemoryTrainingArguments(str(tmp_path), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_training_teaches_to_answer_from_memory(tmp_path, kind):
    """One of two histories, one question: only the memory can tell which of two answers is right."""
    histories, answers = ([11] * 6, [12] * 6), ([50], [51])
    rows = [
        {"write_ids": histories[i % 2], "write_segments": [0] * 6, "query_ids": [[20, 21]], "answer_ids": [answers[i % 2]]}
        for i in range(8)
    ]  # fmt: skip
    trained = trainer(tmp_path, rows, kind, per_device_train_batch_size=8, max_steps=80, learning_rate=3e-2,
                      lr_scheduler_type="constant")  # fmt: skip
    trained.train()
    assert logged(trained)[0] > 2 and logged(trained)[-1] < 0.3
    assert logged(trained, "answer_accuracy")[-1] == 1.0


# ---- several processes ---------------------------------------------------------------------------


def torchrun(folder, processes=2, **options):
    """`main` below in several processes; what its first one saved."""
    (folder / "options.json").write_text(json.dumps(options))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run(
        [*command, __file__, str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(folder / "result.pt", weights_only=True)


def main(folder):
    """A training run, and one that goes on from its first checkpoint; saves what came of both."""
    options = json.loads((folder / "options.json").read_text())
    result = {}
    for name, resume in (("whole", None), ("resumed", str(folder / "whole" / "checkpoint-1"))):
        trained = trainer(folder / name, episodes(16, context=True), context=True, **options)
        if trained.args.fsdp:
            shard_on_cpu(trained)
        elif resume and trained.args.world_size > 1:
            continue  # transformers cannot load an optimizer to "cpu:0"
        trained.train(resume_from_checkpoint=resume)
        metrics = trained.evaluate()
        trained.save_model(str(folder / name))
        result[name] = {
            "logs": {key: logged(trained, key) for key in ("loss", "answer_accuracy", "gate", "grad_norm")},
            "metrics": {key: metrics[f"eval_{key}"] for key in ("loss", "answer_loss", "answer_accuracy")},
        }
        if trained.is_world_process_zero():
            result[name]["weights"] = load_file(folder / name / "delta_mem.safetensors")
            torch.save(result, folder / "result.pt")


def shard_on_cpu(trained):
    """What accelerate does on GPUs only: FSDP, here over gloo."""
    state = trained.accelerator.state
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**trained.args.fsdp_plugin_args)
    if trained.args.bf16:
        state.fsdp_plugin.set_mixed_precision("bf16")
    trained.is_fsdp_enabled = True


def same_run(actual, expected, tolerance=1e-4):
    for name, values in expected["logs"].items():
        assert actual["logs"][name] == pytest.approx(values, abs=tolerance), name
    assert actual["metrics"] == pytest.approx(expected["metrics"], abs=tolerance)
    for name, tensor in expected["weights"].items():
        close(actual["weights"][name], tensor, tolerance)


OPTIONS = dict(show_history=0.5, clear_memory=0.5, write_chunk=8, gradient_accumulation_steps=2,
               per_device_eval_batch_size=2, max_steps=2, max_grad_norm=0.5, adam_epsilon=1e-4,
               save_strategy="steps", save_steps=1)  # fmt: skip


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The run that several processes must repeat."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "options.json").write_text(json.dumps({**OPTIONS, "per_device_train_batch_size": 4}))
    main(folder)
    return torch.load(folder / "result.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [dict(), dict(fsdp=True, gradient_checkpointing=True)], ids=["DDP", "FSDP"]
)
def test_two_processes_are_one_with_the_doubled_batch(tmp_path, one_process, options):
    result = torchrun(tmp_path, **OPTIONS, **options)
    for name, run in result.items():
        same_run(run, one_process[name])
        for weight, tensor in run["weights"].items():
            assert tensor.equal(result["whole"]["weights"][weight])
    assert not list(tmp_path.rglob("*model*.bin"))  # the backbone's weights


if __name__ == "__main__":
    main(Path(sys.argv[1]))
