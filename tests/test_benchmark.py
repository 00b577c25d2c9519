"""What `delta-mem bench` measures, at sizes that take no time: every part runs, against what it is said to."""

import math

import pytest
import torch

from delta_mem import benchmark

TINY = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    head_dim=16, vocab_size=128, max_position_embeddings=256,
)  # fmt: skip
MEMORIES = list(benchmark.VARIANTS)


@pytest.fixture
def frozen(monkeypatch):
    monkeypatch.setattr(benchmark, "SMALL", TINY)
    return benchmark.backbone("cpu")


def check(rows, variants):
    rows = list(rows)
    assert [row["variant"] for row in rows] == variants
    assert rows[0]["ratio"] == 1
    for row in rows:
        assert 0 < row["low"] <= row["seconds"] <= row["high"] < math.inf and row["ratio"] > 0


@pytest.mark.parametrize(
    ("part", "arguments", "variants"),
    [
        (benchmark.prefill, (16, 1), ["frozen", *MEMORIES, "LoRA r=8"]),
        (benchmark.decode, (16, 2, False, 1), ["frozen", *MEMORIES]),
        (benchmark.generation, (16, False, 1, 4), ["frozen", *MEMORIES]),
        (benchmark.training_step, (16, 8, 1), ["LoRA r=8", *MEMORIES]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_variant_of_a_part_runs(frozen, part, arguments, variants):
    before = [parameter.clone() for parameter in frozen.parameters()]
    check(part(frozen, "cpu", *arguments), variants)
    assert all(map(torch.equal, before, frozen.parameters()))  # the variants share them


def test_the_recurrence_is_measured_against_its_definition(monkeypatch):
    inputs = benchmark.operator_inputs
    monkeypatch.setattr(
        benchmark,
        "operator_inputs",
        lambda device, tokens, **sizes: inputs(device, tokens=min(tokens, 4), **sizes),
    )
    rows = list(benchmark.operator("cpu", rounds=1))
    names = benchmark.available_backends("cpu")
    assert names[0] == "naive" and len(rows) == 2 * (5 * len(names) - 1)  # the loop is spared 65,536 tokens
    check(rows[: len(names)], names)


def test_a_long_text_is_measured_at_its_beginning_and_its_end(frozen):
    rows = list(benchmark.long_write(frozen, "cpu"))
    assert [row["name"] for row in rows] == [
        f"chunk of 2,048 up to {tokens} written" for tokens in ("16,384", "32,768", "65,536")
    ]
    assert len({row["bytes"] for row in rows}) == 1
