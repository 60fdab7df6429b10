"""Assignment 3: a steering vector that a feature switches on. File: policies.py. About 20 lines.

`Steer` adds one vector on every token, and `FeatureScale` scales each feature's own vector. Between them lies conditional steering (compare Lee et
al. 2024, "Programming Refusal with Conditional Activation Steering", arXiv:2409.05907): one feature i says *when*, and how much; a learned vector v
says *what*.

    m' = m + f_i(m) v        v = 0 at the start

Where feature i is silent nothing changes at all. With v = (c − 1) d_i it is `FeatureScale` with a coefficient c for feature i alone.

Write the class `GatedSteer(sae, feature)` beside `Steer`, an `Edit` like it, with encode(mlp_BTD, neurons_BTM) -> what `change` needs to know of the
tokens and does *not* depend on v (PPO keeps it for a whole rollout and takes rows of it), and change(what encode gave) -> change_BTD. `EditPolicy(model, {layer: GatedSteer(sae, i)})` must train it, v being all that learns.

Hints: read `FeatureScale` first, for the SAE's dtype, too; a tensor of shape (B, T, 1) is something that `ppo.select` and `ppo.join` can take apart. To go
on: a name in POLICIES and a line in make_policy (and NEED_SAE, so that SAEs are loaded), the feature from the config; a vector for each of some features.
"""

import numpy as np
import pytest
import torch

import policies
import ppo
from assignments import need
from conftest import random_model, random_tokens
from pythia import pad
from sae import SAE

LAYER, R, F64 = 1, 5, torch.float64


def wanted() -> None:
    need(hasattr(policies, "GatedSteer"), "policies.py has no class GatedSteer yet")


def planted(dtype=F64) -> tuple:
    """-> a random model, its SAE, and the number of a feature that fires on a third of the tokens or so."""
    model = random_model(dtype)
    sae = SAE(model.cfg.hidden_size, 96, torch.Generator().manual_seed(0))
    sae.b_enc_F.data -= 3
    sae.b_dec_D.data += 0.3
    sae = sae.to(F64 if dtype == F64 else torch.float32)
    rate_F = (sae.encode(model.mlp_output(random_tokens(8, 16), LAYER).to(sae.W_dec_FD.dtype)) > 0).float().mean((0, 1))
    return model, sae, int((rate_F - 0.33).abs().argmin())


def steered(model, sae: SAE, feature: int, layers=(LAYER,), moved: float = 1.0) -> policies.EditPolicy:
    """-> the policy, its vectors random."""
    wanted()
    policy, generator = policies.EditPolicy(model, {layer: policies.GatedSteer(sae, feature) for layer in layers}), torch.Generator().manual_seed(2)
    for vector_D in policy.trainable().values():
        shape = tuple(vector_D.shape)
        assert shape == (model.cfg.hidden_size,), f"only v should learn; found a trainable parameter of shape {shape}: freeze the SAE"
        vector_D.data += (moved * torch.randn(vector_D.shape, generator=generator)).to(vector_D.dtype)
    assert len(policy.trainable()) == len(layers), f"one vector a layer should learn, not {list(policy.trainable())}"
    return policy


def formula(policy: policies.EditPolicy, sae: SAE, feature: int) -> dict:
    """-> the edits as the task writes them, v being the policy's own."""
    def edit(vector_D):
        def change(mlp_BTD, neurons_BTM):
            f_BT = torch.relu((mlp_BTD - sae.b_dec_D) @ sae.W_enc_DF[:, feature] + sae.b_enc_F[feature])
            return f_BT[..., None] * vector_D
        return change
    return {layer: edit(vector_D) for layer, vector_D in zip(policy.edits, policy.trainable().values())}


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """-> tokens_BT, mask_BT of prompts of different length."""
    return pad([random_tokens(length, seed=length).tolist() for length in (4, 9, 6, 10, 7)], side="left")


def test_nothing_learned_leaves_every_bit_in_any_dtype():
    for dtype in (torch.float32, F64, torch.bfloat16):
        model, sae, feature = planted(dtype)
        policy, (tokens_BT, mask_BT) = steered(model, sae, feature, moved=0.0), padded()
        assert policy.n_changed() == 0, "v must be 0 at the start"
        assert torch.equal(model(tokens_BT, mask_BT, policy.edits), model(tokens_BT, mask_BT)), f"with v = 0 the logits must keep every bit ({dtype})"


