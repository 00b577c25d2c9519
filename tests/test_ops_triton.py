"""The GPU kernels compute what the definition says.

On a CUDA machine they run on the GPU, over larger inputs. Elsewhere, where triton is installed, Triton's
interpreter runs them on the CPU; that must be known before triton is imported, hence a process of its own.
"""

import dataclasses
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import StaticCache

import delta_mem as dm
from delta_mem import ops
from delta_mem.ops import Rule, capture, delta_rule, steps
from delta_mem.ops import triton as backend
from families import backbone
from test_ops import RULES, assert_close, exact, example, gradients, stream

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

pytestmark = pytest.mark.gpu if GPU else []
needs_kernels = pytest.mark.skipif(
    backend.kernels is None or not (GPU or backend.INTERPRETED),
    reason="the kernels need triton, and a CUDA device or the interpreter's own process",
)


def interpreter_problem():
    """Why this version of Triton's interpreter cannot run the kernels, or None."""
    import triton
    import triton.language as tl

    @triton.jit
    def count(x, n):
        for i in range(0, n + 0):
            tl.store(x + i, i)

    try:
        count[1,](torch.zeros(2, dtype=torch.int32), 2)
    except Exception as error:  # older versions and NumPy ≥ 2.4
        return str(error)


if backend.INTERPRETED and backend.kernels is not None and not GPU and interpreter_problem():
    pytest.skip(f"Triton's interpreter fails: {interpreter_problem()}", allow_module_level=True)


@pytest.mark.slow
@pytest.mark.skipif(backend.kernels is None, reason="needs triton")
@pytest.mark.skipif(GPU or backend.INTERPRETED, reason="the other tests run right here")
def test_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.skip(done.stdout.strip().splitlines()[-2])
    assert done.returncode == 0, done.stdout


def on_device(inputs):
    return {name: x.to(DEVICE) for name, x in inputs.items()}


@pytest.fixture
def chunks_of(monkeypatch):
    """Sets the tokens in a chunk, so that short inputs have several."""
    return lambda length: monkeypatch.setattr(backend, "_chunk_of", lambda *_: length)


# tokens, states, rank, batch, tokens in a chunk or None
SHAPES = [
    (1, 1, 8, 1, None),
    (2, 3, 5, 2, None),
    (17, 1, 8, 1, 8),
    (33, 3, 8, 1, 8),
    (65, 1, 4, 1, 16),
    (18, 3, 5, 2, 8),
    (17, 1, 16, 1, 8),
    (6, 1, 64, 1, None),
]
if GPU:
    SHAPES += [
        (n, states, rank, 3, 16 if rank <= 16 else None)
        for n in (1, 2, 17, 64, 65, 130)
        for states in (1, 3)
        for rank in (1, 4, 5, 8, 16, 32, 64)
    ]
    SHAPES += [(1000, 1, 8, 1, None), (1000, 1, 8, 40, None), (1000, 4, 16, 2, None), (300, 8, 64, 2, None)]
IDS = [f"tokens{n}-states{h}-rank{r}-batch{b}-chunk{c}" for n, h, r, b, c in SHAPES]


@needs_kernels
@pytest.mark.parametrize("n, states, rank, batch, chunk", SHAPES, ids=IDS)
def test_equals_naive(n, states, rank, batch, chunk, chunks_of):
    if chunk:
        chunks_of(chunk)
    inputs = on_device(example(n, states, rank, batch))
    assert_close(delta_rule(**inputs, backend="triton"), exact(inputs))
    assert_close(gradients(inputs, "triton"), gradients(inputs, "naive", double=True))


@needs_kernels
def test_gates_of_exactly_0_and_1(chunks_of):
    chunks_of(8)
    inputs = on_device(example(40, batch=1, rank=4))
    for seed, gate in enumerate(("keep", "erase", "write")):
        choice = torch.rand(inputs[gate].shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        inputs[gate] = inputs[gate].where(choice > 0.6, (choice > 0.3).float())
    inputs["keep"][:, 10:20] = 0
    inputs["keep"][:, 24:34] = 1
    assert_close(delta_rule(**inputs, backend="triton"), exact(inputs))
    assert_close(gradients(inputs, "triton"), gradients(inputs, "naive", double=True))


@needs_kernels
def test_equal_inputs_give_equal_bits(chunks_of):
    chunks_of(8)
    inputs = on_device(example(400 if GPU else 20, batch=1, states=2, rank=4))
    one, other = gradients(inputs, "triton"), gradients(inputs, "triton")
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@needs_kernels
def test_float64_gradcheck_and_strides(chunks_of):
    chunks_of(8)
    inputs = on_device(example(17, batch=1, rank=4, dtype=torch.float64))
    inputs["v"] = inputs["v"].mT.contiguous().mT
    inputs["keep"] = inputs["keep"][..., :1]
    values = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: delta_rule(*x, backend="triton"), values, fast_mode=True)


