"""Assignment 2: REINFORCE leave-one-out in place of GAE. File: ppo.py. About 20 lines.

GAE needs a critic. Where each prompt gets several responses, as here (`samples_per_prompt`), the other responses can tell what was to be expected
(Kool et al. 2019; Ahmadian et al. 2024, "Back to Basics", arXiv:2402.14740). With G_b the sum of response b's rewards, KL penalties and score alike,
and k responses to its prompt, *all* tokens of the response get the advantage

    A_b = G_b − 1/(k−1) Σ_{j ≠ b} G_j        j: the other responses to the same prompt

1. Write `rloo(rewards_BR, mask_BR, samples_per_prompt) -> (advantages_BR, returns_BR)`, both 0 outside the mask; returns_BR (for the critic, to
   which nothing listens any more) is G_b on each token. The responses to one prompt are consecutive rows.
2. Give PPOConfig a field `advantage: str = "gae"`; "rloo" makes train_ppo use the new function. It must refuse (UserError) other words, and "rloo"
   with fewer than 2 samples_per_prompt. `--rlhf-advantage rloo` then works.

Hints: rewards_BR.view(-1, k, R); the sum over the others is the sum over all minus one's own. To go on: the embedded task with both, a seed or three.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import policies
import ppo
from assignments import need
from bench import NoRun
from conftest import Characters, random_model
from files import UserError

R = 4


def wanted() -> None:
    need(hasattr(ppo, "rloo"), "ppo.py has no function rloo yet")
    need("advantage" in ppo.PPOConfig.__dataclass_fields__, "PPOConfig has no field advantage yet")


def ragged(k: int) -> SimpleNamespace:
    """Rewards of three prompts' k responses of different length, with numbers beyond their ends that must not matter."""
    generator = np.random.default_rng(0)
    length_B = generator.integers(1, R + 1, size=3 * k)
    return SimpleNamespace(rewards=generator.normal(size=(3 * k, R)), mask=(np.arange(R) < length_B[:, None]).astype(float))


def by_hand(rewards: np.ndarray, mask: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """-> advantages and returns, episode by episode."""
    total = [sum(rewards[b, t] for t in range(R) if mask[b, t]) for b in range(len(rewards))]
    advantages, returns = np.zeros_like(rewards), np.zeros_like(rewards)
    for b in range(len(rewards)):
        first = b - b % k
        others = [total[j] for j in range(first, first + k) if j != b]
        advantages[b], returns[b] = (total[b] - sum(others) / len(others)) * mask[b], total[b] * mask[b]
    return advantages, returns


def test_rloo_equals_a_loop_over_episodes():
    wanted()
    for k in (2, 3, 5):
        episodes = ragged(k)
        got = ppo.rloo(torch.from_numpy(episodes.rewards), torch.from_numpy(episodes.mask), k)
        for name, value, want in zip(("advantages_BR", "returns_BR"), got, by_hand(episodes.rewards, episodes.mask, k)):
            assert (value.numpy()[episodes.mask == 0] == 0).all(), f"{name} must be 0 outside the mask"
            np.testing.assert_allclose(value, want, atol=1e-12, err_msg=f"{name}, {k} responses a prompt, consecutive rows")


def test_the_baseline_does_not_look_at_its_own_episode():
    wanted()
    rewards_BR, mask_BR = torch.zeros(6, R), torch.ones(6, R)
    rewards_BR[1, 2] = 3.0                                           # one reward, in the first prompt's second response of three
    advantages_BR, _ = ppo.rloo(rewards_BR, mask_BR, 3)
    want_B = torch.tensor([-1.5, 3.0, -1.5, 0, 0, 0])
    torch.testing.assert_close(advantages_BR, want_B[:, None].expand(6, R), msg=lambda text: (
        f"{text}\nA reward of 3 raises its own response's advantage by all of 3 (its baseline holds only the others, or the gradient would shrink), "
        f"lowers that of its two siblings by 3/2 each, and leaves the other prompt alone; got, by row:\n{advantages_BR}"))


def train(score_fn, **changes) -> tuple[policies.EditPolicy, list[dict]]:
    """-> a steering vector after PPO with this reward on a random model, and the lines of the log."""
    cfg = ppo.PPOConfig(**{"advantage": "rloo", "iterations": 2, "episodes": 32, "samples_per_prompt": 2, "response_tokens": R, "minibatches": 1,
                           "micro_batch": 256, "kl_coef": 0.0, **changes})
    model, run = random_model(), NoRun()
    policy = policies.make_policy("steer", model, [2], {}, cfg)
    prompts = ppo.Prompts(["1", "2 + 3", "17 - 4 +", "0", "42 = 6 * 7"], Characters(), R, 64, model.device)
    return ppo.train_ppo(policy, prompts, score_fn, cfg, run, torch.Generator().manual_seed(0)), run.lines


def test_train_ppo_learns_nothing_from_a_reward_of_the_prompt_alone():
    """The siblings got the same, so every advantage is exactly 0. To GAE with a critic that knows nothing yet it looks like news."""
    wanted()

    def by_prompt(tokens_BT, mask_BT):
        return (tokens_BT * mask_BT)[:, :-R].sum(1).float()

    assert train(by_prompt, advantage="gae")[0].n_changed() > 0, 'advantage="gae" must go on doing what it did'
    assert train(by_prompt)[0].n_changed() == 0, 'with advantage="rloo" train_ppo moved the policy: does it use rloo, with cfg.samples_per_prompt?'


def test_train_ppo_learns_from_a_reward_of_the_response():
    wanted()

    def count(tokens_BT, mask_BT):                                   # how many tokens of the response are in the upper half of the vocabulary
        return ((tokens_BT >= 32) * mask_BT)[:, -R:].sum(1).float()

    scores = [line["score"] for line in train(count, iterations=7, episodes=128, lr=1.0)[1]]
    assert scores[-1] > scores[0] + 0.7, f"the mean score should rise by 1 or more: {scores}"


def test_config_refuses_what_cannot_be_done():
    wanted()
    refused = ({"advantage": "nonsense"}, "an unknown word"), ({"advantage": "rloo", "samples_per_prompt": 1}, "a response without siblings")
    for words, why in refused:
        try:
            ppo.PPOConfig(**words)
        except UserError:
            continue
        pytest.fail(f"PPOConfig({words}) must raise a UserError: {why}", pytrace=False)
    ppo.PPOConfig(samples_per_prompt=1)                              # GAE needs no siblings
