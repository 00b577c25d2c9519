"""The compiled backend: what is special to it. That it computes what the definition says, test_ops.py shows."""

import copy
import dataclasses
import itertools
import math
import multiprocessing
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from delta_mem import ops
from delta_mem.ops import Rule, advance, cpu, delta_rule, segments, steps
from test_ops import assert_close, exact, example, gradients, stream

numba = pytest.importorskip("numba")


@pytest.fixture
def two_threads(monkeypatch):
    """As on a machine with two cores, and as if every little bit were worth a thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(cpu, "WORTH_A_THREAD", 1)
    yield
    torch.set_num_threads(before)


def same(one, other):
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


# Gradients


@pytest.mark.parametrize("n", (63, 64, 65, 129), ids="tokens{}".format)
def test_gradients_across_the_marks(n):
    inputs = example(n, states=2)
    assert_close(gradients(inputs, "cpu"), gradients(inputs, "naive", double=True))


@pytest.mark.parametrize("n, rank", [(64, 3), (65, 1), (65, 8), (129, 2)])
def test_gradcheck(n, rank):
    values = [x.requires_grad_() for x in example(n, states=2, rank=rank, dtype=torch.float64).values()]
    assert torch.autograd.gradcheck(lambda *x: delta_rule(*x, backend="cpu"), values, fast_mode=True)


def test_gradients_that_have_decayed_are_zero_and_not_denormal():
    # Half of the state is forgotten at every token, and only the last one is read.
    q, k, v = (nn.functional.normalize(torch.randn(1, 1000, 1, 8), dim=-1) for _ in range(3))
    half = torch.full_like(v, 0.5)
    v.requires_grad_()
    reads, _ = delta_rule(q, k, v, half, torch.zeros_like(half), half, backend="cpu")
    (grad,) = torch.autograd.grad(reads[:, -1].sum(), v)
    size = grad.abs()
    assert size[0, -2].max() > 1e-3 and size[0, 0].max() == 0
    assert not ((size > 0) & (size < torch.finfo(torch.float32).tiny)).any()


def test_a_second_derivative_is_refused():
    inputs = {name: x.requires_grad_() for name, x in example(5).items()}
    reads, _ = delta_rule(**inputs, backend="cpu")
    (slope,) = torch.autograd.grad(reads.square().sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("reentrant", (False, True))
def test_gradient_checkpointing(reentrant):
    values = [x.requires_grad_() for x in example(100).values()]
    found = []
    for run in (lambda *x: checkpoint(delta_rule, *x, use_reentrant=reentrant), delta_rule):
        reads, state = run(*values)
        (reads.sum() + state.sum()).backward()
        found.append([x.grad for x in values])
        for x in values:
            x.grad = None
    assert same(*found)


# Strides


def strided(inputs):
    """The same numbers, laid out in every odd way."""
    odd = dict(inputs)
    odd["q"] = inputs["q"].transpose(1, 2).contiguous().transpose(1, 2)
    odd["k"] = torch.stack([inputs["k"], inputs["q"]], dim=-1)[..., 0]
    odd["v"] = torch.cat([inputs["v"], inputs["q"]], dim=-1)[..., :8]
    odd["keep"] = inputs["keep"][..., :1].expand_as(inputs["q"])
    odd["erase"] = inputs["erase"][:, :1, :, :1].expand_as(inputs["q"])
    odd["write"] = inputs["write"].permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    odd["state"] = inputs["state"].mT.contiguous().mT
    return odd


def test_strided_inputs():
    odd = strided(example(100, states=3))
    assert not any(x.is_contiguous() for x in odd.values())
    plain = {name: x.contiguous() for name, x in odd.items()}
    assert same(delta_rule(**odd, backend="cpu"), delta_rule(**plain, backend="cpu"))
    assert same(gradients(odd, "cpu"), gradients(plain, "cpu"))
    assert_close(delta_rule(**odd, backend="cpu"), exact(odd))


def test_strided_gradients_from_above():
    values = [x.requires_grad_() for x in example(70, states=2).values()]
    reads, state = delta_rule(*values, backend="cpu")
    above = torch.ones(()).expand_as(reads), torch.randn(8, 8, 2, 2).permute(3, 2, 0, 1)
    got = torch.autograd.grad((reads, state), values, above, retain_graph=True)
    plain = [x.contiguous() for x in above]
    assert same(got, torch.autograd.grad((reads, state), values, plain))


# Threads


def test_results_do_not_depend_on_the_number_of_threads(two_threads):
    inputs = example(100, states=3, batch=5)
    shared = *delta_rule(**inputs, backend="cpu"), *gradients(inputs, "cpu")
    torch.set_num_threads(1)
    assert same(shared, (*delta_rule(**inputs, backend="cpu"), *gradients(inputs, "cpu")))


def test_eight_threads_at_once(two_threads):
    """Each with a memory of its own, all with a kernel that none has compiled yet."""
    cpu._kernels()._compiled.clear()
    rule = Rule(2, 5)
    start = threading.Barrier(8)
    results = [None] * 8

    def one(i):
        inputs = example(200, states=2, rank=5, seed=i)
        z, bias, state = projections(rule, batch=2, tokens=200, seed=i)
        start.wait()
        found = []
        for _ in range(20):
            found.append((*advance(z, bias, state, rule), *gradients(inputs, "cpu")))
        results[i] = found

    threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    start = threading.Barrier(1)
    for i, found in enumerate(results.copy()):
        one(i)  # now alone
        assert all(same(x, results[i][0]) for x in found)


def test_no_new_threads_to_be_had(two_threads, monkeypatch):
    """As when the interpreter is ending: the caller does it all."""
    inputs = example(50, states=4)
    expected = delta_rule(**inputs, backend="cpu")
    ended = ThreadPoolExecutor(1)
    ended.shutdown()
    monkeypatch.setattr(cpu, "_pool", lambda: ended)
    assert same(delta_rule(**inputs, backend="cpu"), expected)


def _in_a_child(inputs, expected):
    torch.set_num_threads(2)
    sys.exit(0 if same(delta_rule(**inputs, backend="cpu"), expected) else 1)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_forked_child_has_threads_of_its_own(two_threads):
    inputs = example(50, states=4)
    expected = delta_rule(**inputs, backend="cpu")  # starts the parent's
    child = multiprocessing.get_context("fork").Process(target=_in_a_child, args=(inputs, expected))
    child.start()
    child.join(60)
    assert child.exitcode == 0


# From projections on, in one call


def projections(rule, batch=2, tokens=20, seed=0, scale=2.0):
    random = torch.Generator().manual_seed(seed)
    sections = rule.sections
    z = scale * torch.randn(batch, tokens, sum(sections.values()), generator=random)
    bias = torch.randn(sections["beta"] + sections.get("lambda", 0), generator=random)
    return z, bias, torch.randn(batch, rule.num_states, rule.rank, rule.rank, generator=random)


def in_parts(z, bias, state, rule, writes=None, mask=None):
    """Activated by torch, then the definition; in float64."""
    results = advance(z.double(), bias.double(), state.double(), rule, writes, mask, backend="naive")
    return tuple(x.float() for x in results)


def flags(batch, tokens, seed):
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)) > 0.4


RULES = [
    Rule(states, rank, update, tied, per_row)
    for (states, rank), update, tied, per_row in itertools.product(
        ((1, 8), (4, 8), (2, 3)), ("standard", "decay_outside", "no_decay"), (True, False), (True, False)
    )
] + [Rule(1, rank) for rank in (1, 2, 16, 64)]


def rule_id(rule):
    gates = ("tied" if rule.tied_gates else "untied", "rows" if rule.per_row_gates else "states")
    return f"states{rule.num_states}-rank{rule.rank}-{rule.update}-{'-'.join(gates)}"


@pytest.mark.parametrize("rule", RULES, ids=rule_id)
@pytest.mark.parametrize("given", ("neither", "writes", "mask", "both"))
def test_fused_equals_parts(rule, given):
    z, bias, state = projections(rule)
    writes = flags(2, 20, seed=1) if given in ("writes", "both") else None
    mask = flags(2, 20, seed=2) if given in ("mask", "both") else None
    fused = cpu.advance(z, bias, state, rule, writes, mask)
    torch.testing.assert_close(fused, in_parts(z, bias, state, rule, writes, mask), atol=1e-5, rtol=1e-5)
    if mask is not None:
        assert not fused[0][~mask].any()


@pytest.mark.parametrize("scale", (1e-7, 1e-4, 1e-2, 1.0, 30.0, 1e4), ids="scale{:g}".format)
def test_activations_are_as_exact_as_float32_allows(scale):
    """Over the range of the inputs; tiny queries are stretched to unit length, so relatively."""
    rule = Rule(1, 8)
    z, bias, _ = projections(rule, batch=50, tokens=1, scale=scale)
    # One token written into nothing and read back by its own key shows all: m = β v (k · k).
    z[..., :8] = z[..., 8:16]
    fused = advance(z, bias, torch.zeros(50, 1, 8, 8), rule)
    torch.testing.assert_close(fused, in_parts(z, bias, torch.zeros(50, 1, 8, 8), rule), rtol=2e-6, atol=1e-8)
    state = torch.eye(8).expand(50, 1, 8, 8)
    reads, _ = advance(z, bias, state, rule)
    torch.testing.assert_close(reads, in_parts(z, bias, state, rule)[0], rtol=2e-6, atol=1e-8)


def test_gates_that_are_infinitely_sure():
    rule = Rule(1, 8)
    z, bias, state = projections(rule)
    assert torch.equal(advance(z, bias - math.inf, state, rule)[1], state)  # keeps all, bit for bit
    _, last = advance(z, bias + math.inf, state, rule)  # keeps nothing
    torch.testing.assert_close(last, in_parts(z, bias + math.inf, state, rule)[1])


def test_nan_is_not_hidden():
    rule = Rule(1, 8)
    for feature in range(32):
        z, bias, state = projections(rule, batch=1, tokens=2)
        z[:, 0, feature] = math.nan
        fused, parts = advance(z, bias, state, rule), in_parts(z, bias, state, rule)
        assert same([x.isnan() for x in fused], [x.isnan() for x in parts])
    inputs = example(5)
    for name in inputs:
        broken = inputs | {name: inputs[name].clone()}
        broken[name][0, 0, 0, 0] = math.nan
        got, expected = delta_rule(**broken, backend="cpu"), exact(broken)
        assert same([x.isnan() for x in got], [x.isnan() for x in expected])


def test_what_lies_under_padding_does_not_matter():
    rule = Rule(2, 8)
    z, bias, state = projections(rule)
    mask = flags(2, 20, seed=3)
    expected = advance(z, bias, state, rule, mask=mask)
    assert same(advance(z.masked_fill(~mask[..., None], math.nan), bias, state, rule, mask=mask), expected)


def test_fused_strides():
    rule = Rule(2, 8)
    z, bias, state = projections(rule)
    writes, mask = flags(20, 2, seed=1), flags(20, 1, seed=2).expand(20, 2)
    expected = advance(z, bias, state, rule, writes.T.contiguous(), mask.T.contiguous())
    for odd in (
        z.mT.contiguous().mT,
        z.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([z, z], dim=-1)[..., : z.shape[-1]],
    ):
        found = advance(odd, bias.repeat_interleave(2)[::2], state.mT.contiguous().mT, rule, writes.T, mask.T)
        assert same(found, expected)


@pytest.mark.parametrize("tokens", (1, 20), ids="tokens{}".format)
def test_fused_modifies_nothing(tokens):
    rule = Rule(2, 8)
    given = (*projections(rule, tokens=tokens), rule, flags(2, tokens, 1), flags(2, tokens, 2))
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in given]
    reads, state = advance(*given)
    reads.fill_(7)
    state.fill_(7)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True) if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("update", ("standard", "decay_outside", "no_decay"))
def test_fused_stays_finite_over_100_000_tokens(update):
    rule = Rule(1, 8, update)
    reads, state = advance(*projections(rule, batch=1, tokens=100_000), rule)
    assert reads.isfinite().all() and state.isfinite().all()
    assert state.abs().max() < 1000


def test_gradients_flow_through_advance_where_they_are_wanted():
    rule = Rule(1, 8)
    z, bias, state = projections(rule)
    for leaf in (z, bias, state):
        leaf.requires_grad_()
        assert advance(z, bias, state, rule)[0].requires_grad
        with torch.no_grad():
            assert not advance(z, bias, state, rule)[0].requires_grad
        leaf.requires_grad_(False)
    assert not advance(z, bias, state, rule)[0].requires_grad


def test_fused_leaves_to_others_what_is_not_as_it_should_be():
    rule = Rule(1, 8)
    z, bias, state = projections(rule)
    assert cpu.advance(z, bias, state, rule, None, None) is not None
    ones = torch.ones(2, 20, dtype=torch.bool)
    for wrong in (
        (z.double(), bias, state, rule, None, None),
        (z[..., :-1], bias, state, rule, None, None),
        (z[:, :0], bias, state, rule, None, None),
        (z[0], bias, state, rule, None, None),
        (z, bias[:-1], state, rule, None, None),
        (z, bias, state[:1], rule, None, None),
        (z, bias, state, rule, ones[:, :-1], None),
        (z, bias, state, rule, None, ones.long()),
        (z, bias, state.to("meta"), rule, None, None),
    ):
        assert cpu.advance(*wrong) is None
    assert advance(z, bias, state, rule, mask=ones.long())[0].shape == (2, 20, 1, 8)
    with pytest.raises(ValueError, match="mask has shape"):
        advance(z, bias, state, rule, mask=ones[:, :-1])


# Segments


@pytest.mark.parametrize("given", ("all", "strided", "none", "keep"))
@pytest.mark.parametrize("tokens", (1, 2, 12), ids="tokens{}".format)
def test_segments_are_planned_as_the_definition_says(tokens, given):
    for seed in range(50):
        ids, writes, present, count, open_ids, keep = stream(seed, tokens=tokens)
        if given in ("none", "keep"):
            ids, writes, present = torch.zeros_like(ids), torch.ones_like(writes), torch.ones_like(present)
            keep = torch.full_like(keep, given == "keep")
            own = None, None, None, count, open_ids, None
        else:
            own = ids, writes | ~present, present, count, open_ids, keep  # padding writes nothing
        if given == "strided":
            own = tuple(torch.stack([x, torch.zeros_like(x)], -1)[..., 0] for x in own)
        plan = cpu.plan_segments((5, tokens), *own, given == "keep")
        expected = segments.plan(ids, writes, present, count, open_ids, keep)
        for field in dataclasses.fields(expected):
            got, right = getattr(plan, field.name), getattr(expected, field.name)
            assert got.dtype == right.dtype and torch.equal(got, right), (seed, field.name)


@pytest.mark.parametrize("rule", RULES, ids=rule_id)
@pytest.mark.parametrize("tokens", (1, 12), ids="tokens{}".format)
def test_fused_segments_equal_parts(rule, tokens, monkeypatch):
    z, bias, state = projections(rule, batch=5, tokens=tokens)
    for seed in range(5):
        given = stream(seed, tokens=tokens)
        plan, present = segments.plan(*given), given[2]
        open_sum = torch.randn(5, z.shape[2] - rule.num_states * rule.rank) * (given[3][:, None] > 0)
        arguments = (z, bias, state, open_sum, rule, plan, present)
        fused = cpu.advance_segments(*arguments)
        with monkeypatch.context() as parts:
            parts.setattr(cpu, "advance_segments", lambda *_: None)
            expected = ops.advance_segments(*arguments)
        torch.testing.assert_close(fused, expected, atol=1e-5, rtol=1e-5)


def test_fused_segments_leave_to_others_what_is_not_as_it_should_be():
    rule = Rule(1, 8)
    z, bias, state = projections(rule, batch=5, tokens=12)
    plan, open_sum = segments.plan(*stream(0)), torch.zeros(5, 24)
    assert cpu.advance_segments(z, bias, state, open_sum, rule, plan, None) is not None
    assert cpu.advance_segments(z, bias, state, open_sum[:, 1:], rule, plan, None) is None
    assert cpu.advance_segments(z[:, :-1], bias, state, open_sum, rule, plan, None) is None
    ids, *rest = stream(0)
    assert cpu.plan_segments((5, 12), ids.int(), *rest, False) is None
    assert ops.plan_segments(ids.shape, ids.int(), *rest).ends.equal(plan.ends)


# One token, from a layer's input on


def one_token(rule, batch=3, size=37, seed=0):
    """hidden, in_proj, gate_bias and state."""
    random = torch.Generator().manual_seed(seed)
    _, bias, state = projections(rule, batch)
    hidden = torch.randn(batch, 1, size, generator=random)
    return hidden, torch.randn(sum(rule.sections.values()), size, generator=random) / 3, bias, state


SCALE = 1.5


def heads(rule, batch, sizes=(11, 6)):
    """deltas, and what the first head's projection gave."""
    random = torch.Generator().manual_seed(9)
    deltas = tuple(torch.randn(n, rule.num_states * rule.rank, generator=random) for n in sizes)
    return deltas, torch.randn(batch, 1, sizes[0], generator=random)