@needs_kernels
def test_masks_packed_sequences_and_half_precision(chunks_of):
    chunks_of(8)
    inputs = on_device(example(30, batch=1, rank=4) | {"state": example(1, batch=3, rank=4)["state"]})
    inputs = {name: x.bfloat16() for name, x in inputs.items()}
    options = {
        "mask": (torch.arange(30, device=DEVICE) % 5 != 2)[None],
        "cu_seqlens": torch.tensor([0, 3, 20, 30], device=DEVICE),
    }
    assert_close(delta_rule(**inputs, **options, backend="triton"), exact(inputs, **options))


@needs_kernels
@pytest.mark.parametrize("per_row", (True, False), ids=("gate per row", "gate per state"))
@pytest.mark.parametrize("tied", (True, False), ids=("tied", "untied"))
@pytest.mark.parametrize("update", RULES)
def test_advance_and_step(update, tied, per_row, chunks_of):
    chunks_of(8)
    batch, n, size = (3, 200, 300) if GPU else (2, 10, 20)
    for rank, states, partly in ((8, 1, False), (5, 2, True)):
        rule = Rule(states, rank, update, tied, per_row)
        features = sum(rule.sections.values())
        random = torch.Generator().manual_seed(rank)
        z, hidden = (2 * torch.randn(batch, n, k, generator=random) for k in (features, size))
        z[0, 3] *= 1e-4
        bias = torch.randn(features - 3 * states * rank, generator=random)
        weight = torch.randn(features, size, generator=random) / size**0.5
        state = torch.randn(batch, states, rank, rank, generator=random)
        writes, mask = torch.rand(2, batch, n, generator=random) > 0.4
        if partly:
            z[~mask], hidden[~mask] = torch.nan, torch.nan
        else:
            writes = mask = None
        z, hidden, bias, weight, state, writes, mask = (
            x if x is None else x.to(DEVICE) for x in (z, hidden, bias, weight, state, writes, mask)
        )
        before = state.clone()

        def check(got, z, writes, mask, bias=bias, state=state, rule=rule):
            wide = z.double(), bias.double(), state.double(), rule, writes, mask
            assert_close(got, ops.advance(*wide, backend="naive"))

        check(backend.advance(z, bias, state, rule, writes, mask), z, writes, mask)
        for t in (0, 1, 2):
            token, at = hidden[:, t : t + 1], slice(t, t + 1)
            flags = [x if x is None else x[:, at] for x in (writes, mask)]
            z = F.linear(token.double(), weight.double())
            check_step(
                (token, weight, bias),
                (state, rule, *flags),
                ops.advance(z, bias.double(), state.double(), rule, *flags, backend="naive"),
            )
        assert torch.equal(state, before)


@pytest.fixture(params=(backend.ONE_LAUNCH, 0), ids=("one launch", "two launches"))
def launches(request, monkeypatch):
    """A layer of few queries as one launch, or as two, like one of many."""
    monkeypatch.setattr(backend, "ONE_LAUNCH", request.param)


def heads(rule, batch, sizes=(70, 33)):
    """deltas, and what the first head's projection gave."""
    random = torch.Generator().manual_seed(9)
    deltas = tuple(torch.randn(n, rule.num_states * rule.rank, generator=random).to(DEVICE) for n in sizes)
    return deltas, torch.randn(batch, 1, sizes[0], generator=random).to(DEVICE)


def step(hidden, in_proj, bias, deltas, scale, state, rule, writes=None, mask=None, output=None):
    own = steps.Steps({3: steps.Step(in_proj, bias, deltas, scale, rule)})
    return take(own, hidden, state, writes, mask, output)


def step_segments(hidden, in_proj, bias, deltas, scale, state, open_sum, rule, plan, mask=None, output=None):
    own = steps.Steps({3: steps.Step(in_proj, bias, deltas, scale, rule)})
    return take(own, hidden, state, None, mask, output, plan, open_sum)


@torch.no_grad()
def take(own, hidden, state, writes=None, mask=None, output=None, plan=None, open_sum=None):
    """The corrections and what there is after; None if the token is not taken."""
    open_sums = None if plan is None else {3: open_sum}
    token = backend.Token(hidden, own, {3: state}, writes, mask, plan, open_sums)
    corrections = token(3, hidden, output)
    return corrections and (list(corrections), *(x for x in token.after[3] if x is not None))


