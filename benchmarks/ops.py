"""How fast each backend of `delta_rule`, or of `advance`, is on this machine.

    python benchmarks/ops.py                                 # 8,192 tokens, rank 8, one state
    python benchmarks/ops.py --tokens 2048 --rank 64 --states 4 --backward
    python benchmarks/ops.py --advance --tokens 1            # what decoding pays per layer
    python benchmarks/ops.py --device cuda --backends chunked,triton
    python benchmarks/ops.py --device cuda --backends triton --graph    # the GPU's share alone

The backends take turns in every round, so that whatever else the machine does meets all of them.
Printed per backend: the median over the rounds, the fastest and the slowest round, and how many
times faster the median is than that of the first backend named.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch

from delta_mem.benchmark import available_backends, operator_inputs
from delta_mem.ops import Rule, advance, delta_rule


def call(args: argparse.Namespace) -> Callable[[str], None]:
    """What is timed, given a backend."""
    if args.advance:
        rule = Rule(args.states, args.rank)
        z = torch.randn(args.batch, args.tokens, sum(rule.sections.values()), device=args.device)
        gate_bias = torch.full((rule.sections["beta"],), -1.5, device=args.device)
        state = torch.zeros(args.batch, args.states, args.rank, args.rank, device=args.device)
        return lambda backend: advance(z, gate_bias, state, rule, backend=backend)

    inputs = operator_inputs(args.device, args.batch, args.tokens, args.states, args.rank)
    inputs = [x.clone().requires_grad_(args.backward) for x in inputs]

    def run(backend: str) -> None:
        reads, state = delta_rule(*inputs, backend=backend)
        if args.backward:
            torch.autograd.grad(reads.sum() + state.sum(), inputs)

    return run


def captured(
    run: Callable[[str], None], backends: list[str], args: argparse.Namespace
) -> Callable[[str], None]:
    """The same, replayed from CUDA graphs: without what Python takes to launch it."""
    graphs = {backend: torch.cuda.CUDAGraph() for backend in backends}
    with torch.set_grad_enabled(args.backward):
        for backend, graph in graphs.items():
            run(backend)
            with torch.cuda.graph(graph):
                run(backend)
    return lambda backend: graphs[backend].replay()


def milliseconds(run: Callable[[str], None], backend: str, args: argparse.Namespace) -> float:
    # A single short call is lost in the clock, or in what it takes to start the GPU.
    times = 20 if args.graph else max(1, 1000 // args.tokens)
    with torch.set_grad_enabled(args.backward):
        if args.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(times):
                run(backend)
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / times
        start = time.perf_counter()
        for _ in range(times):
            run(backend)
        return 1e3 * (time.perf_counter() - start) / times


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--states", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--backward", action="store_true", help="time both passes")
    what.add_argument("--advance", action="store_true", help="time `advance`, from projections on")
    parser.add_argument("--backends", help="names, with commas between; default: all that run here")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--graph", action="store_true", help="on CUDA, replay the calls from CUDA graphs")
    args = parser.parse_args()

    backends = args.backends.split(",") if args.backends else available_backends(args.device)

    torch.manual_seed(0)
    run = call(args)
    if args.graph:
        run = captured(run, backends, args)
    times = {backend: [] for backend in backends}
    for round in range(-1, args.rounds):  # round −1 warms up
        for backend in backends:
            spent = milliseconds(run, backend, args)
            if round >= 0:
                times[backend].append(spent)

    on = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    name = "advance" if args.advance else "forward + backward" if args.backward else "forward, no_grad"
    print(
        f"{args.tokens} tokens, rank {args.rank}, {args.states} state(s), batch {args.batch}, "
        f"{name}; "
        f"{on}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.rounds} rounds"
    )
    print(f"{'backend':<10}{'median ms':>12}{'fastest':>12}{'slowest':>12}{'times faster':>14}")
    first = statistics.median(times[backends[0]])
    for backend, ms in times.items():
        median = statistics.median(ms)
        ratio = first / median
        print(f"{backend:<10}{median:>12.4f}{min(ms):>12.4f}{max(ms):>12.4f}{ratio:>14.1f}")


if __name__ == "__main__":
    main()
