"""The minimax concave penalty as a sparsity objective."""

import sae
from sae import Objective, Pass, Tensor, relu


def mcp(p: Pass) -> Tensor:
    """Σ ρ(f_i), ρ(f) = f − f²/2 up to 1, ½ beyond (Zhang 2010, minimax concave penalty): the slope of L1 at 0, none from 1 on."""
    f_NF = p.features_NF.clamp(max=1.0)
    return (f_NF - f_NF.square() / 2).sum(-1)


def install(monkeypatch, penalty=mcp, **changes) -> None:
    monkeypatch.setitem(sae.OBJECTIVES, "mcp", Objective(penalty, relu, resample=True)._replace(**changes))


WRONG = {
    "the parabola goes on beyond 1": lambda patch: install(patch, lambda p: (p.features_NF - p.features_NF.square() / 2).sum(-1)),
    "mean over features": lambda patch: install(patch, lambda p: mcp(p) / p.features_NF.shape[1]),
    "one number for all rows": lambda patch: install(patch, lambda p: mcp(p).sum()),
    "the right values without a slope": lambda patch: install(patch, lambda p: mcp(p).detach() + 0 * p.features_NF.sum(-1)),
    "L1 cut off, slope 1 up to 1": lambda patch: install(patch, lambda p: p.features_NF.clamp(max=1).sum(-1)),
    "decoder rows may grow": lambda patch: install(patch, unit_norm=False),
    "nothing is ever off": lambda patch: install(patch, activation=lambda sae, pre_NF, l0: pre_NF.abs()),
}
