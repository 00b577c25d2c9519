"""The model rows of `delta-mem bench` for a GPU, one line each as it is measured.

python benchmarks/gpu.py prefill decode-1 decode-32 compiled-1 compiled-32 generate train
"""

import sys

from delta_mem import benchmark

PARTS = {
    "prefill": lambda frozen: benchmark.prefill(frozen, "cuda", 8192, 7),
    "decode-1": lambda frozen: benchmark.decode(frozen, "cuda", 512, 1, False, 7),
    "decode-32": lambda frozen: benchmark.decode(frozen, "cuda", 512, 32, False, 7),
    "compiled-1": lambda frozen: benchmark.decode(frozen, "cuda", 512, 1, True, 7),
    "compiled-32": lambda frozen: benchmark.decode(frozen, "cuda", 512, 32, True, 7),
    "generate": lambda frozen: benchmark.generation(frozen, "cuda", 16, True, 7),
    "train": lambda frozen: benchmark.training_step(frozen, "cuda", 8192, 512, 3),
}


def main() -> None:
    frozen = benchmark.backbone("cuda")
    print(benchmark.machine("cuda"), flush=True)
    for part in sys.argv[1:] or PARTS:
        for row in PARTS[part](frozen):
            spread = f"{row['low'] * 1e3:.2f} to {row['high'] * 1e3:.2f}"
            memory = "" if row["bytes"] is None else f"{row['bytes'] / 2**20:,.0f} MiB"
            print(
                f"{row['name']:42} {row['variant']:10} {row['seconds'] * 1e3:9.2f} ms ({spread}) "
                f"x {row['ratio']:.3f}  {memory}",
                flush=True,
            )


if __name__ == "__main__":
    main()
