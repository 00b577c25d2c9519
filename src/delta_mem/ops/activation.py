"""From a token's projections to the recurrence's inputs: tanh, unit length, sigmoid.

The projections of one token lie side by side in z [..., features], with D = num_states * rank:

    query D | key D | value D | write gate G | keep gate G, if it is not tied

where G is D (one gate per row of a state) or num_states (one per state).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

NORM_EPS = 1e-6


class Rule(NamedTuple):
    """What the recurrence needs to know of `DeltaMemConfig`; see there."""

    num_states: int
    rank: int
    update: str = "standard"
    tied_gates: bool = True
    per_row_gates: bool = True

    @property
    def sections(self) -> dict[str, int]:
        """{name: width} of the parts of z, in their order."""
        width = self.num_states * self.rank
        gates = width if self.per_row_gates else self.num_states
        sections = {"query": width, "key": width, "value": width, "beta": gates}
        return sections if self.tied_gates else {**sections, "lambda": gates}

    @property
    def written(self) -> int:
        """Numbers of z that are written: all but the query."""
        return sum(self.sections.values()) - self.num_states * self.rank


class Inputs(NamedTuple):
    """The six tensors of `delta_rule`, each [..., states, rank]."""

    q: Tensor
    k: Tensor
    v: Tensor
    keep: Tensor
    erase: Tensor
    write: Tensor


def activate(z: Tensor, gate_bias: Tensor, rule: Rule) -> Inputs:
    """The recurrence's inputs of projections z.

    Args:
        z: float32 [..., features], laid out as `rule.sections`.
        gate_bias: float32 [G] for the write gate, or [2 G] with the keep gate's behind it.
        rule: which gates there are and how they act.
    """
    parts = dict(zip(rule.sections, z.split(list(rule.sections.values()), -1), strict=True))
    bias = gate_bias.split(rule.sections["beta"])
    v = _by_state(parts["value"], rule)
    beta = torch.sigmoid(_by_state(parts["beta"] + bias[0], rule)).expand_as(v)
    if rule.update == "no_decay":
        keep, erase = torch.ones_like(beta), beta
    else:
        keep = 1 - beta
        if not rule.tied_gates:
            keep = torch.sigmoid(_by_state(parts["lambda"] + bias[1], rule)).expand_as(v)
        erase = keep * beta if rule.update == "decay_outside" else beta
    return Inputs(direction(parts["query"], rule), direction(parts["key"], rule), v, keep, erase, beta)


def direction(x: Tensor, rule: Rule) -> Tensor:
    """Queries or keys [..., states, rank] of their projections [..., D]: tanh, unit length per state."""
    return F.normalize(torch.tanh(_by_state(x, rule)), dim=-1, eps=NORM_EPS)


def _by_state(x: Tensor, rule: Rule) -> Tensor:
    """[..., D] -> [..., states, rank]; one gate per state, [..., states] -> [..., states, 1]."""
    return x.unflatten(-1, (rule.num_states, -1))
