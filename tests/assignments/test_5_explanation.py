"""Assignment 5: a better explanation of a feature. File: interpret.py. About 30 lines.

`explanation_score` says how far a feature can be told from the token and the one before it. Many features wait for more ("not very good").

Write `two_back_score(activations_NF, tokens_BT, strength=2.0) -> Explanation`, with the same rows (all tokens but each window's first), the
same split (fitted on even windows, scored on odd ones) and the same NaN for silent columns, whose prediction may look at *three* tokens: t−2,
t−1 and t. It must be good on columns that depend on the token two back, hardly worse on the others, and explain noise no better than noise can be.

Hints: the least that works is one more level of the same kind, the mean at the same three tokens drawn towards the mean at the same pair
(`class_means`); a window's second token has nothing two back: give that an id of its own. Fit on even windows *only*: what was fitted to the
rows it is scored on "explains" noise. To go on: most threes are rare in real text, and a mean at (t−2, t), whatever lies between, is seen more
often; score an SAE's features with both functions, layer by layer.
"""

import numpy as np
import torch

import interpret
from assignments import need
from conftest import random_tokens


def wanted() -> None:
    need(hasattr(interpret, "two_back_score"), "interpret.py has no function two_back_score yet")


def window_tokens(B: int, T: int, vocabulary: int) -> torch.Tensor:
    """-> tokens_BT from 1 to `vocabulary`, after an end-of-text token, 0."""
    tokens_BT = torch.randint(1, vocabulary + 1, (B, T), generator=torch.Generator().manual_seed(1))
    tokens_BT[:, 0] = 0
    return tokens_BT


def planted(tokens_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """-> columns of activations, one number a row, by what they depend on."""
    token_N, one_N = tokens_BT[:, 1:].flatten(), tokens_BT[:, :-1].flatten()
    two_N = torch.nn.functional.pad(tokens_BT, (1, 0), value=-1)[:, :-2].flatten()
    height_N = 0.5 + torch.rand(len(token_N), generator=torch.Generator().manual_seed(2))          # no predictor can know it
    noise_N = torch.rand(len(token_N), generator=torch.Generator().manual_seed(3)).sub(0.8).relu()
    active = {"two back and now": (token_N == 3) & (two_N == 5), "two back alone": two_N == 2,
              "either of two, two back": (token_N == 1) & ((two_N == 4) | (two_N == 6)), "all three": (token_N == 3) & (one_N < 4) & (two_N > 3),
              "now": token_N == 3, "one back and now": (token_N == 3) & (one_N == 5), "silent": token_N < 0}
    return {"noise": noise_N} | {name: on_N * height_N for name, on_N in active.items()}


def both(tokens_BT: torch.Tensor) -> tuple[dict, dict]:
    """-> {column: (pearson, f1)} by explanation_score and by the student's, all columns of `planted`."""
    wanted()
    columns = planted(tokens_BT)
    activations_NF = torch.stack(list(columns.values()), dim=1)
    scores = [function(activations_NF, tokens_BT) for function in (interpret.explanation_score, interpret.two_back_score)]
    return tuple({name: (pearson.item(), f1.item()) for name, pearson, f1 in zip(columns, *score, strict=True)} for score in scores)


def test_it_sees_what_lies_two_back():
    before, after = both(window_tokens(300, 25, 7))
    for name in ("two back and now", "two back alone", "either of two, two back", "all three"):
        (old, _), (pearson, f1) = before[name], after[name]
        assert pearson > old + 0.15 and pearson > 0.8, \
            f"{name}: r = {pearson:.2f}; explanation_score has {old:.2f}, a mean over three tokens about 0.9"
        assert f1 > 0.85, f"{name}: F1 = {f1:.2f}; which tokens are active can be told exactly here (≥ 0.95)"


def test_it_is_hardly_worse_where_nothing_lies_there():
    before, after = both(window_tokens(300, 25, 7))
    for name in ("now", "one back and now"):
        (old, _), (pearson, f1) = before[name], after[name]
        assert pearson > old - 0.05, f"{name}: r fell from {old:.2f} to {pearson:.2f}: draw rare threes towards the pair"
        assert f1 > 0.85, f"{name}: F1 = {f1:.2f}"


def test_noise_and_what_lies_ahead_stay_unexplained():
    tokens_BT = window_tokens(300, 25, 40)                           # 64,000 threes: nearly each row is alone with its own
    _, after = both(tokens_BT)
    assert abs(after["noise"][0]) < 0.06, f"noise: r = {after['noise'][0]:.2f}: fitted to the rows that it is scored on?"
    ahead_N = (torch.nn.functional.pad(tokens_BT, (0, 1))[:, 2:] <= 10).flatten().float()
    pearson = interpret.two_back_score(ahead_N[:, None], tokens_BT).pearson_F.item()
    assert abs(pearson) < 0.06, f"a column that depends on the *next* token is explained (r = {pearson:.2f}): only tokens up to t may be looked at"


def test_odd_windows_are_not_looked_at():
    """What only odd windows know cannot be predicted: there a column means something else, or nothing."""
    wanted()
    tokens_BT = window_tokens(300, 25, 7)
    on_BT = tokens_BT[:, 1:] == 3
    on_BT[1::2] = tokens_BT[1::2, 1:] == 4
    pearson = interpret.two_back_score(on_BT.flatten().float()[:, None], tokens_BT).pearson_F.item()
    assert pearson < -0.05, f"r = {pearson:.2f}: active at token 3 in even windows and at token 4 in odd ones, so that an honest prediction fails"


def test_silent_columns_are_nan_and_many_columns_are_scored_one_by_one():
    before, after = both(window_tokens(60, 17, 7))
    assert np.isnan(after["silent"]).all(), "a silent column has no score: NaN, as from explanation_score"
    tokens_BT = random_tokens(20, 9) % 6
    columns_NF = torch.stack(list(planted(tokens_BT).values()), dim=1)
    alone, many = interpret.two_back_score(columns_NF, tokens_BT), interpret.two_back_score(columns_NF.repeat(1, 70), tokens_BT)
    for one, all_of_them in zip(alone, many):
        np.testing.assert_allclose(all_of_them, one.repeat(70), atol=1e-5, err_msg="a column's score depends on its neighbours")