def check_step(before, after, expected, step=step):
    """`step` corrects by the expected reads and leaves the expected states, in place or not.

    Args:
        before, after: its arguments before the deltas, and behind the scale.
    """
    reads, *states = expected
    deltas, output = heads(after[-3], len(reads))
    corrections = [1.5 * reads.flatten(2) @ delta.double().t() for delta in deltas]
    got, *found = step(*before, deltas, 1.5, *after, None)
    assert_close((*got, *found), (*corrections, *states))
    corrected = output.clone()
    (none, *got), *found = step(*before, deltas, 1.5, *after, corrected)
    assert none is None
    assert_close((corrected, *got, *found), (output + corrections[0], *corrections[1:], *states))


def projected(rule, n, batch, partly):
    """z, gate_bias, state, and writes and mask, which are None unless `partly`; NaN under padding."""
    width, features = rule.num_states * rule.rank, sum(rule.sections.values())
    random = torch.Generator().manual_seed(rule.rank)
    z = 2 * torch.randn(batch, n, features, generator=random)
    bias = torch.randn(features - 3 * width, generator=random)
    state = torch.randn(batch, rule.num_states, rule.rank, rule.rank, generator=random)
    writes, mask = torch.rand(2, batch, n, generator=random) > 0.4
    if not partly:
        return *(x.to(DEVICE) for x in (z, bias, state)), None, None
    z[~mask] = torch.nan
    return tuple(x.to(DEVICE) for x in (z, bias, state, writes, mask))


def gradients_of_advance(z, bias, state, rule, writes, mask, name="triton"):
    """Reads, state and the gradients of z, gate_bias and state: fused, or as naive has them, in float64."""
    if name == "naive":
        z, bias, state = z.double(), bias.double(), state.double()
        if mask is not None:
            z = z.masked_fill(~mask[..., None], 0)  # which autograd would turn into NaN
    values = [x.detach().requires_grad_() for x in (z, bias, state)]
    results = ops.advance(*values, rule, writes, mask, backend=name)
    random = torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, generator=random).to(x) for x in results]
    return *results, *torch.autograd.grad(results, values, weights)


@needs_kernels
@pytest.mark.parametrize("partly", (False, True), ids=("all tokens", "masked"))
@pytest.mark.parametrize("states, rank", [(1, 8), (2, 5)], ids=("states1-rank8", "states2-rank5"))
@pytest.mark.parametrize("per_row", (True, False), ids=("gate per row", "gate per state"))
@pytest.mark.parametrize("tied", (True, False), ids=("tied", "untied"))
@pytest.mark.parametrize("update", RULES)
def test_gradients_of_advance(update, tied, per_row, states, rank, partly, chunks_of):
    chunks_of(8)
    rule = Rule(states, rank, update, tied, per_row)
    *tensors, writes, mask = projected(rule, *((200, 3) if GPU else (10, 2)), partly)
    *got, d_bias, d_state = gradients_of_advance(*tensors, rule, writes, mask)
    *expected, expected_bias, expected_state = gradients_of_advance(*tensors, rule, writes, mask, "naive")
    assert_close((*got, d_state), (*expected, expected_state))
    # It sums what tokens give, most of which may cancel: what counts is how it compares with them.
    given = expected[2][..., 3 * states * rank :].abs().sum((0, 1)).max()
    assert (d_bias - expected_bias).abs().max() <= 1e-6 * given
    if partly:
        assert not got[2][~mask].any()  # 0, not NaN


@needs_kernels
@pytest.mark.parametrize("partly", (False, True), ids=("all tokens", "masked"))
def test_reading_alone_with_gradients(partly, chunks_of):
    chunks_of(8)
    rule = Rule(2, 5)
    z, bias, state, _, mask = projected(rule, 20, 2, partly)
    wide = z.double() if mask is None else z.double().masked_fill(~mask[..., None], 0)
    weights, results = torch.randn(2, 20, 2, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE), []
    for tensors in ((z, bias, state), (wide, bias.double(), state.double())):
        values = [x.detach().requires_grad_() for x in tensors]
        reads = ops.read(*values, rule, mask)
        results.append((reads, *torch.autograd.grad(reads, values[::2], weights.to(reads))))
        assert ("_Advance" in type(reads.grad_fn).__name__) == (len(results) == 1)
    assert_close(*results)


@needs_kernels
@pytest.mark.parametrize("states, rank", [(1, 1), (8, 4), (1, 16), (2, 33)], ids=str)
def test_gradients_of_advance_at_other_ranks(states, rank):
    rule = Rule(states, rank, "decay_outside", False, True)
    *tensors, writes, mask = projected(rule, 7, 2, partly=True)
    expected = gradients_of_advance(*tensors, rule, writes, mask, "naive")
    assert_close(gradients_of_advance(*tensors, rule, writes, mask), expected)


