"""How fast each backend of `delta_rule` is, on this machine.

    python benchmarks/ops.py                                 # 8,192 tokens, rank 8, one state
    python benchmarks/ops.py --tokens 2048 --rank 64 --states 4 --backward
    python benchmarks/ops.py --device cuda

The backends take turns in every round, so that whatever else the machine does meets all of them.
Printed per backend: the median over the rounds, the fastest and the slowest round, and how many
times faster the median is than that of the first backend named.
"""

import argparse
import platform
import statistics
import time

import torch
import torch.nn.functional as F

from delta_mem.ops import BACKENDS, delta_rule


def example(args: argparse.Namespace) -> list[torch.Tensor]:
    """q, k, v, keep, erase, write as an untrained adapter makes them."""
    shape = (args.batch, args.tokens, args.states, args.rank)
    q, k, v, gate = torch.randn(4, *shape, device=args.device)
    write = torch.sigmoid(gate - 1.5)
    q, k = F.normalize(q.tanh(), dim=-1), F.normalize(k.tanh(), dim=-1)
    return [x.clone().requires_grad_(args.backward) for x in (q, k, v, 1 - write, write, write)]


def seconds(inputs: list[torch.Tensor], backend: str, backward: bool) -> float:
    device = inputs[0].device
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        reads, state = delta_rule(*inputs, backend=backend)
    if backward:
        torch.autograd.grad(reads.sum() + state.sum(), inputs)
    wait()
    return time.perf_counter() - start


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--states", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--backward", action="store_true", help="time both passes")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=list(BACKENDS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    inputs = example(args)
    times = {backend: [] for backend in args.backends}
    for round in range(-1, args.rounds):  # round −1 warms up
        for backend in args.backends:
            spent = seconds(inputs, backend, args.backward)
            if round >= 0:
                times[backend].append(1e3 * spent)

    on = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    print(
        f"{args.tokens} tokens, rank {args.rank}, {args.states} state(s), batch {args.batch}, "
        f"{'forward + backward' if args.backward else 'forward, no_grad'}; "
        f"{on}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.rounds} rounds"
    )
    print(f"{'backend':<10}{'median ms':>12}{'fastest':>12}{'slowest':>12}{'times faster':>14}")
    first = statistics.median(times[args.backends[0]])
    for backend, ms in times.items():
        median = statistics.median(ms)
        ratio = first / median
        print(f"{backend:<10}{median:>12.2f}{min(ms):>12.2f}{max(ms):>12.2f}{ratio:>14.1f}")


if __name__ == "__main__":
    main()