def step(hidden, in_proj, bias, deltas, state, rule, writes=None, mask=None, output=None):
    own = steps.Steps({3: steps.Step(in_proj, bias, deltas, SCALE, rule)})
    return take(own, hidden, state, writes, mask, output)


def step_segments(hidden, in_proj, bias, deltas, state, open_sum, rule, plan, mask=None, output=None):
    own = steps.Steps({3: steps.Step(in_proj, bias, deltas, SCALE, rule)})
    return take(own, hidden, state, None, mask, output, plan, open_sum)


@torch.no_grad()
def take(own, hidden, state, writes=None, mask=None, output=None, plan=None, open_sum=None):
    """The corrections and what there is after; None if the token is not taken."""
    open_sums = None if plan is None else {3: open_sum}
    token = cpu.Token(hidden, own, {3: state}, writes, mask, plan, open_sums)
    corrections = token(3, hidden, output)
    return corrections and (list(corrections), *(x for x in token.after[3] if x is not None))


def check_step(step, deltas, output, expected):
    """`step(output)` corrects by the expected reads and leaves the expected states, in place or not."""
    reads, *after = expected
    corrections = [SCALE * reads.flatten(2) @ delta.T for delta in deltas]
    got, *states = step(None)
    torch.testing.assert_close([got, states], [corrections, after], atol=2e-5, rtol=1e-5)
    corrected = output.clone()
    (none, *got), *states = step(corrected)
    assert none is None
    torch.testing.assert_close([got, states], [corrections[1:], after], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(corrected, output + corrections[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", RULES, ids=rule_id)
@pytest.mark.parametrize("given", ("neither", "writes", "mask", "both"))
def test_step_equals_parts(rule, given):
    hidden, in_proj, bias, state = one_token(rule)
    deltas, output = heads(rule, 3)
    writes = torch.tensor([[True], [False], [True]]) if given in ("writes", "both") else None
    mask = torch.tensor([[True], [True], [False]]) if given in ("mask", "both") else None
    fixed = hidden, in_proj, bias, deltas, state, rule
    expected = in_parts(hidden @ in_proj.T, bias, state, rule, writes, mask)
    check_step(lambda output: step(*fixed, writes, mask, output), deltas, output, expected)
    nobody = torch.zeros((), dtype=torch.bool).expand(3, 1)
    assert torch.equal(step(*fixed, nobody)[1], state)


@pytest.mark.parametrize("rule", RULES, ids=rule_id)
def test_step_of_segments_equals_parts(rule):
    hidden, in_proj, bias, state = one_token(rule, batch=4)
    deltas, output = heads(rule, 4, sizes=(3, 4, 5, 6))
    z = hidden @ in_proj.T
    for seed in range(5):
        given = [part[:4] for part in stream(seed, tokens=1)]
        plan, present = segments.plan(*given), given[2]
        open_sum = torch.randn(4, z.shape[2] - rule.num_states * rule.rank) * (given[3][:, None] > 0)
        fixed = hidden, in_proj, bias, deltas, state, open_sum, rule, plan, present
        expected = cpu.advance_segments(z, bias, state, open_sum, rule, plan, present)
        check_step(lambda output, fixed=fixed: step_segments(*fixed, output), deltas, output, expected)


@torch.no_grad()
def test_layers_of_a_token_share_room_for_corrections():
    rule = Rule(1, 8)
    hidden, in_proj, bias, state = one_token(rule)
    deltas, output = heads(rule, 3)
    layers = {i: steps.Step(in_proj * (1 + i), bias, deltas, SCALE, rule) for i in (0, 1)}
    others = {i: state + i for i in (0, 1)}
    apart = [take(steps.Steps({3: layers[i]}), hidden, others[i]) for i in (0, 1)]
    token = cpu.Token(hidden, steps.Steps(layers), others)
    for i in (0, 1):
        corrections = token(i, hidden, None)
        assert all(map(torch.equal, corrections, apart[i][0])) and torch.equal(token.after[i][0], apart[i][1])
    assert token(0, hidden, output)[1] is corrections[1]
    assert token(2, hidden, None) is None  # no such layer
    assert token(0, hidden[:2], None) is None  # not the batch that it began with
    with torch.enable_grad():
        assert cpu.Token(hidden, steps.Steps(layers), others)(0, hidden, None) is None
        token.after[0][0].mul_(torch.ones((), requires_grad=True))  # which a view would refuse


def test_a_step_sees_that_its_weights_were_moved_or_replaced():
    rule = Rule(1, 8)
    hidden, in_proj, bias, state = one_token(rule)
    deltas, _ = heads(rule, 3)
    own = steps.Steps({3: steps.Step(in_proj, bias, deltas, SCALE, rule)})

    def corrections():
        results = take(own, hidden, state)
        return results and results[0][0].clone()

    before = corrections()
    in_proj.data = 2 * in_proj
    expected = step(hidden, in_proj, bias, deltas, state, rule)[0][0]
    assert torch.equal(corrections(), expected) and not torch.equal(before, expected)
    in_proj.data = in_proj.double()
    assert corrections() is None
    in_proj.data = in_proj.float()
    assert torch.equal(corrections(), expected)
    copied = copy.deepcopy(own)
    assert torch.equal(take(copied, hidden, state)[0][0], expected)
    in_proj.data = torch.as_strided(in_proj, in_proj.shape, (1, len(in_proj)))
    assert corrections() is None
    assert torch.equal(take(copied, hidden, state)[0][0], expected)


def test_steps_leave_to_others_what_is_not_as_it_should_be():
    rule = Rule(1, 8)
    hidden, in_proj, bias, state = one_token(rule)
    deltas, output = heads(rule, 3)
    ones = torch.ones(3, 1, dtype=torch.bool)

    def one(hidden, in_proj, bias, state, writes=None, mask=None, deltas=deltas):
        return step(hidden, in_proj, bias, deltas, state, rule, writes, mask)

    right = hidden, in_proj, bias, state
    assert one(*right, ones, ones) is not None
    for wrong in (
        (hidden.double(), in_proj, bias, state),
        (hidden[:0], in_proj, bias, state[:0]),
        (hidden[:, 0], in_proj, bias, state),
        (hidden.expand(3, 2, 37), in_proj, bias, state),
        (hidden.mT.expand(3, 37, 2)[:, :, :1].mT, in_proj[:, :1], bias, state),
        (hidden, in_proj[:-1], bias, state),
        (hidden, in_proj[:, ::2], bias, state),
        (hidden, in_proj, bias[:-1], state),
        (hidden, in_proj, bias, state[:2]),
        (hidden, in_proj, bias, state.mT),
        (*right, ones[:2], None),
        (*right, None, ones.long()),
        (*right, None, None, ()),
        (*right, None, None, (deltas[0][:, 1:],)),
        (*right, None, None, (deltas[0].double(),)),
        one_token(rule, batch=cpu.FEW + 1),
    ):
        assert one(*wrong) is None
    plan = segments.plan(*(part[:3] for part in stream(0, tokens=1)))
    open_sum = torch.zeros(3, 24)
    assert step_segments(hidden, in_proj, bias, deltas, state, open_sum, rule, plan) is not None
    assert step_segments(hidden, in_proj, bias, deltas, state, open_sum.double(), rule, plan) is None
    for batch, tokens in ((2, 1), (3, 2)):
        plan = segments.plan(*(part[:batch] for part in stream(0, tokens=tokens)))
        given = hidden, in_proj, bias, deltas, state, torch.zeros(3, 24), rule
        assert step_segments(*given, plan) is None
    # An output that cannot be corrected in place is left as it is.
    for other in (output.double(), output[..., 1:], torch.cat([output, output], -1)[..., ::2]):
        before = other.clone()
        corrections, _ = step(hidden, in_proj, bias, deltas, state, rule, None, None, other)
        assert corrections[0] is not None
        assert torch.equal(other, before)


# Which backend is taken


def test_auto_takes_compiled_code_on_a_cpu():
    for n in (1, 100):
        inputs = example(n)
        assert same(delta_rule(**inputs), delta_rule(**inputs, backend="cpu"))


@pytest.fixture
def without_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "delta_mem.ops.cpu_kernels", raising=False)
    monkeypatch.delattr(ops, "cpu_kernels", raising=False)
    cpu._load.cache_clear()
    yield
    cpu._load.cache_clear()


def test_without_numba(without_numba):
    inputs, rule = example(30), Rule(1, 8)
    assert_close(delta_rule(**inputs), exact(inputs))
    given = projections(rule)
    torch.testing.assert_close(advance(*given, rule), in_parts(*given, rule), atol=1e-5, rtol=1e-5)
    for call in (lambda: delta_rule(**inputs, backend="cpu"), lambda: advance(*given, rule, backend="cpu")):
        with pytest.raises(ImportError, match=r'needs numba: pip install -e "\.\[cpu\]"') as raised:
            call()
        assert "\n" not in str(raised.value)


def test_elsewhere_than_on_a_cpu():
    with pytest.raises(ValueError, match="backend 'cpu' cannot compute on meta"):
        cpu.delta_rule(*(x.to("meta") for x in example(3).values()))


def test_ranks_too_high_to_compile():
    inputs = example(3, rank=cpu.MAX_RANK + 1)
    assert_close(delta_rule(**inputs), exact(inputs))
    with pytest.raises(ValueError, match="goes up to rank 64, not 65"):
        delta_rule(**inputs, backend="cpu")


def test_torch_compile_traces_another_backend():
    inputs, rule = example(20), Rule(1, 8)
    given = projections(rule)
    with torch.no_grad():
        one = torch.compile(delta_rule, fullgraph=True, backend="eager")
        assert_close(one(**inputs), exact(inputs))
        two = torch.compile(advance, fullgraph=True, backend="eager")
        torch.testing.assert_close(two(*given, rule), in_parts(*given, rule), atol=1e-5, rtol=1e-5)


def test_torch_may_watch_or_transform():
    """Memory is read behind torch's back; so not where torch wants to see what happens."""
    inputs = example(20)
    q = inputs.pop("q")

    def reads(q, backend="auto"):
        return delta_rule(q, **inputs, backend=backend)[0]

    each = torch.vmap(reads)(torch.stack([q, -q]))
    assert_close(each, torch.stack([reads(q), -reads(q)]))
    assert_close(torch.func.jvp(reads, (q,), (q,))[1], reads(q))  # reads are linear in q
    with forward_ad.dual_level(), torch.no_grad():
        tangent = forward_ad.unpack_dual(reads(forward_ad.make_dual(q, q))).tangent
        assert_close(tangent, reads(q))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert reads(mode.from_tensor(q)).shape == q.shape
    with pytest.raises(ValueError, match="cannot be traced or transformed"):
        torch.vmap(lambda q: reads(q, backend="cpu"))(torch.stack([q, -q]))


# What numba keeps on disk


def fails(error):
    def fail(*args, **kwargs):
        raise error

    return fail


TROUBLE = {
    "nowhere to keep it": ("CacheImpl._locator_classes", []),
    "a full disk": ("IndexDataCacheFile.save", fails(OSError("no space left on device"))),
    "a file cut short": ("IndexDataCacheFile.load", fails(pickle.UnpicklingError("truncated"))),
}


@pytest.mark.parametrize("what, instead", TROUBLE.values(), ids=TROUBLE)
def test_trouble_with_compiled_code_on_disk(what, instead, monkeypatch):
    monkeypatch.setattr(f"numba.core.caching.{what}", instead)
    monkeypatch.setattr(cpu._kernels(), "_compiled", {})
    inputs = example(5, rank=3)
    assert_close(delta_rule(**inputs, backend="cpu"), exact(inputs))