@needs_kernels
def test_gradients_of_advance_at_short_projections():
    rule = Rule(1, 8)
    z, bias, state, *_ = projected(rule, 4, 1, partly=False)
    z[0, 1, :16] *= 1e-4
    z[0, 2, :16] *= 1e-9
    z[0, 3, :16] = 0
    got, expected = (
        gradients_of_advance(z, bias, state, rule, None, None, x)[2] for x in ("triton", "naive")
    )
    for t in range(4):
        assert_close(got[:, t], expected[:, t])


@needs_kernels
def test_gradients_of_advance_checkpointed_twice_and_where_only_some_are_wanted(chunks_of):
    chunks_of(8)
    rule = Rule(2, 4)
    *tensors, writes, mask = projected(rule, 10, 2, partly=True)
    plain = gradients_of_advance(*tensors, rule, writes, mask)
    again = gradients_of_advance(*tensors, rule, writes, mask)
    assert all(map(torch.equal, plain, again))

    values = [x.detach().requires_grad_() for x in tensors]

    def advance(*tensors):
        return ops.advance(*tensors, rule, writes, mask, backend="triton")

    results = checkpoint(advance, *values, use_reentrant=False)
    random = torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, generator=random).to(x) for x in results]
    assert all(map(torch.equal, plain[2:], torch.autograd.grad(results, values, weights)))

    for i, wanted in enumerate(tensors):
        some = [x.detach() for x in tensors]
        some[i] = wanted.detach().requires_grad_()
        assert torch.equal(torch.autograd.grad(advance(*some), some[i], weights)[0], plain[2 + i])


@needs_kernels
@pytest.mark.parametrize("states, rank, batch", [(8, 4, 2), (1, 64, 1), (3, 5, 6), (1, 1, 1)], ids=str)
def test_step_at_other_ranks(states, rank, batch, launches):
    rule = Rule(states, rank, "decay_outside", False, True)
    z, bias, state, writes, mask = projected(rule, 1, batch, partly=True)
    z = z.nan_to_num()
    # So many inputs, of which each is a projection.
    weight = torch.eye(z.shape[2], device=DEVICE)
    expected = ops.advance(z.double(), bias.double(), state.double(), rule, writes, mask, backend="naive")
    check_step((z, weight, bias), (state, rule, writes, mask), expected)


@needs_kernels
@pytest.mark.parametrize("tied, per_row", [(True, True), (False, False)], ids=("tied-rows", "untied-states"))
@pytest.mark.parametrize("update", RULES)
def test_steps_of_segments(update, tied, per_row, launches):
    for seed, (rank, states) in enumerate(((8, 1), (5, 2))):
        rule = Rule(states, rank, update, tied, per_row)
        features = sum(rule.sections.values())
        random = torch.Generator().manual_seed(seed)
        planned = [x.to(DEVICE) for x in stream(seed, tokens=1)]
        plan, present, count = ops.segments.plan(*planned), planned[2], planned[3]
        hidden = torch.randn(5, 1, 20, generator=random).to(DEVICE)
        hidden[~present] = torch.nan
        weight = torch.randn(features, 20, generator=random).to(DEVICE)
        bias = torch.randn(features - 3 * states * rank, generator=random).to(DEVICE)
        state = torch.randn(5, states, rank, rank, generator=random).to(DEVICE)
        open_sum = torch.randn(5, features - states * rank, generator=random).to(DEVICE) * (
            count[:, None] > 0
        )
        z = F.linear(hidden.double(), weight.double()).masked_fill(~present[..., None], 0)
        wide = z, bias.double(), state.double(), open_sum.double()
        check_step(
            (hidden, weight, bias),
            (state, open_sum, rule, plan, present),
            ops.advance_segments(*wide, rule, plan, present),
            step_segments,
        )


@needs_kernels
@pytest.mark.parametrize(
    "tokens, batch, queries, written",
    [(1, 5, 8, 18), (17, 4, 20, 60), (50, 3, 8, 18), (544, 2, 4, 9)],
    ids=("one", "blocks", "chunks", "many-chunks"),
)
def test_writes_are_held_back_as_the_definition_says(tokens, batch, queries, written, monkeypatch):
    monkeypatch.setattr(backend, "SEGMENT_CHUNK", 16)
    for runs in ("short", "long"):
        random = torch.Generator().manual_seed(tokens)
        ids, *others = stream(tokens, batch, tokens)
        if runs == "long":
            ids = (torch.arange(tokens) + 30 * torch.arange(batch)[:, None]) // 500
        plan = ops.segments.plan(*[x.to(DEVICE) for x in (ids, *others)])
        z = torch.randn(batch, tokens, queries + written, generator=random)
        open_sum = torch.randn(batch, written, generator=random)
        inputs = [x.to(DEVICE).requires_grad_() for x in (z, open_sum)]
        wide = [x.detach().double().requires_grad_() for x in inputs]
        held, writes, left = backend.hold(*inputs, plan)
        held_expected, writes_expected, left_expected = ops.segments.hold(*wide, plan)
        assert torch.equal(writes, writes_expected) and not writes.requires_grad
        assert_close((held, left), (held_expected, left_expected))
        d_results = [torch.randn(x.shape, generator=random).to(DEVICE) for x in (held, left)]
        found = torch.autograd.grad((held, left), inputs, d_results)
        d_wide = [x.double() for x in d_results]
        assert_close(found, torch.autograd.grad((held_expected, left_expected), wide, d_wide))
        with torch.no_grad():
            assert all(map(torch.equal, backend.hold(*inputs, plan), (held, writes, left)))


