"""One level more than explanation_score has: three tokens."""

import torch
import torch.nn.functional as F

import interpret
from interpret import Explanation, Tensor, class_means


@torch.no_grad()
def two_back_score(activations_NF: Tensor, tokens_BT: Tensor, strength: float = 2.0) -> Explanation:
    """As `explanation_score`, but the mean at the same three tokens, drawn towards the mean at the same two, and so on (a smoothed back-off).

    Before a window lies id −1. In interpret.py, better still: one function for any number of tokens, of which explanation_score is a case.
    """
    B, T = tokens_BT.shape
    before_BT = F.pad(tokens_BT.long().cpu(), (1, 0), value=-1)
    history_JN = torch.stack([before_BT[:, 2 - j:2 - j + T - 1].flatten() for j in range(3)])         # J: 0 the token itself, 1 one back, 2 two back
    levels = [history_JN[:j + 1].unique(dim=1, return_inverse=True)[1] for j in range(3)]
    fit_N = (torch.arange(B) % 2 == 0).repeat_interleave(T - 1)
    pearson, f1 = [], []
    for columns_NF in activations_NF.float().cpu().split(256, dim=1):
        seen_NF, held_NF = columns_NF[fit_N], columns_NF[~fit_N]
        guess_NF = seen_NF.mean(0).expand(len(fit_N), -1)
        for class_N in levels:                       # a level's prior is the guess of the one before, the same for all rows of a class
            prior_CF = guess_NF.new_zeros(int(class_N.max()) + 1, guess_NF.shape[1])
            prior_CF[class_N] = guess_NF
            guess_NF = class_means(seen_NF, class_N[fit_N], prior_CF, strength)[class_N]
        on_NF, active_F, fitted_NF, guess_NF = held_NF > 0, (seen_NF > 0).sum(0), guess_NF[fit_N], guess_NF[~fit_N]
        guess_on_NF = guess_NF >= fitted_NF.sort(0, descending=True).values.gather(0, active_F.clamp(min=1)[None] - 1)
        silent_F = (active_F == 0) | ~on_NF.any(0)
        f1.append((2 * (on_NF & guess_on_NF).sum(0) / (on_NF.sum(0) + guess_on_NF.sum(0))).masked_fill(silent_F, torch.nan))
        pearson.append(F.cosine_similarity(guess_NF - guess_NF.mean(0), held_NF - held_NF.mean(0), dim=0).masked_fill(silent_F, torch.nan))
    return Explanation(torch.cat(pearson), torch.cat(f1))


def install(monkeypatch, score=two_back_score) -> None:
    monkeypatch.setattr(interpret, "two_back_score", score, raising=False)


def fitted_on_all(activations_NF: Tensor, tokens_BT: Tensor) -> Explanation:
    """All windows stand at even places, the odd ones twice at odd places."""
    B, T = tokens_BT.shape
    order_B = torch.stack([torch.arange(B), torch.arange(1, B, 2).repeat_interleave(2)], dim=1).flatten()
    return two_back_score(activations_NF.view(B, T - 1, -1)[order_B].flatten(0, 1), tokens_BT[order_B])


def three_back(activations_NF: Tensor, tokens_BT: Tensor) -> Explanation:
    """Off by one: the token three back, and the one before."""
    return interpret.explanation_score(activations_NF, tokens_BT * 100 + F.pad(tokens_BT, (3, 0), value=0)[:, :-3])


WRONG = {
    "explanation_score again": lambda patch: install(patch, interpret.explanation_score),
    "fitted on all windows": lambda patch: install(patch, fitted_on_all),
    "one token ahead": lambda patch: install(patch, lambda a_NF, tokens_BT: two_back_score(a_NF, tokens_BT.roll(-1, 1))),
    "three back": lambda patch: install(patch, three_back),
    "threes as good as ignored": lambda patch: install(patch, lambda a_NF, tokens_BT: two_back_score(a_NF, tokens_BT, strength=1e4)),
    "silent columns are 0": lambda patch: install(patch, lambda *given: Explanation(*(score.nan_to_num(0) for score in two_back_score(*given)))),
}
