"""A config that cannot be meant is refused, naming the field."""

import dataclasses

import pytest

import delta_mem as dm


def test_defaults_are_the_published_adapters():
    config = dm.DeltaMemConfig()
    assert (config.rank, config.alpha, config.num_states) == (8, 16.0, 1)
    assert (config.heads, config.write, config.update) == (("q", "o"), "token", "standard")
    assert config.tied_gates and config.per_row_gates and config.gate_bias == -1.5
    assert config.init == "base_slice" and config.layers is None


def test_every_field_has_its_help():
    assert all(field.metadata["help"] for field in dataclasses.fields(dm.DeltaMemConfig))


def test_round_trip():
    config = dm.DeltaMemConfig(heads="oq", layers=[3, 1], write="sentence", trainable_scale="head")
    assert config.heads == ("q", "o") and config.layers == (1, 3)
    assert dm.DeltaMemConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (dict(rank=0), ValueError, "rank must be at least 1, got 0"),
        (dict(rank=8.0), TypeError, "rank must be an integer"),
        (dict(rank=True), TypeError, "rank"),
        (dict(num_states=0), ValueError, "num_states"),
        (dict(alpha="16"), TypeError, "alpha must be a number"),
        (dict(alpha=float("nan")), ValueError, "alpha must be a finite number"),
        (dict(heads=()), ValueError, "heads"),
        (dict(heads=("q", "x")), ValueError, "heads"),
        (dict(heads=("q", "q")), ValueError, "heads"),
        (dict(heads=3), TypeError, "heads"),
        (dict(write="tokens"), ValueError, "write must be one of 'token', 'message', 'sentence'"),
        (dict(update="none"), ValueError, "update"),
        (dict(init="zeros"), ValueError, "init"),
        (dict(tied_gates=1), TypeError, "tied_gates"),
        (dict(layers=()), ValueError, "layers"),
        (dict(layers=(-1,)), ValueError, "layers"),
        (dict(layers="01"), TypeError, "layers"),
        (dict(scale_init=3.0), ValueError, "scale_init must be between 0 and scale_max=2.0"),
        (dict(trainable_scale="row"), ValueError, "trainable_scale"),
        (dict(o_norm=True, heads=("q",)), ValueError, "o_norm=True needs 'o'"),
        (dict(update="no_decay", tied_gates=False), ValueError, "no_decay"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused(values, error, message):
    with pytest.raises(error, match=message):
        dm.DeltaMemConfig(**values)


def test_unknown_fields_are_named():
    with pytest.raises(ValueError, match=r"unknown field\(s\) colour, size"):
        dm.DeltaMemConfig.from_dict({"rank": 4, "size": 1, "colour": "red"})