@needs_kernels
def test_a_number_that_is_not_finite_stays_in_its_segment(monkeypatch):
    monkeypatch.setattr(backend, "SEGMENT_CHUNK", 16)
    ids = torch.arange(40, device=DEVICE).unsqueeze(0) // 9
    everyone, nobody = torch.ones_like(ids, dtype=torch.bool), torch.zeros(1, dtype=torch.bool, device=DEVICE)
    count = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    plan = ops.segments.plan(ids, everyone, everyone, count, count - 1, nobody)
    z, open_sum = torch.ones(1, 40, 11, device=DEVICE), torch.zeros(1, 8, device=DEVICE)
    z[0, 13, 5], z[0, 20, 6] = float("nan"), float("inf")
    inputs = z.requires_grad_(), open_sum.requires_grad_()
    held, _, _ = backend.hold(*inputs, plan)
    spoilt = [(place, column) for _, place, column in (~held.isfinite()).nonzero().tolist()]
    assert spoilt == [(18, 5), (27, 6)]  # the ends of segments 1 and 2, behind the token that comes before
    d_held = torch.ones_like(held)
    d_held[0, 18, 5] = float("inf")
    grad = torch.autograd.grad(held, inputs, d_held)[0]
    spoilt = (~grad.isfinite()).nonzero().tolist()
    assert spoilt == [[0, place, 5] for place in range(9, 18)]


@needs_kernels
@pytest.mark.parametrize("tokens, size, width", ((1, 5, 3), (70, 130, 8), (200, 256, 20), (129, 384, 64)))
def test_an_output_is_corrected_as_the_definition_says(tokens, size, width, monkeypatch):
    random = torch.Generator().manual_seed(width)
    shapes = (1, tokens, size), (1, tokens, width), (size, width)
    # The interpreter has no products of bfloat16.
    for dtype in (torch.float16, torch.bfloat16) if GPU else (torch.float16,):
        output, reads, weight = (torch.randn(x, generator=random).to(DEVICE, dtype) for x in shapes)
        expected = ops.correct(output.double(), reads.double(), weight.double(), 0.7, in_place=False)
        before = output.clone()
        with torch.no_grad():
            assert not backend.correct(output, reads, weight, 0.7)  # too little for a kernel of its own
            assert torch.equal(output, before)
            with monkeypatch.context() as patch:
                patch.setattr(backend, "MANY_OUTPUTS", 0)
                assert ops.correct(output, reads, weight, 0.7, in_place=True) is output
        # Rounded once, from float32.
        torch.testing.assert_close(output.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("given", ("all", "none", "keep"))
@pytest.mark.parametrize("tokens", (1, 12, 31, 32, 1500))
def test_segments_are_planned_as_the_definition_says(tokens, given):
    for seed in range(12 if tokens < 1000 else 2):
        ids, writes, present, count, open_ids, keep = [x.to(DEVICE) for x in stream(seed, tokens=tokens)]
        if given != "all":
            ids, writes, present = torch.zeros_like(ids), torch.ones_like(writes), torch.ones_like(present)
            keep = torch.full_like(keep, given == "keep")
        expected = ops.segments.plan(ids, writes, present, count, open_ids, keep)
        if given == "all":
            own = ids, writes | ~present, present, count, open_ids, keep, False  # padding writes nothing
        else:
            own = None, None, None, count, open_ids, None, given == "keep"
        plan = backend.plan_segments((5, tokens), *own)
        for field in dataclasses.fields(expected):
            got, right = getattr(plan, field.name), getattr(expected, field.name)
            assert got.dtype == right.dtype and torch.equal(got, right), (seed, field.name)
    rest = writes, present, count, open_ids, keep, False
    assert backend.plan_segments((5, tokens + 1), ids, *rest) is None
    assert backend.plan_segments((5, tokens), ids.int(), *rest) is None
    assert backend.plan_segments((5, tokens), ids[:4], *rest) is None


@needs_kernels
def test_a_plan_compiles_once_for_all_batches():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def plan(count, ids):
        return ops.plan_segments((count.shape[0], 1), None, None, None, count, ids, True).counts

    for batch in (2, 3, 5):
        none = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
        assert plan(none, none - 1).tolist() == batch * [[0, 1]]
    assert counter.frame_count == 1


@needs_kernels
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("adapter in float32", "all in half"))
def test_a_step_in_half_precision(dtype, launches):
    rule, size = Rule(1, 8), 2560 if GPU else 40
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 1, size, generator=random).bfloat16().to(DEVICE)
    weight = (torch.randn(32, size, generator=random) / size**0.5).to(DEVICE)
    bias, state = torch.zeros(8, device=DEVICE), torch.randn(2, 1, 8, 8, generator=random).to(DEVICE)
    deltas, output = heads(rule, 2)
    output = output.bfloat16()
    corrected = output.clone()
    own = weight.to(dtype), bias.to(dtype), tuple(delta.to(dtype) for delta in deltas)
    (_, correction), after = step(hidden, *own, 2.0, state, rule, None, None, corrected)
    z = F.linear(hidden.double(), weight.bfloat16().double())
    reads, expected = ops.advance(z, bias.double(), state.double(), rule, backend="naive")
    corrections = [2 * reads.flatten(2) @ delta.bfloat16().double().t() for delta in deltas]
    assert correction.dtype == torch.bfloat16 and after.dtype == torch.float32
    # The interpreter rounds to bfloat16 towards zero.
    assert_close((corrected, correction), (output + corrections[0], corrections[1]), tolerance=2e-2)
    assert_close(after, expected, tolerance=1e-5 if GPU else 1e-2)


