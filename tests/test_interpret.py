"""interpret.py's explanation scores against a slow reading of their definition, and on columns whose score is known."""

import collections

import numpy as np
import pytest
import torch

from conftest import random_model, random_tokens
from interpret import as_sparse_as, explanation_score, shuffled_weights, token_entropy


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slow_score(column: np.ndarray, tokens: np.ndarray, strength: float) -> tuple[float, float]:
    """-> Pearson r and F1 of one column, row by row."""
    B, T = tokens.shape
    by_token, by_pair, seen = collections.defaultdict(list), collections.defaultdict(list), []
    for b, t in ((b, t) for b in range(0, B, 2) for t in range(1, T)):
        value = column[b * (T - 1) + t - 1]
        by_token[tokens[b, t]].append(value)
        by_pair[tokens[b, t - 1], tokens[b, t]].append(value)
        seen.append(value)

    def mean(values: list[float], prior: float) -> float:
        return (sum(values) + strength * prior) / (len(values) + strength)

    def guesses(first: int) -> np.ndarray:
        return np.array([mean(by_pair[tokens[b, t - 1], tokens[b, t]], mean(by_token[tokens[b, t]], np.mean(seen)))
                         for b in range(first, B, 2) for t in range(1, T)])

    guess, held = guesses(1), np.concatenate([column[b * (T - 1):(b + 1) * (T - 1)] for b in range(1, B, 2)])
    on, picked = held > 0, guess >= np.sort(guesses(0))[::-1][(np.array(seen) > 0).sum() - 1] - 1e-7
    return np.corrcoef(guess, held)[0, 1], 2 * (on & picked).sum() / (on.sum() + picked.sum())


def test_explanation_score_equals_its_definition_row_by_row():
    tokens_BT = random_tokens(30, 9) % 6
    generator = seeded()
    columns_NF = torch.relu(torch.randn(30 * 8, 5, generator=generator) - 0.7 + (tokens_BT[:, 1:].flatten() == 3)[:, None])
    score = explanation_score(columns_NF, tokens_BT, strength=1.5)
    for i in range(5):
        want = slow_score(columns_NF[:, i].double().numpy(), tokens_BT.numpy(), 1.5)
        assert (score.pearson_F[i].item(), score.f1_F[i].item()) == pytest.approx(want, abs=1e-3)


def test_explanation_score_of_columns_that_are_known():
    """A token, a pair of tokens, noise, silence, and what depends on the window alone: seen in fitting, of no use on other windows."""
    tokens_BT = random_tokens(200, 21) % 8
    token_N, before_N = tokens_BT[:, 1:].flatten(), tokens_BT[:, :-1].flatten()
    window_N = torch.arange(200).repeat_interleave(20)
    noise_N = torch.rand(4000, generator=seeded()).sub(0.8).relu()
    columns_NF = torch.stack([(token_N == 3).float(), ((token_N == 3) & (before_N == 5)).float(), noise_N, torch.zeros(4000),
                              (window_N == 2).float(), (window_N % 10 < 2).float()], dim=1)
    pearson, f1 = (value.tolist() for value in explanation_score(columns_NF, tokens_BT))
    assert min(pearson[:2] + f1[:2]) > 0.99 and abs(pearson[2]) < 0.1 and f1[2] < 0.35
    assert np.isnan([pearson[3], f1[3], pearson[4], f1[4]]).all() and abs(pearson[5]) < 0.1
    assert explanation_score(columns_NF.repeat(1, 60), tokens_BT).pearson_F.shape == (360,)


def test_token_entropy_of_columns_that_are_known():
    tokens_BT = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]])
    columns_NF = torch.zeros(8, 4)
    columns_NF[[0, 4], 0] = torch.tensor([1.0, 9.0])             # always token 1
    columns_NF[:4, 1] = 1.0                                      # each of four
    columns_NF[[0, 4, 1, 2], 2] = 1.0                            # token 1 twice, 2 and 3
    entropy_F, share_F = token_entropy(columns_NF, tokens_BT)
    np.testing.assert_allclose(entropy_F[:3], [0, np.log(4), 1.5 * np.log(2)], atol=1e-6)
    np.testing.assert_allclose(share_F[:3], [1, 0.25, 0.5])
    assert entropy_F[3].isnan() and share_F[3].isnan()


def test_controls_fire_as_often_as_features():
    values_NG, rate_F = torch.randn(1000, 6, generator=seeded()) + 5, torch.tensor([0.0, 0.3, 0.01, 0.1, 0.05, 0.5])
    sparse_NG = as_sparse_as(values_NG, rate_F)
    torch.testing.assert_close((sparse_NG > 0).float().mean(0), rate_F.sort().values)
    on = sparse_NG[:, 4] > 0
    offset_N = values_NG[on, 4] - sparse_NG[on, 4]
    assert offset_N.max() - offset_N.min() < 1e-5 and values_NG[~on, 4].max() <= offset_N.min() + 1e-5
    assert (as_sparse_as(values_NG[:, :3], rate_F) > 0).float().mean(0).tolist() == pytest.approx([0, 0.05, 0.5])


def test_shuffled_weights_keep_each_tensors_numbers():
    model = random_model()
    other = shuffled_weights(model, seeded())
    for (name, before), after in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(before.flatten().sort().values, after.flatten().sort().values) and not torch.equal(before, after), name
    assert not torch.equal(model(random_tokens(2, 8)), other(random_tokens(2, 8)))