def test_the_change_is_its_formula():
    model, sae, feature = planted()
    policy, mlp_BTD = steered(model, sae, feature), model.mlp_output(random_tokens(3, 12), LAYER)
    edit, want_BTD = policy.edits[LAYER], formula(policy, sae, feature)[LAYER](mlp_BTD, None)
    for name, got_BTD in (("forward(m)", edit(mlp_BTD, None)), ("change(encode(m))", edit.change(edit.encode(mlp_BTD, None)))):
        np.testing.assert_allclose(got_BTD.detach(), want_BTD.detach(), atol=1e-9, err_msg=f"{name} must be f_i(m) v")


def test_along_its_own_direction_it_is_a_coefficient():
    model, sae, feature = planted()
    policy, mlp_BTD, c = steered(model, sae, feature), model.mlp_output(random_tokens(3, 12), LAYER), -0.7
    (vector_D,), scale = policy.trainable().values(), policies.FeatureScale(sae)
    vector_D.data = (c - 1) * sae.W_dec_FD[feature].detach()
    scale.coef_F.data[feature] = c
    np.testing.assert_allclose(policy.edits[LAYER](mlp_BTD, None).detach(), scale(mlp_BTD, None).detach(), atol=1e-9,
                               err_msg="v = (c − 1) d_i must do what FeatureScale does with c for feature i alone")


def test_nothing_changes_before_the_feature_fires():
    model, sae, feature = planted()
    policy, tokens_BT = steered(model, sae, feature), random_tokens(16, 12)
    fires_BT = sae.encode(model.mlp_output(tokens_BT, LAYER))[..., feature] > 0
    silent_BT = fires_BT.cumsum(1) == 0
    assert silent_BT.any() and fires_BT.any()
    same_BT = (model(tokens_BT, edits=policy.edits) == model(tokens_BT)).all(-1)
    assert same_BT[silent_BT].all(), "logits changed on tokens before the feature's first activation: v is added where the feature is silent"
    assert not same_BT[fires_BT].any(), "logits are the same on tokens where the feature fires"


def test_ppo_sees_the_same_policy_cached_and_whole():
    """A rollout's logprobs go through encode, micro-batches and `change`; the sampler goes through forward. Both must be the formula."""
    model, sae, feature = planted()
    cfg = ppo.PPOConfig(episodes=4, samples_per_prompt=1, response_tokens=R, micro_batch=2)
    for layers in ((LAYER,), (0, 2)):
        policy = steered(model, sae, feature, layers)
        rollout = ppo.collect_rollouts(policy, *padded(), 0, cfg, torch.Generator().manual_seed(0))
        logits_BRV = model(rollout.tokens_BT, rollout.mask_BT, formula(policy, sae, feature))[:, -R - 1:-1]
        want_BR = logits_BRV.log_softmax(-1).gather(-1, rollout.tokens_BT[:, -R:, None]).squeeze(-1).detach()
        np.testing.assert_allclose(rollout.logprobs_BR * rollout.mask_BR, want_BR * rollout.mask_BR, atol=1e-8,
                                   err_msg=f"logprobs of a rollout, edits at layers {layers}, two episodes a micro-batch")


def test_the_gradient_of_v_equals_finite_differences():
    model, sae, feature = planted()
    policy, (tokens_BT, mask_BT) = steered(model, sae, feature), padded()
    (vector_D,), trunk, edits = policy.trainable().values(), policy.observe(tokens_BT, mask_BT, R), formula(policy, sae, feature)
    vector_D.data += 0.1                                             # `encode` was called before: what it gave serves many steps of v
    loss = policy.hidden(tokens_BT, mask_BT, R, trunk).sin().sum()
    assert loss.requires_grad, "no gradient reaches v through change(encode(m))"
    loss.backward()
    for i in (0, 7, 31):
        ends = []
        for step in (1e-6, -1e-6):
            vector_D.data[i] += step
            ends.append(model.hidden(tokens_BT, mask_BT, edits)[:, -R - 1:-1].sin().sum().item())
            vector_D.data[i] -= step
        assert vector_D.grad[i].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4), f"gradient of v[{i}], v having moved since `encode`"