@needs_kernels
def test_addresses_need_not_be_multiples_of_16(launches):
    def shifted(x):
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    rule, state, bias = Rule(1, 8), torch.randn(1, 1, 8, 8, device=DEVICE), torch.zeros(8, device=DEVICE)
    hidden, weight = torch.randn(1, 1, 40, device=DEVICE), torch.randn(32, 40, device=DEVICE)
    deltas, output = heads(rule, 1)

    def moved_step(move, move_state):
        corrected = move(output.clone())
        moved = [move(x) for x in (hidden, weight, bias)]
        given = tuple(map(move, deltas)), 2.0, move_state(state), rule, None, None, corrected
        (_, correction), after = step(*moved, *given)
        return corrected, correction, after

    expected = moved_step(torch.clone, torch.clone)
    for _ in range(2):
        assert_close(moved_step(shifted, shifted), expected)
        assert_close(moved_step(torch.clone, shifted), expected)


@needs_kernels
def test_what_does_not_fit_is_left_to_others():
    rule, state = Rule(1, 4), torch.zeros(1, 1, 4, 4, device=DEVICE)
    z, bias = torch.zeros(1, 3, 16, device=DEVICE), torch.zeros(4, device=DEVICE)
    assert backend.advance(z, bias, state, rule, None, None) is not None
    assert backend.advance(z.double(), bias, state, rule, None, None) is None
    assert backend.advance(z, bias, state[:, :, :3], rule, None, None) is None
    assert backend.advance(z[..., :15], bias, state, rule, None, None) is None
    hidden, weight = torch.zeros(1, 2, 9, device=DEVICE), torch.zeros(16, 9, device=DEVICE)
    token = hidden[:, :1]
    deltas, output = heads(rule, 1)

    def one(
        token=token, weight=weight, bias=bias, deltas=deltas, state=state, flags=(None, None), output=None
    ):
        return step(token, weight, bias, deltas, 1.0, state, rule, *flags, output)

    # Under a transformation the shapes are the same, and what is found out then does not last.
    outer = []
    torch.vmap(lambda h: outer.append(one(h)) or h)(token[None])
    assert outer == [None]
    assert one() is not None
    assert one(hidden) is None
    assert one(weight=weight[:15]) is None
    assert one(bias=bias[:3]) is None
    assert one(state=state.double()) is None
    own = steps.Steps({3: steps.Step(weight, bias, deltas, 1.0, rule)})
    assert take(own, token, state.double()) is None
    assert take(own, token, state) is not None  # the wrong one is not held against it
    assert one(deltas=()) is None
    assert one(deltas=(deltas[0][:, 1:],)) is None
    assert one(deltas=(deltas[0], deltas[1].double())) is None
    wide = Rule(backend.MAX_WIDTH + 1, 1)
    z_, bias_, state_, *_ = projected(wide, 1, 1, partly=False)
    weight_ = torch.zeros(z_.shape[2], 9, device=DEVICE)
    assert step(token, weight_, bias_, heads(wide, 1)[0], 1.0, state_, wide) is None
    flags = torch.ones(2, 1, dtype=torch.bool, device=DEVICE)
    assert one(flags=(flags, None)) is None
    assert one(flags=(flags[:1], flags[:1].int())) is None
    # An output that cannot be corrected in place is left as it is.
    for other in (output.double(), output[..., 1:], torch.cat([output, output], -1)[..., ::2]):
        before = other.clone()
        corrections, _ = one(output=other)
        assert corrections[0] is not None
        assert torch.equal(other, before)


