"""REINFORCE leave-one-out."""

from dataclasses import dataclass

import pytest

import ppo
from ppo import Tensor
from files import UserError


def rloo(rewards_BR: Tensor, mask_BR: Tensor, samples_per_prompt: int) -> tuple[Tensor, Tensor]:
    """REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740) -> (advantages_BR, returns_BR), 0 outside the mask.

    On every token G_b − mean of the other G_j of the same prompt, and G_b, the sum of the response's rewards.
    """
    total_PK = (rewards_BR * mask_BR).sum(1).view(-1, samples_per_prompt)                  # P prompts, K responses to each
    others_PK = (total_PK.sum(1, keepdim=True) - total_PK) / (samples_per_prompt - 1)
    return (total_PK - others_PK).view(-1, 1) * mask_BR, total_PK.view(-1, 1) * mask_BR


@dataclass(frozen=True)
class PPOConfig(ppo.PPOConfig):
    """In ppo.py: one more field, and these lines at the end of its __post_init__."""

    advantage: str = "gae"               # gae, or rloo: the other responses to the same prompt in place of a critic

    def __post_init__(self):
        super().__post_init__()
        if self.advantage not in ("gae", "rloo"):
            raise UserError(f"--rlhf-advantage {self.advantage}: choose from gae, rloo")
        if self.advantage == "rloo" and self.samples_per_prompt < 2:
            raise UserError("--rlhf-advantage rloo needs 2 or more --rlhf-samples-per-prompt")


def install(monkeypatch, rloo=rloo, config=PPOConfig, wired=True) -> None:
    """In ppo.py: `if cfg.advantage == "rloo"` around the line of train_ppo that calls gae."""
    original = ppo.train_ppo

    def train_ppo(policy, prompts, score_fn, cfg, *rest):
        with pytest.MonkeyPatch.context() as patch:
            if wired and cfg.advantage == "rloo":
                patch.setattr(ppo, "gae", lambda rewards_BR, values_BR, mask_BR, gamma, lam: rloo(rewards_BR, mask_BR, cfg.samples_per_prompt))
            return original(policy, prompts, score_fn, cfg, *rest)

    monkeypatch.setattr(ppo, "rloo", rloo, raising=False)
    monkeypatch.setattr(ppo, "PPOConfig", config)
    monkeypatch.setattr(ppo, "train_ppo", train_ppo)


def mean_of_all(rewards_BR: Tensor, mask_BR: Tensor, k: int) -> tuple[Tensor, Tensor]:
    total_PK = (rewards_BR * mask_BR).sum(1).view(-1, k)
    return (total_PK - total_PK.mean(1, keepdim=True)).view(-1, 1) * mask_BR, total_PK.view(-1, 1) * mask_BR


def every_kth_row(rewards_BR: Tensor, mask_BR: Tensor, k: int) -> tuple[Tensor, Tensor]:
    total_KP = (rewards_BR * mask_BR).sum(1).view(k, -1)
    return (total_KP - (total_KP.sum(0) - total_KP) / (k - 1)).view(-1, 1) * mask_BR, total_KP.view(-1, 1) * mask_BR


def beyond_the_end(rewards_BR: Tensor, mask_BR: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return rloo(rewards_BR, mask_BR.new_ones(()).expand_as(mask_BR), k)


@dataclass(frozen=True)
class Unchecked(ppo.PPOConfig):
    advantage: str = "gae"


WRONG = {
    "the baseline holds one's own episode": lambda patch: install(patch, mean_of_all),
    "siblings sought in every kth row": lambda patch: install(patch, every_kth_row),
    "what follows the end of the response counts": lambda patch: install(patch, beyond_the_end),
    "train_ppo still uses GAE": lambda patch: install(patch, wired=False),
    "always leave-one-out": lambda patch: (install(patch), patch.setattr(
        ppo, "gae", lambda rewards_BR, values_BR, mask_BR, gamma, lam: rloo(rewards_BR, mask_BR, 2))),
    "options unchecked": lambda patch: install(patch, config=Unchecked),
    "the sign": lambda patch: install(patch, lambda *given: tuple(-value for value in rloo(*given))),
}
