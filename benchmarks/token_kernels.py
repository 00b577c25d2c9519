"""One token through a layer on a GPU, in a CUDA graph: two launches beside a projection of the backbone's, or
before it; one launch; and matrix products.

python benchmarks/token_kernels.py

The graph has 72 layers of the shape of Qwen3-4B, each with its own weights and query projection. Times are of
a layer, without the projection's: above those of a graph that has nothing else.
"""

from collections.abc import Callable
from unittest.mock import patch

import torch
from torch.nn import functional

from delta_mem import DeltaMemConfig, benchmark, ops
from delta_mem.memory import DeltaMemory, WritePlan
from delta_mem.ops import triton

LAYERS, HIDDEN, HEADS = 72, 2560, {"q": 4096, "o": 2560}
NOTHING = "the projection alone"


def captured(layer: Callable[[int], object]) -> Callable[[], None]:
    """Replays a graph of all layers."""
    layer(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(LAYERS):
            layer(index)
    return graph.replay


@torch.no_grad()
def rows(name: str, config: DeltaMemConfig, batch: int):
    torch.manual_seed(0)
    with torch.device("cuda"):
        adapters = [DeltaMemory(config, HIDDEN, HEADS) for _ in range(LAYERS)]
        hidden = torch.randn(batch, 1, HIDDEN, dtype=torch.bfloat16)
    for weight in (weight for adapter in adapters for weight in adapter.parameters()):
        weight.normal_(std=0.02)
    rule, segments, open_sum = adapters[0].rule, None, None
    state = torch.randn(batch, rule.num_states, rule.rank, rule.rank, device="cuda")
    if config.write != "token":
        none = torch.zeros(batch, dtype=torch.int64, device="cuda")
        segments = ops.plan_segments((batch, 1), None, None, None, none, none - 1, True)
        open_sum = torch.zeros(batch, rule.written, device="cuda")
    plan = WritePlan(None, segments=segments)
    outputs = {head: hidden.new_zeros(batch, 1, size) for head, size in HEADS.items()}
    projections = hidden.new_empty(LAYERS, HEADS["q"], HIDDEN).normal_(std=0.02)
    planned = [] if segments is None else [getattr(segments, field) for field in triton.kernels.PLAN]

    own = ops.Steps({index: adapter.step() for index, adapter in enumerate(adapters)})
    states, open_sums = dict.fromkeys(own.layers, state), dict.fromkeys(own.layers, open_sum)
    token = ops.begin_token(hidden, own, states, segments=segments, open_sums=open_sums)

    def project(index: int):
        return functional.linear(hidden, projections[index])

    def step(index: int):
        layer = own.layers[index]
        given = layer.scale, state, open_sum, planned, *layer.rule, None, None
        return torch.ops.delta_mem.step(hidden, *layer.packed, *given)

    def beside(index: int):
        results = step(index)
        output = project(index)
        ops.settle(results, [output])
        return results, output

    def before(index: int):
        ops.settle(results := step(index), [])
        return results, project(index)

    def one_launch(index: int):
        return token(index, hidden, None), project(index)

    def products(index: int):
        adapter = adapters[index]
        reads, *_ = adapter.advance(adapter.project(hidden), state, open_sum, plan)
        reads = reads.to(hidden.dtype)
        corrected = [adapter.correct(head, reads, output, in_place=True) for head, output in outputs.items()]
        return corrected, project(index)

    variants = {NOTHING: captured(project), "two, beside": captured(beside)}
    variants["two, overlapping"] = captured(before)
    with patch.object(triton, "_overlaps", lambda x: False):
        variants["two"] = captured(before)
    if batch * config.width <= triton.ONE_LAUNCH:
        variants["one launch"] = captured(one_launch)
    variants["matrix products"] = captured(products)
    yield from benchmark.alternate(f"{name}, batch {batch}", variants, "cuda", rounds=15)


def main() -> None:
    print(benchmark.machine("cuda"), flush=True)
    for name, config in benchmark.VARIANTS.items():
        for batch in (1, 8, 32):
            nothing, *others = rows(name, config, batch)
            for row in others:
                microseconds = (row["seconds"] - nothing["seconds"]) / LAYERS * 1e6
                print(f"{row['name']:22} {row['variant']:18} {microseconds:6.2f} us", flush=True)


if __name__ == "__main__":
    main()