@needs_kernels
def test_advance_with_gradients_is_one_node_and_torch_func_has_its_own_way():
    rule = Rule(2, 4)
    z, bias, state, *_ = projected(rule, 5, 2, partly=False)
    values = [x.requires_grad_() for x in (z, bias, state)]
    reads, _ = ops.advance(*values, rule)
    inputs = [node.variable for node, _ in reads.grad_fn.next_functions if node is not None]
    assert all(x is y for x, y in zip(inputs, values, strict=True))

    def loss(*tensors):
        reads, state = ops.advance(*tensors, rule)
        return reads.square().sum() + state.square().sum()

    plain = torch.autograd.grad(loss(*values), values)
    assert_close(torch.func.grad(loss, argnums=(0, 1, 2))(z, bias, state), plain)


@needs_kernels
def test_compiles_without_graph_breaks(chunks_of):
    chunks_of(8)
    engine = "inductor" if GPU else "aot_eager"

    def compiled(function):
        return torch.compile(function, fullgraph=True, backend=engine)

    inputs = on_device(example(17, batch=1, rank=4))

    def loss(q, k, v, keep, erase, write, state):
        reads, state = delta_rule(q, k, v, keep, erase, write, state, backend="triton")
        return reads.square().sum() + state.square().sum()

    values = [x.requires_grad_() for x in inputs.values()]
    eager = torch.autograd.grad(loss(*values), values)
    assert_close(torch.autograd.grad(compiled(loss)(*values), values), eager)

    rule, state = Rule(1, 4), torch.randn(1, 1, 4, 4, device=DEVICE)
    z, bias = torch.randn(1, 9, 16, device=DEVICE), torch.zeros(4, device=DEVICE)
    hidden, weight = torch.randn(1, 1, 20, device=DEVICE), torch.randn(16, 20, device=DEVICE)
    writes = torch.arange(9, device=DEVICE)[None] % 3 > 0

    def advance(*tensors):
        return ops.advance(*tensors, rule, writes, backend="triton")

    def loss_of_advance(*tensors):
        reads, state = advance(*tensors)
        return reads.square().sum() + state.square().sum()

    values = [x.detach().requires_grad_() for x in (z, bias, state)]
    eager = torch.autograd.grad(loss_of_advance(*values), values)
    assert_close(torch.autograd.grad(compiled(loss_of_advance)(*values), values), eager)
    with torch.no_grad():
        deltas, _ = heads(rule, 1)

        def recorded(hidden, weight, bias, state):
            own = steps.Step(weight, bias, deltas, 2.0, rule)
            results, others = ops.recorded_token(hidden, own, state)
            beside = hidden.sin()
            ops.settle(results, [*others, beside])
            return *results[:3], beside

        (first, second), after = step(hidden, weight, bias, deltas, 2.0, state, rule)
        assert_close(compiled(advance)(z, bias, state), backend.advance(z, bias, state, rule, writes, None))
        strided = torch.stack([hidden, hidden], -1)[..., 0]
        for given in (hidden, strided):
            found = compiled(recorded)(given, weight, bias, state)
            assert_close(found, (first, second, after, hidden.sin()))
        if GPU:  # aot_eager makes copies
            assert capture._allowed and not capture._begun


