"""Assignment 1: a sparsity objective that does not shrink what it keeps. File: sae.py. About 10 lines.

L1 pays for every bit of a feature's height, and so makes all features too small; `log`, `sqrt` and `tanh` soften that. The minimax concave
penalty (Zhang 2010, "Nearly unbiased variable selection under minimax concave penalty", arXiv:1002.4734) ends it: it begins with the slope of
L1 and is flat from 1 on, so that a large feature has no reason at all to be smaller than it should be.

    penalty_N = Σ_i ρ(f_i)        ρ(f) = f − f²/2  for f ≤ 1,   ½  beyond

Write the function `mcp(p: Pass) -> penalty_N` and give it the line "mcp" in OBJECTIVES; `--sae-objective mcp` then works. Hints: `tanh` is
the nearest neighbour; what would the trainer do with a flat penalty if decoder rows might grow? (the field `unit_norm`)
"""

import numpy as np
import pytest
import torch

import sae
from assignments import need
from bench import NoRun, PlantedRows


def wanted() -> sae.Objective:
    need("mcp" in sae.OBJECTIVES, 'sae.OBJECTIVES has no line "mcp" yet')
    return sae.OBJECTIVES["mcp"]


def seen(features_NF: torch.Tensor, norm: float = 1.0) -> sae.Pass:
    """-> what an objective sees of a step with these features, decoder rows being `norm` long."""
    trained, x_ND = sae.SAE(4, features_NF.shape[1]), torch.zeros(len(features_NF), 4)
    trained.W_dec_FD.data *= norm
    return sae.Pass(sae=trained, x_ND=x_ND, pre_NF=features_NF, features_NF=features_NF, error_ND=x_ND,
                    dead_F=torch.zeros(features_NF.shape[1], dtype=torch.bool))


def test_the_penalty_is_its_formula():
    features_NF = torch.tensor([[0, 0, 0, 0], [0.5, 0, 0, 0], [0.25, 0.5, 0, 0], [1, 1, 0, 0], [7, 0, 0, 0.1], [2, 3, 4, 50]])
    f = features_NF.numpy()
    want_N = np.where(f <= 1, f - f ** 2 / 2, 0.5).sum(1)
    got_N = wanted().penalty(seen(features_NF))
    assert got_N.shape == (6,), "one number a row is wanted, summed over features; the trainer takes the mean over rows"
    np.testing.assert_allclose(got_N, want_N, atol=1e-6, err_msg="Σ ρ(f_i) of each row of these features:\n" + str(f))


def test_large_features_feel_no_pull():
    features_NF = torch.tensor([[0.01, 0.25, 0.75, 1.5, 20.0]], dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(wanted().penalty(seen(features_NF)).sum(), features_NF)
    np.testing.assert_allclose(slope[0], [0.99, 0.75, 0.25, 0, 0], atol=1e-6,
                               err_msg="ρ'(f) = 1 − f up to 1 and 0 beyond: small features are pushed to 0, large ones left alone")


def test_scale_does_not_escape_the_penalty():
    objective, features_NF = wanted(), torch.tensor([[0.5, 0.0, 2.0]])
    if not objective.unit_norm:
        before_N, after_N = objective.penalty(seen(features_NF)), objective.penalty(seen(features_NF / 10, norm=10.0))
        assert torch.allclose(before_N, after_N), (
            "with features 10 times smaller and decoder rows 10 times longer the reconstruction is the same and the penalty lower: "
            "training would take that way out. Hold the rows at norm 1 (unit_norm)")


def test_training_with_it_finds_planted_features_at_their_height():
    generator = torch.Generator().manual_seed(0)
    rows, _ = PlantedRows(8192, generator, directions=16, d_in=16, active=2), wanted()
    cfg = sae.SAEConfig(num_features=16, objective="mcp", l0=2.0, tokens=128 * 300, batch_size=128, lr=1e-2, resample_rows=1024, refit=False)
    trained = sae.train_sae(rows, cfg, NoRun(), generator)
    x_ND = rows.rows_ND[rows.rows_ND.norm(dim=-1) > 0.1]
    shrinkage = (trained(x_ND).norm(dim=-1) / x_ND.norm(dim=-1)).mean().item()
    found, l0 = sae.mmcs(rows.directions_GD, trained.W_dec_FD), (trained.encode(x_ND) > 0).sum(1).float().mean().item()
    assert l0 == pytest.approx(2.5, abs=0.8), f"{l0:.2f} features active a row; the target was 2"
    assert shrinkage > 0.75, f"reconstructions have {shrinkage:.2f} of the inputs' length; L1 reaches 0.57 here, this penalty 0.9"
    assert found > 0.75, f"mean best cosine of the planted directions with decoder rows is {found:.2f}"
