"""The recurrence: naive is the definition, every other backend computes the same, faster."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from delta_mem.ops import BACKENDS, alike, cpu, delta_rule

# Triton's kernels have tests of their own: they need a GPU, or its interpreter in a process of its own.
HERE = [name for name in BACKENDS if name != "triton"]
ALL = pytest.mark.parametrize("backend", HERE)
FAST = pytest.mark.parametrize("backend", [name for name in HERE if name != "naive"])
RULES = ("standard", "decay_outside", "no_decay")
NAMES = ("q", "k", "v", "keep", "erase", "write")


def example(tokens, states=1, rank=8, batch=2, rule="standard", dtype=torch.float32, seed=0):
    """Inputs as a trained adapter makes them, gates untied, and a state that was written before."""
    random = torch.Generator().manual_seed(seed)
    q, k, v, β, λ = torch.randn(5, batch, tokens, states, rank, generator=random, dtype=torch.float64)
    β, λ = torch.sigmoid(2 * β - 1.5), torch.sigmoid(2 * λ + 1.5)
    gates = {"standard": (λ, β, β), "decay_outside": (λ, λ * β, β), "no_decay": (torch.ones_like(λ), β, β)}
    inputs = (F.normalize(q.tanh(), dim=-1), F.normalize(k.tanh(), dim=-1), v, *gates[rule])
    inputs = {name: x.to(dtype) for name, x in zip(NAMES, inputs, strict=True)}
    return inputs | {"state": torch.randn(batch, states, rank, rank, generator=random).to(dtype)}


def stream(seed, batch=5, tokens=12):
    """ids, writes, present, open_count, open_ids, keep_open: as `segments.plan` takes them, of all sorts."""
    rng = torch.Generator().manual_seed(seed)

    def chance(share, *shape):
        return torch.rand(*shape, generator=rng) < share

    ids = torch.randint(-1, 3, (batch, tokens), generator=rng)
    ids = ids.gather(1, (chance(0.4, batch, tokens).long().cumsum(1) % tokens))  # in runs
    present = chance(0.8, batch, tokens)
    writes = present & chance(0.7, batch, tokens)
    writes[0] = False
    open_count = torch.randint(0, 3, (batch,), generator=rng)
    open_ids = torch.where(open_count > 0, torch.randint(0, 3, (batch,), generator=rng), -1)
    return ids, writes, present, open_count, open_ids, chance(0.5, batch)


def exact(inputs, **options):
    """The definition, in float64."""
    return delta_rule(**{name: x.double() for name, x in inputs.items()}, **options, backend="naive")


def assert_close(got, expected, tolerance=1e-5):
    """Equal up to `tolerance` times the largest entry of the expected tensor; for tuples, each."""
    if not isinstance(expected, torch.Tensor):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_close(one, other, tolerance)
        return
    assert got.shape == expected.shape
    error, largest = (got.double() - expected.double()).abs().max(), expected.abs().max()
    assert error <= tolerance * largest, f"off by {error:.1e}, largest entry {largest:.1e}"


def row(inputs, i):
    return {name: x[i : i + 1] for name, x in inputs.items()}


def tokens(inputs, which):
    return {name: x if name == "state" else x[:, which] for name, x in inputs.items()}


# The definition


@pytest.mark.parametrize("rule", RULES)
def test_naive_is_the_formula(rule):
    inputs = example(tokens=5, states=2, rank=3, rule=rule, dtype=torch.float64)
    reads, state = delta_rule(**inputs, backend="naive")
    q, k, v, keep, erase, write, S = (x.tolist() for x in inputs.values())
    r = range(3)
    for b in range(2):
        for h in range(2):
            M = S[b][h]
            for t in range(5):
                at = (b, t, h)
                for i in r:
                    assert reads[at][i].item() == pytest.approx(sum(M[i][j] * q[b][t][h][j] for j in r))
                recalled = [sum(M[i][j] * k[b][t][h][j] for j in r) for i in r]
                M = [
                    [
                        keep[b][t][h][i] * M[i][j]
                        - erase[b][t][h][i] * recalled[i] * k[b][t][h][j]
                        + write[b][t][h][i] * v[b][t][h][i] * k[b][t][h][j]
                        for j in r
                    ]
                    for i in r
                ]
            assert torch.allclose(state[b, h], torch.tensor(M, dtype=torch.float64))


# Every other backend computes the same

SHAPES = [
    *[(n, 1, 8) for n in (1, 2, 15, 16, 17, 63, 64, 65, 100, 257, 1000, 4096)],
    *[(n, 4, 8) for n in (1, 17, 257, 1000)],
    *[(n, 1, r) for r in (2, 16, 64) for n in (1, 16, 63, 257)],
    *[(n, 4, r) for r in (2, 16, 64) for n in (100, 257)],
]


@FAST
@pytest.mark.parametrize(
    "n, states, rank", SHAPES, ids=[f"tokens{n}-states{s}-rank{r}" for n, s, r in SHAPES]
)
def test_equals_naive(n, states, rank, backend):
    inputs = example(n, states, rank)
    assert_close(delta_rule(**inputs, backend=backend), exact(inputs))


@FAST
@pytest.mark.parametrize("rank", (8, 16), ids="rank{}".format)
@pytest.mark.parametrize("rule", RULES)
def test_equals_naive_under_every_update_rule(rule, rank, backend):
    inputs = example(300, states=2, rank=rank, rule=rule)
    assert_close(delta_rule(**inputs, backend=backend), exact(inputs))


@ALL
def test_no_state_means_zeros(backend):
    inputs = example(40)
    state = inputs.pop("state")
    expected = exact(inputs, state=torch.zeros_like(state))
    assert_close(delta_rule(**inputs, backend=backend), expected)


@ALL
def test_gates_of_exactly_0_and_1(backend):
    inputs = example(200, states=2)
    for seed, gate in enumerate(("keep", "erase", "write")):
        choice = torch.rand(inputs[gate].shape, generator=torch.Generator().manual_seed(seed))
        inputs[gate] = inputs[gate].where(choice > 0.6, (choice > 0.3).float())
    inputs["keep"][:, 64:100] = 0
    inputs["keep"][:, 120:160] = 1
    assert_close(gradients(inputs, backend), gradients(inputs, "naive", double=True))
    assert_close(delta_rule(**inputs, backend=backend), exact(inputs))


@FAST
@pytest.mark.parametrize("rule", RULES)
def test_100_000_tokens_stay_finite(rule, backend):
    reads, state = delta_rule(**example(100_000, batch=1, rule=rule), backend=backend)
    assert reads.isfinite().all() and state.isfinite().all()
    assert state.abs().max() < 100


@pytest.mark.parametrize("states, rank, n", [(1, 8, 50_000), (4, 64, 2_000)])
def test_a_long_input_is_never_held_times_the_chunk(states, rank, n):
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                stored = x.untyped_storage().nbytes() // x.element_size()
                self.numbers = max(self.numbers, stored)
            return out

    inputs = example(n, states, rank, batch=1)
    with torch.no_grad(), Largest() as largest:
        delta_rule(**inputs, backend="chunked")
    assert largest.numbers < 3 * inputs["q"].numel()


# Sequences


@ALL
def test_two_calls_equal_one(backend):
    inputs = example(100, states=2)
    reads, state = delta_rule(**inputs, backend=backend)
    for cut in (1, 16, 37, 99):
        first, between = delta_rule(**tokens(inputs, slice(cut)), backend=backend)
        rest = tokens(inputs, slice(cut, None)) | {"state": between}
        second, last = delta_rule(**rest, backend=backend)
        assert_close((torch.cat([first, second], dim=1), last), (reads, state))


def left(mask):
    mask[0, :30] = False
    mask[1, :1] = False


def right(mask):
    mask[0, 90:] = False
    mask[1, 16:] = False


def middle(mask):
    mask[0, 5:70] = False
    mask[1, ::2] = False


def whole_row(mask):
    mask[1] = False


@ALL
@pytest.mark.parametrize("pad", (left, right, middle, whole_row))
def test_masked_tokens_neither_read_nor_write(pad, backend):
    inputs = example(100, states=2)
    mask = torch.ones(2, 100, dtype=torch.bool)
    pad(mask)
    expected = [exact(tokens(row(inputs, i), mask[i])) for i in range(2)]
    for name in NAMES:
        inputs[name][~mask] = math.nan
    reads, state = delta_rule(**inputs, mask=mask, backend=backend)
    assert not reads[~mask].any()
    assert_close(reads[mask], torch.cat([reads[0] for reads, _ in expected]))
    assert_close(state, torch.cat([state for _, state in expected]))
    as_integers = delta_rule(**inputs, mask=mask.long(), backend=backend)
    assert torch.equal(as_integers[0], reads) and torch.equal(as_integers[1], state)


@ALL
def test_a_fully_masked_row_returns_its_state_bit_for_bit(backend):
    inputs = example(100)
    _, state = delta_rule(**inputs, mask=torch.zeros(2, 100, dtype=torch.bool), backend=backend)
    assert torch.equal(state, inputs["state"])


@ALL
def test_a_padded_row_equals_the_row_alone(backend):
    inputs = example(70, states=2)
    mask = torch.arange(70) < torch.tensor([[70], [33]])
    reads, state = delta_rule(**inputs, mask=mask, backend=backend)
    alone = delta_rule(**tokens(row(inputs, 1), slice(33)), backend=backend)
    assert_close((reads[1:, :33], state[1:]), alone)


LENGTHS = [(5, 17, 1, 64, 33), (0, 20, 0, 0, 40, 0), (30,), (0, 0)]


@ALL
@pytest.mark.parametrize("masked", (False, True), ids=("full", "masked"))
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: "-".join(map(str, lengths)))
def test_packed_sequences_equal_separate_ones(lengths, masked, backend):
    inputs = example(sum(lengths), states=2, batch=1)
    inputs["state"] = example(1, states=2, batch=len(lengths))["state"]
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    mask = (torch.arange(sum(lengths)) % 5 != 2)[None] if masked else None
    reads, state = delta_rule(
        **inputs, mask=mask, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), backend=backend
    )
    assert reads.shape == inputs["q"].shape and state.shape == inputs["state"].shape
    for i, (start, end) in enumerate(pairwise(bounds)):
        one = tokens(inputs, slice(start, end)) | {"state": inputs["state"][i : i + 1]}
        expected = exact(one, mask=mask if mask is None else mask[:, start:end])
        assert_close(state[i : i + 1], expected[1])
        if end > start:
            assert_close(reads[:, start:end], expected[0])


@ALL
def test_no_tokens(backend):
    inputs = example(0, states=2)
    reads, state = delta_rule(**inputs, backend=backend)
    assert reads.shape == (2, 0, 2, 8)
    assert torch.equal(state, inputs["state"])
    assert state.data_ptr() != inputs["state"].data_ptr()
    inputs.pop("state")
    assert torch.equal(delta_rule(**inputs, backend=backend)[1], torch.zeros(2, 2, 8, 8))


@ALL
@pytest.mark.parametrize("n", (0, 1, 40), ids="tokens{}".format)
def test_the_inputs_are_not_modified(n, backend):
    inputs = example(n)
    before = {name: x.clone() for name, x in inputs.items()}
    _, state = delta_rule(**inputs, mask=torch.arange(n).expand(2, n) > 3, backend=backend)
    state.fill_(7)
    assert all(torch.equal(x, before[name]) for name, x in inputs.items())


# Gradients


def gradients(inputs, backend, double=False, **options):
    """Of a number that every read and every entry of the state bears on."""
    inputs = {name: x.double() if double else x for name, x in inputs.items()}
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    reads, state = delta_rule(**inputs, **options, backend=backend)
    weights = torch.linspace(-1, 2, reads.numel(), dtype=reads.dtype, device=reads.device).view_as(reads)
    loss = (weights * reads).sum() + state.square().sum()
    return torch.autograd.grad(loss, list(inputs.values()))


@ALL
@pytest.mark.parametrize("rank", (2, 16), ids="rank{}".format)
def test_gradcheck(rank, backend):
    inputs = example(35, states=2, rank=rank, dtype=torch.float64)
    values = [x.requires_grad_() for x in inputs.values()]
    mask = torch.ones(2, 35, dtype=torch.bool)
    middle(mask)

    def function(*values):
        return delta_rule(*values, mask=mask, backend=backend)

    assert torch.autograd.gradcheck(function, values, fast_mode=True)


@FAST
@pytest.mark.parametrize(
    "n, states, rank", [(1, 1, 8), (100, 4, 8), (1000, 1, 8), (100, 1, 16), (257, 4, 64)], ids=str
)
def test_gradients_equal_those_of_naive(n, states, rank, backend):
    inputs = example(n, states, rank)
    assert_close(gradients(inputs, backend), gradients(inputs, "naive", double=True))


@FAST
def test_gradients_of_packed_sequences_equal_those_of_naive(backend):
    inputs = example(60, batch=1) | {"state": example(1, batch=3)["state"]}
    bounds = torch.tensor([0, 20, 20, 60])
    expected = gradients(inputs, "naive", double=True, cu_seqlens=bounds)
    assert_close(gradients(inputs, backend, cu_seqlens=bounds), expected)


# Dtypes, gates, compilation, the choice of a backend


@ALL
def test_half_precision_inputs_are_computed_in_float32(backend):
    inputs = example(50, dtype=torch.bfloat16)
    got = delta_rule(**inputs, backend=backend)
    expected = delta_rule(**{name: x.float() for name, x in inputs.items()}, backend=backend)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


@ALL
def test_float64_inputs_are_computed_in_float64(backend):
    inputs = example(50, dtype=torch.float64)
    got = delta_rule(**inputs, backend=backend)
    assert all(x.dtype == torch.float64 for x in got)
    assert_close(got, exact(inputs), tolerance=1e-13)


@ALL
def test_autocast_does_not_reach_the_arithmetic(backend):
    inputs = example(50)
    expected = delta_rule(**inputs, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = delta_rule(**inputs, backend=backend)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@ALL
def test_one_gate_for_all_rows(backend):
    inputs = example(50, states=2)
    for gate in ("keep", "erase", "write"):
        inputs[gate] = inputs[gate][..., :1]
    inputs["keep"] = inputs["keep"][:, :1]
    full = {name: x if name == "state" else x.expand(inputs["q"].shape) for name, x in inputs.items()}
    assert_close(delta_rule(**inputs, backend=backend), exact(full))


def test_one_token_compiles_without_graph_breaks():
    inputs = example(1, states=2)
    mask = torch.tensor([[True], [False]])
    compiled = torch.compile(delta_rule, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_close(compiled(**inputs, mask=mask), exact(inputs, mask=mask))


def test_auto_loops_over_one_token_and_chunks_many_where_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(cpu, "usable", lambda *_: False)
    for n, backend in ((1, "naive"), (100, "chunked")):
        inputs = example(n)
        auto, named = delta_rule(**inputs), delta_rule(**inputs, backend=backend)
        assert all(torch.equal(one, other) for one, other in zip(auto, named, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "cpu"])
@pytest.mark.parametrize("rank", (8, 16), ids="rank{}".format)
def test_on_the_gpu(rank, backend):
    inputs = example(300, states=2, rank=rank)
    on_gpu = {name: x.cuda() for name, x in inputs.items()}
    reads, state = delta_rule(**on_gpu, backend=backend)
    assert reads.is_cuda and state.is_cuda
    assert_close((reads.cpu(), state.cpu()), exact(inputs))
    packed = {name: x if name == "state" else x[:1] for name, x in on_gpu.items()}
    bounds = torch.tensor([0, 200, 300], device="cuda")
    expected = exact({name: x.cpu() for name, x in packed.items()}, cu_seqlens=bounds.cpu())
    got = delta_rule(**packed, cu_seqlens=bounds, backend=backend)
    assert_close([x.cpu() for x in got], expected)


# Wrong arguments

WRONG = {
    "not a tensor": ({"v": [1.0]}, TypeError, "v is a list, expected a tensor"),
    "integers": ({"k": torch.ones(2, 5, 1, 8).int()}, TypeError, "k has dtype torch.int32"),
    "q of 3 dims": ({"q": torch.ones(2, 5, 8)}, ValueError, r"q has shape \(2, 5, 8\), expected \[batch, "),
    "k unlike q": (
        {"k": torch.ones(2, 5, 1, 4)},
        ValueError,
        r"k has shape \(2, 5, 1, 4\), expected \(2, 5, 1, 8\)",
    ),
    "gate": ({"erase": torch.ones(2, 5, 1, 3)}, ValueError, r"erase has shape .* broadcastable"),
    "gate of 5 dims": ({"keep": torch.ones(1, 2, 5, 1, 8)}, ValueError, "keep has shape"),
    "state": (
        {"state": torch.ones(1, 1, 8, 8)},
        ValueError,
        r"state has shape \(1, 1, 8, 8\), expected \(2, 1, 8, 8\)",
    ),
    "device": ({"k": torch.ones(2, 5, 1, 8, device="meta")}, ValueError, "k is on meta, expected cpu"),
    "mask": ({"mask": torch.ones(2, 6).bool()}, ValueError, r"mask has shape \(2, 6\), expected \(2, 5\)"),
    "additive mask": ({"mask": torch.zeros(2, 5)}, TypeError, "mask has dtype torch.float32, expected bool"),
    "backend": ({"backend": "fast"}, ValueError, "backend is 'fast', expected one of .*'auto', 'naive'"),
    "packed batch": ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "q has batch 2, expected 1"),
}
WRONG_BOUNDS = {
    "float": (torch.tensor([0.0, 5.0]), TypeError, "cu_seqlens has dtype torch.float32, expected int32"),
    "two dims": (torch.tensor([[0, 5]]), ValueError, r"cu_seqlens has shape \(1, 2\)"),
    "too short": (torch.tensor([0, 4]), ValueError, r"cu_seqlens is \[0, 4\], expected .* from 0 to 5"),
    "falling": (torch.tensor([0, 4, 2, 5]), ValueError, "rising"),
    "not from 0": (torch.tensor([1, 5]), ValueError, "rising"),
}


@pytest.mark.parametrize("change, error, message", WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message) as raised:
        delta_rule(**example(5) | change)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("bounds, error, message", WRONG_BOUNDS.values(), ids=WRONG_BOUNDS)
def test_wrong_cu_seqlens_are_named(bounds, error, message):
    inputs = example(5, batch=1)
    inputs.pop("state")
    with pytest.raises(error, match=message):
        delta_rule(**inputs, cu_seqlens=bounds)


def test_packed_sequences_want_one_state_each():
    message = r"state has shape \(1, 1, 8, 8\), expected \(2, 1, 8, 8\)"
    with pytest.raises(ValueError, match=message):
        delta_rule(**example(5, batch=1), cu_seqlens=torch.tensor([0, 2, 5]))


@pytest.mark.parametrize("shape", ((1, 18), (2, 18), (3, 7), (1, 3), (2, 1, 3, 3), (1, 1, 8, 8)))
def test_room_made_at_once_is_that_of_tensors_of_their_own(shape):
    made = alike(5, shape, torch.device("cpu"))
    for number, x in enumerate(made):
        assert x.shape == shape and x.is_contiguous() and x.data_ptr() % 16 == 0 and not x._is_view()
        x.fill_(number)
    assert [x.unique().tolist() for x in made] == [[n] for n in range(5)]
    if made[0].nbytes % 16 == 0:
        assert made[0].untyped_storage().nbytes() == 5 * made[0].nbytes