@needs_kernels
@pytest.mark.parametrize(
    "family, write, writes",
    [
        ("qwen3", "token", True),
        ("phi3", "token", True),
        ("qwen3", "message", True),
        ("phi3", "message", True),
        ("qwen3", "message", False),
    ],
)
def test_a_model_decodes_as_it_reads_compiled_or_not(family, write, writes, monkeypatch):
    torch._dynamo.reset()
    config = dm.DeltaMemConfig(write=write, init="random", init_gain=0.5)
    model = dm.DeltaMemModel(backbone(family, num_hidden_layers=2).to(DEVICE), config)
    ids = torch.randint(3, 100, (1, 5), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    segments = torch.tensor([[0, 0, 1, 1, 1]], device=DEVICE)
    options = dict(use_cache=True, keep_segment_open=True, write=writes)
    launches, launch = [], backend._Kernel.launch

    def counted(self, *args):
        launches.append(self.kernel.__name__)
        launch(self, *args)

    monkeypatch.setattr(backend._Kernel, "launch", counted)
    with torch.no_grad():
        start = model.new_memory()
        model(ids, memory=start, keep_segment_open=True, use_cache=False)
        memory = start.fork()
        whole = model(ids, memory=memory, segment_ids=segments, **options).logits
        for step in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
            one_by_one, cache, logits = start.fork(), StaticCache(model.config, max_cache_len=8), []
            launches.clear()
            for token, segment in zip(ids.split(1, 1), segments.split(1, 1), strict=True):
                given = dict(memory=one_by_one, segment_ids=segment, past_key_values=cache, **options)
                logits.append(step(token, **given).logits)
            assert launches.count("step") == 2 * 5
            assert_close((torch.cat(logits, 1),), (whole,), tolerance=1e-4)
            assert_close(tuple(one_by_one.layers.values()), tuple(memory.layers.values()), tolerance=1e-4)


@needs_kernels
def test_fake_tensors_have_the_shapes_of_real_ones():
    inputs, rule = on_device(example(9, states=2)), Rule(2, 8)
    z, bias = torch.zeros(2, 9, 64, device=DEVICE), torch.zeros(16, device=DEVICE)
    real = delta_rule(**inputs, backend="triton"), ops.advance(z, bias, inputs["state"], rule)
    with FakeTensorMode() as mode:
        inputs = {name: mode.from_tensor(x) for name, x in inputs.items()}
        z, bias = mode.from_tensor(z), mode.from_tensor(bias)
        fake = delta_rule(**inputs, backend="triton"), ops.advance(z, bias, inputs["state"], rule)
    assert [[x.shape for x in pair] for pair in real] == [[x.shape for x in pair] for pair in fake]


@pytest.mark.skipif(not GPU, reason="no CUDA device")
def test_auto_takes_the_kernels_on_a_gpu_and_graphs_capture_them():
    inputs = on_device(example(100, states=2))
    assert all(map(torch.equal, delta_rule(**inputs), delta_rule(**inputs, backend="triton")))

    rule = Rule(1, 8)
    state, bias = torch.zeros(2, 1, 8, 8, device="cuda"), torch.zeros(8, device="cuda")
    hidden, weight = torch.randn(2, 1, 64, device="cuda"), torch.randn(32, 64, device="cuda")
    deltas, _ = heads(rule, 2)

    own = steps.Steps({3: steps.Step(weight, bias, deltas, 2.0, rule)})

    def flat(state):
        (first, second), after = take(own, hidden, state)
        return first, second, after

    flat(state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        *corrections, after = flat(state)
        state.copy_(after)
    expected = torch.zeros_like(state)
    for _ in range(3):
        hidden.normal_()
        graph.replay()
        *expected_corrections, expected = flat(expected)
        assert all(map(torch.equal, corrections, expected_corrections)) and torch.equal(state, expected)


@pytest.mark.skipif(backend.INTERPRETED, reason="the interpreter takes CPU tensors")
def test_a_cpu_tensor_is_refused_by_name():
    error, message = (ImportError, "needs triton") if backend.kernels is None else (ValueError, "on cpu")
    with pytest.raises(error, match=message):
        delta_rule(**example(3), backend="triton")


@needs_kernels
def test_a_rank_above_the_limit_is_refused():
    with pytest.raises(ValueError, match="up to rank 64, not 65"):
        delta_rule(**on_device(example(3, rank=65)), backend="triton")


class Launcher:
    """Like those of Triton's versions: what it hands on to its compiled part is noted in `seen`."""

    def __init__(self, version, scratch=0):
        self.seen, self.version, self.global_scratch_size = [], version, scratch
        self.launch = lambda *given: self.seen.append(given)

    def __call__(self, x, y, z, stream, function, *given):
        scratch = ("scratch", x, stream) if self.global_scratch_size else None
        if self.version == "3.4":
            self.launch(x, y, z, stream, function, False, True, scratch, *given)
        elif self.version == "3.7":
            metadata, arguments = given[:4], given[4:]
            self.launch(x, y, z, stream, function, False, True, *metadata, scratch, None, "types", arguments)
        elif self.version == "rocm":
            self.launch(False, x, y, z, stream, function, scratch, *given)


@pytest.mark.parametrize("version", ("3.4", "3.7", "rocm"))
@pytest.mark.parametrize("kind", ("plain", "scratch", "unknown"))
def test_a_kernel_is_started_as_by_its_launcher(version, kind):
    launcher, arguments = Launcher(version, scratch=64 * (kind == "scratch")), (7, None, (8, 9), 0.5, True)
    compiled = launcher.launch
    run = (lambda *given: launcher(*given)) if kind == "unknown" else launcher
    made = SimpleNamespace(run=run, function="function", packed_metadata="metadata")
    start = backend._starter(made, len(arguments))
    assert launcher.launch is compiled and not launcher.seen  # it may be in use, and to ask starts nothing
    for place in ((4, 2, 1, 5), (0, 0, 0, 0), (1, 1, 1, 6)):
        start(*place, arguments)
        launcher(*place, "function", "metadata", None, None, None, *arguments)
    assert launcher.seen[::2] == launcher.seen[1::2] and len(launcher.seen) == 6
