"""ppo.py, policies.py and the gains of compare.py against plain loops in numpy, against the dense formula of the edit, and at c = 1 against the model without an edit."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from compare import gain_at_kl, gains_at_kls
from conftest import Characters, complaint, killed_and_resumed, random_model, random_tokens
from files import UserError
from policies import FeatureScale, Trunk, make_policy
from ppo import (AdaptiveKL, Critic, Evaluation, PPOConfig, Prompts, Rollout, Standardize, collect_rollouts, episode_gradients, forward_selection,
                 gae, join, keep_few, kl_rewards, make_rollout, next_logprobs, pick, ppo_loss, respond, score, select, train_ppo, update_policy,
                 whiten)
from pythia import pad
from run import Run
from sae import SAE

R, F32, F64, CPU = 5, torch.float32, torch.float64, torch.device("cpu")
CFG = PPOConfig(iterations=4, episodes=32, samples_per_prompt=2, response_tokens=R, epochs=2, minibatches=2, micro_batch=8,
                eval_samples=4, temperature=0.8, checkpoint_seconds=0)
TEXTS = ["1", "2 + 3", "17 - 4 +", "0", "42 = 6 * 7"]
one_layer_or_more = pytest.mark.parametrize("layers", [(1,), (0, 2, 3)], ids=str)
every_policy = pytest.mark.parametrize("name", ["coef", "neurons", "steer", "full", "lora"])


def random_sae(model, seed: int) -> SAE:
    """An SAE with few active features, none at all on some tokens."""
    sae = SAE(model.cfg.hidden_size, 96, torch.Generator().manual_seed(seed)).to(F64 if model.dtype == F64 else F32)
    sae.b_enc_F.data -= 5
    sae.b_dec_D.data += 0.3
    return sae


def random_policy(name, model, layers=(2,), edit="scale", moved=True, keep=0):
    """A policy whose learned parameters are random, or still at their start."""
    saes, generator = {layer: random_sae(model, layer) for layer in layers}, torch.Generator()
    policy = make_policy(name, model, layers, saes, replace(CFG, keep=keep), edit)
    for parameter in policy.trainable().values():
        parameter.data += moved * (0.02 if name in ("full", "lora") else 0.5) * torch.randn(parameter.shape, generator=generator)
    return policy


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """-> tokens_BT, mask_BT of five rows of different length, left-padded; the responses' ends are masked out raggedly."""
    tokens_BT, mask_BT = pad([random_tokens(length, seed=length).tolist() for length in (6, 11, 8, 12, 9)], side="left")
    mask_BT[:, -R:] = torch.arange(R) < torch.tensor([[5], [1], [3], [5], [2]])
    return tokens_BT, mask_BT


def prompts(texts=TEXTS) -> Prompts:
    return Prompts(texts, Characters(), R, 64, CPU)


def dense(edit: FeatureScale, mlp_BTD, neurons_BTM=None):
    """The edit's formula as it is written in its docstring, no shortcut."""
    sae = edit.sae
    features_BTF = torch.relu((mlp_BTD - sae.b_dec_D) @ sae.W_enc_DF + sae.b_enc_F)
    return ((edit.coef_F - 1) * features_BTF + (0 if edit.bias_F is None else edit.bias_F)) @ sae.W_dec_FD


def ragged() -> SimpleNamespace:
    """Random float64 numbers of six responses of different length."""
    generator, length_B = np.random.default_rng(0), np.array([R, 1, 3, 2, R, 4])
    names = ("logprobs", "old", "ref", "rewards", "values", "old_values", "advantages", "returns")
    mask = (np.arange(R) < length_B[:, None]).astype(float)
    return SimpleNamespace(mask=mask, length=length_B, scores=generator.normal(size=6),
                           **{name: generator.normal(size=(6, R)) * 0.3 for name in names})


def tensors(*arrays):
    return [torch.from_numpy(array) for array in arrays]


def sevens(tokens_BT, mask_BT):
    """A planted reward: how many of a response's tokens are '7'."""
    return ((tokens_BT == ord("7")) * mask_BT)[:, -R:].sum(1).float()


class Sevens:
    """The same, and it can tell the scores of a response's beginnings."""
    __call__ = staticmethod(sevens)

    def prefixes(self, tokens_BT, mask_BT, R):
        hits_BR = ((tokens_BT == ord("7")) * mask_BT)[:, -R:]
        return torch.cat([torch.zeros(len(hits_BR), 1), hits_BR.cumsum(1)], dim=1)


# ------------------------------------------------------------------------------------------------------------------ the edit

@one_layer_or_more
@pytest.mark.parametrize("edit", ["scale", "scale+bias"])
@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16], ids=str)
def test_nothing_learned_leaves_every_bit(dtype, edit, layers):
    model, (tokens_BT, mask_BT) = random_model(dtype), padded()
    policy = random_policy("coef", model, layers, edit, moved=False)
    for mask in (None, mask_BT):
        assert torch.equal(model(tokens_BT, mask, policy.edits), model(tokens_BT, mask))
    mask_BT[:, -R:] = 1
    samples = [model.generate(tokens_BT, 8, mask_BT, 1.0, edits, torch.Generator().manual_seed(3))
               for edits in (None, policy.edits)]
    assert torch.equal(*samples) and policy.n_changed() == 0
    for parameter in policy.trainable().values():                # and the edit is not idle
        parameter.data += 1
    assert not torch.equal(model(tokens_BT, mask_BT, policy.edits), model(tokens_BT, mask_BT))
    assert policy.n_changed() == 96 * len(layers) * (2 if edit == "scale+bias" else 1)


@pytest.mark.parametrize("name", ["coef", "random", "neurons", "steer", "lora", "full"])
def test_part_of_the_way(name):
    model, (tokens_BT, mask_BT) = random_model(F64), padded()
    policy = random_policy(name, model, edit="scale+bias" if name == "coef" else "scale")
    now = {n: p.clone() for n, p in policy.state_dict().items()}
    start = random_policy(name, model, edit="scale+bias" if name == "coef" else "scale", moved=False).state_dict()
    half, moved = policy.part_way(0.5), [n for n in now if not n.endswith("A_DK")]                    # A of LoRA means nothing without B
    assert moved and all(torch.allclose(half[n], (start[n] + now[n]) / 2) and not torch.equal(half[n], now[n]) for n in moved)
    assert all(torch.equal(p, now[n]) for n, p in policy.part_way(1.0).items())
    with policy.holding(policy.part_way(0.0)):
        assert policy.n_changed() == 0
        assert torch.equal(policy.model(tokens_BT, mask_BT, policy.edits), model(tokens_BT, mask_BT))
    assert policy.n_changed() == sum(now[n].numel() for n in moved)
    assert all(torch.equal(p, now[n]) for n, p in policy.state_dict().items())


@pytest.mark.parametrize("edit", ["scale", "scale+bias"])
def test_sparse_edit_equals_the_dense_formula(edit):
    model, (tokens_BT, _) = random_model(F64), padded()
    scale, mlp_BTD = random_policy("coef", model, (1,), edit).edits[1], model.mlp_output(tokens_BT, 1)
    count_BT = (scale.sae.encode(mlp_BTD) > 0).sum(-1)
    assert count_BT.min() == 0 and count_BT.max() > 3
    weights_BTD, learned = torch.randn(mlp_BTD.shape, dtype=F64), [p for p in scale.parameters() if p.requires_grad]
    results = [(change, torch.autograd.grad((change * weights_BTD).sum(), learned))
               for change in (scale(mlp_BTD, None), dense(scale, mlp_BTD))]
    torch.testing.assert_close(*results, atol=1e-10, rtol=0)
    nothing_BTD = scale(scale.sae.b_dec_D.expand(2, 3, -1), None)       # no feature active on any token
    torch.testing.assert_close(nothing_BTD, dense(scale, scale.sae.b_dec_D.expand(2, 3, -1)), atol=1e-10, rtol=0)


@pytest.mark.parametrize("layers", [(0,), (1, 3)], ids=str)
def test_gradient_through_the_model_equals_finite_differences(layers):
    model, (tokens_BT, mask_BT) = random_model(F64), padded()
    policy = random_policy("coef", model, layers, "scale+bias")
    weights_BTV = torch.randn(*tokens_BT.shape, model.cfg.vocab_size, generator=torch.Generator().manual_seed(0), dtype=F64) / 100

    def loss():
        return (model(tokens_BT, mask_BT, policy.edits).log_softmax(-1) * weights_BTV)[mask_BT == 1].sum()

    loss().backward()
    for parameter in policy.trainable().values():
        for i in parameter.grad.abs().topk(3).indices.tolist():
            estimates = []
            for step in (1e-6, -1e-6):
                parameter.data[i] += step
                estimates.append(loss().item() / 2e-6)
                parameter.data[i] -= step
            assert parameter.grad[i].item() == pytest.approx(estimates[0] - estimates[1], rel=1e-5)


@one_layer_or_more
@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
def test_cached_trunk_equals_the_whole_model_bit_for_bit(parallel, layers):
    model, (tokens_BT, mask_BT) = random_model(F64, parallel_residual=parallel), padded()
    policy = random_policy("coef", model, layers, "scale+bias")
    trunk = policy.observe(tokens_BT, mask_BT, R)
    assert torch.equal(trunk.ref_hidden_BRD, model.hidden(tokens_BT[:, :-1], mask_BT[:, :-1], last=R))
    hidden = [policy.hidden(tokens_BT, mask_BT, R, trunk), model.hidden(tokens_BT[:, :-1], mask_BT[:, :-1], policy.edits, last=R)]
    assert torch.equal(*hidden)
    gradients = [torch.autograd.grad(h.square().sum(), list(policy.trainable().values())) for h in hidden]
    assert all(map(torch.equal, *gradients)) and all(gradient.abs().max() > 0 for gradient in gradients[0])
    plain = {layer: lambda m, n, e=e: dense(e, m) for layer, e in policy.edits.items()}
    torch.testing.assert_close(hidden[0], model.hidden(tokens_BT, mask_BT, plain)[:, -R - 1:-1], atol=1e-9, rtol=0)


@pytest.mark.parametrize("name, formula", [
    ("neurons", lambda edit, mlp, m, n: ((edit.coef_M - 1) * n) @ mlp.dense_4h_to_h.weight.T), ("steer", lambda edit, mlp, m, n: edit.vector_D)])
def test_controls_are_their_formulas_cached_or_not(name, formula):
    model, (tokens_BT, mask_BT) = random_model(F64), padded()
    policy = random_policy(name, model, (0, 2))
    trunk = policy.observe(tokens_BT, mask_BT, R)
    hidden_BRD = policy.hidden(tokens_BT, mask_BT, R, trunk)
    plain = {layer: lambda m, n, e=e, b=model.gpt_neox.layers[layer].mlp: formula(e, b, m, n).double() for layer, e in policy.edits.items()}
    torch.testing.assert_close(hidden_BRD, model.hidden(tokens_BT, mask_BT, plain)[:, -R - 1:-1], atol=1e-9, rtol=0)
    torch.testing.assert_close(hidden_BRD, model.hidden(tokens_BT, mask_BT, policy.edits)[:, -R - 1:-1], atol=1e-9, rtol=0)
    assert (hidden_BRD - trunk.ref_hidden_BRD).abs().max() > 0.1
    gradients = torch.autograd.grad(hidden_BRD.square().sum(), list(policy.trainable().values()))
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("layers", [[2], [1, 2]])
def test_gradients_of_episodes_equal_autograds(layers):
    """Each episode's gradient by each number, from one backward pass, against a backward pass for each episode."""
    model = random_model(F64)
    policy = random_policy("coef", model, layers, "scale+bias", moved=False, keep=3)
    rollout = make_rollout(policy, *padded(), CFG)
    found = episode_gradients(policy, rollout, CFG)
    for b in range(5):
        batch = select(rollout, slice(b, b + 1))
        logp_BRV = next_logprobs(model, policy.hidden(batch.tokens_BT, batch.mask_BT, R, batch.trunk), CFG.temperature)
        wanted = torch.autograd.grad((pick(logp_BRV, batch.tokens_BT[:, -R:]) * batch.mask_BR).sum(), list(policy.trainable().values()))
        for name, gradient in zip(policy.trainable(), wanted):
            assert gradient.abs().max() > 1e-4 or "coef" in name
            torch.testing.assert_close(found[name][b].double(), gradient, atol=1e-6, rtol=1e-5)


def test_forward_selection_takes_what_adds_and_nothing_twice():
    """5 is wanted most, 8 is a copy of 7, 9 is large and means nothing; the steps are those of the linear system."""
    generator = torch.Generator().manual_seed(0)
    grad_NK = torch.randn(4000, 12, generator=generator, dtype=F64)
    grad_NK[:, 8] = grad_NK[:, 7]
    grad_NK[:, 9] *= 100
    wanted_N = grad_NK[:, 5] + 0.6 * grad_NK[:, 7] + 0.3 * grad_NK[:, 2] + torch.randn(4000, generator=generator)
    target_K = grad_NK.T @ wanted_N / 4000
    chosen, step_C = forward_selection(grad_NK, target_K, 3, ridge=0.0)
    assert chosen[0] == 5 and chosen[1] in (7, 8) and chosen[2] == 2
    torch.testing.assert_close(step_C, torch.linalg.lstsq(grad_NK[:, chosen], wanted_N).solution)
    torch.testing.assert_close(step_C, torch.tensor([1.0, 0.6, 0.3], dtype=F64), atol=0.05, rtol=0)
    assert sorted(forward_selection(grad_NK, target_K, 99)[0].tolist()) == list(range(12))


@pytest.mark.parametrize("layers", [[2], [1, 2]])
def test_keep_few_keeps_what_moved(layers):
    """Three numbers moved far and all others a little: the three are kept, with about their values, the others are put back exactly."""
    policy, generator = random_policy("coef", random_model(), layers, "scale+bias", moved=False, keep=3), torch.Generator().manual_seed(0)
    numbers, start = policy.state_dict(), {name: p.clone() for name, p in policy.state_dict().items()}
    planted = [(f"{layers[0]}.bias_F", 5, 0.5), (f"{layers[-1]}.bias_F", 40, -0.4), (f"{layers[-1]}.bias_F", 7, 0.6)]
    for name, i, size in planted:
        numbers[name][i] += size
    for p in numbers.values():
        p += 1e-4 * torch.randn(p.shape, generator=generator)
    kept = keep_few(policy, prompts(), replace(CFG, keep=3, keep_rollouts=8), generator)
    assert {(name, i) for name, mask in kept.items() for i in mask.nonzero().flatten().tolist()} == {(name, i) for name, i, _ in planted}
    for name, i, size in planted:
        assert abs(numbers[name][i].item() - size) < 0.05
        numbers[name][i] = start[name][i]
    assert all(torch.equal(p, start[name]) for name, p in numbers.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])           # of the model; what is learned is float32
def test_keep_leaves_all_others_exactly_where_they_were(tmp_path, dtype):
    policy, run = random_policy("coef", random_model(dtype), (1, 2), "scale+bias", moved=False, keep=5), Run(tmp_path, {}, resume=False)
    train_ppo(policy, prompts(), lambda tokens_BT, mask_BT: (tokens_BT % 2.0).mean(1), replace(CFG, keep=5, keep_rollouts=2), run, torch.Generator().manual_seed(0))
    changed = [row["n_changed"] for row in run.rows()]
    assert 1 <= policy.n_changed() <= 5 and changed[3] <= 5 < changed[2]                 # one that was chosen may be silent from then on
    assert changed[:3] == [2 * 32] * 3               # at first a vector at each layer, nothing else
    assert {name[1:] for name in policy.trainable()} == {".coef_F", ".bias_F"}
    with pytest.raises(UserError, match="--rlhf-keep"):
        make_policy("steer", random_model(), [2], {}, replace(CFG, keep=5))
    with pytest.raises(UserError, match="--rlhf-iterations"):
        replace(CFG, keep=5, iterations=1)


@pytest.mark.parametrize("keep", [5, 32])                        # 32: as many as the vector has numbers
def test_keep_where_training_diverges_before_the_choice(tmp_path, keep):
    policy, run = random_policy("coef", random_model(), (2,), "scale+bias", moved=False, keep=keep), Run(tmp_path, {}, resume=False)
    cfg = replace(CFG, keep=keep, keep_rollouts=2, kl_stop=1e-3, lr=5.0)
    train_ppo(policy, prompts(), lambda tokens_BT, mask_BT: (tokens_BT % 2.0).mean(1), cfg, run, torch.Generator().manual_seed(0))
    assert "diverged" in run.rows()[-1] and len(run.rows()) < 4 and 1 <= policy.n_changed() <= keep


# ----------------------------------------------------------------------------------------------------------------- rollouts

@every_policy
def test_first_ratio_is_exactly_one(name):
    model, generator = random_model(), torch.Generator().manual_seed(0)
    policy, critic = random_policy(name, model, (1, 3)), Critic(32, R, model.device)
    rollout = collect_rollouts(policy, *prompts().draw(32, 1, generator), 0, CFG, generator)
    rollout = score(rollout, sevens, Standardize(0.0, 1.0), critic, CFG)
    assert (rollout.logprobs_BR != rollout.ref_logprobs_BR).all() and rollout.mean_kl > 0
    for start in range(0, 32, CFG.micro_batch):
        batch = select(rollout, slice(start, start + CFG.micro_batch))
        hidden_BRD = policy.hidden(batch.tokens_BT, batch.mask_BT, R, batch.trunk)
        logprobs_BR = pick(next_logprobs(policy.model, hidden_BRD, CFG.temperature), batch.tokens_BT[:, -R:])
        assert logprobs_BR.requires_grad and torch.equal(logprobs_BR, batch.logprobs_BR)
        losses = ppo_loss(logprobs_BR, batch.values_BR, batch, torch.ones(CFG.micro_batch, R), batch.values_BR, CFG)
        assert losses.ratio == 1 and losses.approx_kl == losses.clipfrac == 0


@every_policy
def test_what_sampling_has_seen_is_not_computed_again(name, monkeypatch):
    """Prompts of different lengths, sampled in two parts: the same rollout as from the tokens alone, without a pass through the trunk."""
    policy, cfg = random_policy(name, random_model(F64), (1, 3)), replace(CFG, generate_batch=10, micro_batch=4)
    drawn = prompts().draw(20, 1, torch.Generator().manual_seed(0))
    monkeypatch.setattr(policy.model, "trunk", None)
    rollout = collect_rollouts(policy, *drawn, 0, cfg, torch.Generator().manual_seed(0))
    monkeypatch.undo()
    assert rollout.mask_BT[:, 0].min() == 0 and rollout.mask_BR.min() == 0
    anew = join([make_rollout(policy, rollout.tokens_BT[rows], rollout.mask_BT[rows], cfg) for rows in torch.arange(20).split(4)])
    for what in ("logprobs_BR", "ref_logprobs_BR", "kl_BR", "entropy_BR"):
        seen_BR, anew_BR = (getattr(each, what) * rollout.mask_BR for each in (rollout, anew))
        torch.testing.assert_close(seen_BR, anew_BR, atol=1e-7, rtol=0)             # adapters and SAEs are float32


@every_policy
def test_logprobs_kl_and_entropy_equal_numpy(name):
    model, (tokens_BT, mask_BT) = random_model(F64), padded()
    policy = random_policy(name, model, (0, 2))
    rollout = make_rollout(policy, tokens_BT, mask_BT, CFG)
    logits = [m(tokens_BT, mask_BT, edits).detach().numpy() / CFG.temperature
              for m, edits in ((policy.model, policy.edits), (policy.reference, None))]
    for b, row in enumerate(tokens_BT.tolist()):
        for r in range(R):
            p, q = (np.exp(logits_BTV[b, -R + r - 1] - logits_BTV[b, -R + r - 1].max()) for logits_BTV in logits)
            p, q, token, keep = p / p.sum(), q / q.sum(), row[-R + r], mask_BT[b, -R + r].item()
            want = (np.log(p[token]), np.log(q[token]), keep * (p * np.log(p / q)).sum(), -keep * (p * np.log(p)).sum())
            got = (rollout.logprobs_BR, rollout.ref_logprobs_BR, rollout.kl_BR, rollout.entropy_BR)
            assert [x[b, r].item() for x in got] == pytest.approx(want, abs=1e-6)
    assert rollout.mean_kl == pytest.approx(rollout.kl_BR.numpy().sum() / 5)


def test_expected_k1_is_the_exact_kl():
    """Over all possible next tokens, the sampled estimate logπ − logπref has the exact KL as its mean."""
    policy, V = random_policy("coef", random_model(F64)), 64
    tokens_BT = torch.cat([random_tokens(1, 6).expand(V, -1), torch.arange(V)[:, None]], dim=1)
    rollout = make_rollout(policy, tokens_BT, torch.ones_like(tokens_BT), PPOConfig(response_tokens=1))
    k1_B = -kl_rewards(rollout.logprobs_BR, rollout.ref_logprobs_BR, torch.zeros(V), rollout.mask_BR, 1.0)[:, 0]
    assert rollout.logprobs_BR.exp().sum().item() == pytest.approx(1)
    assert (rollout.logprobs_BR[:, 0].exp() * k1_B).sum().item() == pytest.approx(rollout.kl_BR[0].item(), abs=1e-9) != 0


def test_responses_end_behind_their_first_end_of_text():
    prompt_BT, prompt_mask_BT = torch.tensor([[0, 0, 5], [0, 6, 5], [0, 0, 5]]), torch.tensor([[0, 1, 1], [1, 1, 1], [0, 1, 1]])
    response_BR = torch.tensor([[9, 0, 9, 0, 9], [9, 9, 9, 9, 9], [0, 9, 9, 9, 9]])
    model = SimpleNamespace(generate=lambda *arguments: torch.cat([prompt_BT, response_BR], dim=1))
    tokens_BT, mask_BT = respond(model, None, prompt_BT, prompt_mask_BT, 0, CFG, None)
    want_BR = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    assert torch.equal(tokens_BT[:, 3:], response_BR) and torch.equal(mask_BT, torch.cat([prompt_mask_BT, want_BR], dim=1))
    rewards_BR = kl_rewards(torch.zeros(3, R), torch.ones(3, R), torch.tensor([10.0, 20.0, 30.0]), want_BR, 0.5)
    assert rewards_BR.tolist() == [[0.5, 10.5, 0, 0, 0], [0.5, 0.5, 0.5, 0.5, 20.5], [30.5, 0, 0, 0, 0]]


@every_policy
def test_select_and_join_are_inverse(name):
    tokens_BT, mask_BT = padded()
    rollout = make_rollout(random_policy(name, random_model(), (1,)), tokens_BT, mask_BT, CFG)
    assert join([select(rollout, slice(0, 2)), select(rollout, slice(2, 5))]).scores_B is None                # not scored yet
    rollout = score(rollout, Sevens(), Standardize(0.5, 2.0), Critic(32, R, tokens_BT.device), CFG)
    back = join([select(rollout, slice(0, 2)), select(rollout, torch.tensor([2, 3])), select(rollout, slice(4, 5))])
    assert type(back) is Rollout and type(back.trunk) is Trunk and (back.trunk.resid_BTD is None) == (name in ("full", "lora"))
    flat = [[*r, *r.trunk] for r in (back, rollout)]
    pairs = [(one, other) for one, other in zip(*flat) if isinstance(one, torch.Tensor)]
    assert len(pairs) == {"coef": 13, "neurons": 13, "steer": 12}.get(name, 11) and all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("score_fn", [sevens, Sevens()], ids=["scores only", "prefixes too"])
def test_score_fills_in_what_the_rollout_lacks(score_fn):
    model, generator = random_model(), torch.Generator().manual_seed(0)
    rollout = collect_rollouts(random_policy("coef", model), *prompts().draw(20, 1, generator), 0, CFG, generator)
    critic = Critic(32, R, CPU)
    for parameter in critic.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator)
    rollout.tokens_BT[::2, -4] = rollout.tokens_BT[::3, -2] = ord("7")
    rollout.mask_BT[4:8, -3:] = rollout.mask_BR[4:8, -3:] = 0
    assert rollout.scores_B is rollout.prefix_scores_BR is rollout.values_BR is None
    rollout = score(rollout, score_fn, Standardize(0.25, 2.0), critic, CFG)               # 20 episodes are no multiple of a micro-batch
    want_B, want_BR = np.zeros(20), np.zeros((20, R))
    for b, (row, mask) in enumerate(zip(rollout.tokens_BT[:, -R:].tolist(), rollout.mask_BR.tolist())):
        hits = [token == ord("7") and keep for token, keep in zip(row, mask)]
        want_B[b] = (sum(hits) - 0.25) / 2.0
        if score_fn is not sevens:
            want_BR[b] = [(sum(hits[:t]) - 0.25) / 2.0 for t in range(R)]
    assert len(set(want_B)) > 2 and not rollout.values_BR.requires_grad
    np.testing.assert_allclose(rollout.scores_B, want_B, atol=1e-6)
    np.testing.assert_allclose(rollout.prefix_scores_BR, want_BR, atol=1e-6)
    assert torch.equal(rollout.values_BR, critic(torch.from_numpy(want_BR).float(), rollout.trunk.ref_hidden_BRD).detach())


def test_critic_starts_at_the_prefix_scores_and_weighs_each_position_alone():
    generator, critic = torch.Generator().manual_seed(0), Critic(8, R, CPU)
    prefix_BR, hidden_BRD = torch.randn(3, R, generator=generator), torch.randn(3, R, 8, generator=generator)
    assert torch.equal(critic(prefix_BR, hidden_BRD), prefix_BR)
    for parameter in critic.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator)
    a_R, w_RD, b_R = (p.detach().numpy() for p in (critic.prefix_R, critic.weight_RD, critic.bias_R))
    want = [[a_R[t] * prefix_BR[b, t].item() + w_RD[t] @ hidden_BRD[b, t].numpy() / 8 ** 0.5 + b_R[t] for t in range(R)] for b in range(3)]
    np.testing.assert_allclose(critic(prefix_BR, hidden_BRD).detach(), want, atol=1e-5)


# -------------------------------------------------------------------------------------------- rewards, advantages and losses

def test_kl_rewards_whitening_and_kl_control_equal_numpy():
    x = ragged()
    want = np.zeros((6, R))
    for b, length in enumerate(x.length):
        for t in range(length):
            want[b, t] = -0.3 * (x.logprobs[b, t] - x.ref[b, t]) + (x.scores[b] if t == length - 1 else 0)
    got = kl_rewards(*tensors(x.logprobs, x.ref, x.scores, x.mask), 0.3)
    np.testing.assert_allclose(got, want, atol=1e-6)
    values = [x.advantages[b, t] for b in range(6) for t in range(x.length[b])]
    white = (x.advantages - np.mean(values)) / np.sqrt(np.var(values) + 1e-8) * x.mask
    np.testing.assert_allclose(whiten(*tensors(x.advantages, x.mask)), white, atol=1e-6)
    kl, coef = AdaptiveKL(0.05, target=6.0, horizon=10.0), 0.05
    for seen in (0.0, 5.9, 6.0, 6.6, 7.3, 600.0):
        kl.update(seen)
        coef *= 1 + np.clip(seen / 6.0 - 1, -0.2, 0.2) / 10
        assert kl.coef == pytest.approx(coef, rel=1e-9)


@pytest.mark.parametrize("gamma, lam", [(0.9, 0.8), (1.0, 0.95), (1.0, 1.0), (0.9, 0.0)])
def test_gae_equals_numpy(gamma, lam):
    x, advantages = ragged(), np.zeros((6, R))
    for b, length in enumerate(x.length):
        delta = [x.rewards[b, t] + gamma * (x.values[b, t + 1] if t + 1 < length else 0) - x.values[b, t] for t in range(length)]
        for t in range(length):
            advantages[b, t] = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
            if lam == gamma == 1:                                # the return is the reward to go, whatever the critic says
                assert advantages[b, t] + x.values[b, t] == pytest.approx(sum(x.rewards[b, t:length]))
            if lam == 0:
                assert advantages[b, t] == delta[t]              # one-step TD error
    got_advantages, got_returns = gae(*tensors(x.rewards, x.values, x.mask), gamma, lam)
    np.testing.assert_allclose(got_advantages, advantages, atol=1e-6)
    np.testing.assert_allclose(got_returns, (advantages + x.values) * x.mask, atol=1e-6)


def test_ppo_loss_equals_numpy():
    x, seen = ragged(), []
    for b, length in enumerate(x.length):
        for t in range(length):
            log_ratio, A, G = x.logprobs[b, t] - x.old[b, t], x.advantages[b, t], x.returns[b, t]
            ratio, V, old = np.exp(log_ratio), x.values[b, t], x.old_values[b, t]
            plain, clipped = -A * ratio, -A * min(max(ratio, 0.8), 1.2)
            error, near = (V - G) ** 2, (old + min(max(V - old, -0.2), 0.2) - G) ** 2
            seen.append((max(plain, clipped), max(error, near) / 2, log_ratio ** 2 / 2, clipped > plain, near > error, ratio))
    policy, value, *others = np.mean(seen, axis=0)
    assert all(0.05 < share < 0.95 for share in (others[1], others[2]))
    logprobs, values, mask, old, old_values, advantages, returns = tensors(x.logprobs, x.values, x.mask, x.old, x.old_values,
                                                                           x.advantages, x.returns)
    batch = Rollout(None, None, mask, None, old, None, None, None, values_BR=old_values)
    losses = ppo_loss(logprobs, values, batch, advantages, returns, PPOConfig(clip=0.2))
    assert [loss.item() for loss in losses] == pytest.approx([policy + value, policy, value, *others], abs=1e-6)


# ----------------------------------------------------------------------------------------------------- the loop, evaluation

def test_prompts_are_left_padded_and_drawn_evenly():
    given = prompts()
    assert given.tokens_BT[1].tolist() == [0] * 5 + [0, *map(ord, "2 + 3")] and given.mask_BT[1].tolist() == [0] * 5 + [1] * 6
    tokens_BT, mask_BT = given.draw(10, 3, torch.Generator().manual_seed(0))
    rows = [given.tokens_BT.tolist().index(row) for row in tokens_BT.tolist()]
    assert rows[::3] == rows[1::3] == rows[2::3] and sorted(rows[:15:3]) == sorted(rows[15::3]) == list(range(5))
    assert torch.equal(mask_BT, given.mask_BT[rows])


@every_policy
def test_evaluation_of_nothing_learned_and_of_something(name):
    model, score_fn = random_model(), lambda tokens_BT, mask_BT: (tokens_BT * mask_BT)[:, -R:].float().mean(1) / 10
    evaluation = Evaluation(model, prompts(), score_fn, CFG, seed=5)
    figures = evaluation(random_policy(name, model, (1, 2), moved=False)).figures
    assert figures["kl"] == figures["kl_se"] == figures["score_gain_std"] == figures["score_gain_std_se"] == 0
    assert figures["reward_loss"] == pytest.approx(math.log(2), abs=1e-6)
    after = evaluation(random_policy(name, model, (1, 2)))
    before, gain = evaluation.reference.scores_B.numpy(), after.scores_B.numpy() - evaluation.reference.scores_B.numpy()
    by_prompt = (gain / before.std(ddof=1)).reshape(5, 4).mean(1)
    want = {"score_ref": before.mean(), "score_policy": after.scores_B.numpy().mean(), "score_gain_std": by_prompt.mean(),
            "score_gain_std_se": by_prompt.std(ddof=1) / 5 ** 0.5, "reward_loss": np.log1p(np.exp(-gain)).mean()}
    assert {key: after.figures[key] for key in want} == pytest.approx(want, rel=1e-4) and after.figures["kl"] > 0
    assert evaluation.gain_by(score_fn, after, "gold")["gold_gain_std"] == after.figures["score_gain_std"] != 0


def test_evaluation_of_a_constant_score_is_finite():
    """A word list that no sample hits: nothing was gained, and a standard deviation of 0 must not make it NaN."""
    model = random_model()
    evaluation = Evaluation(model, prompts(), lambda tokens_BT, mask_BT: torch.zeros(len(tokens_BT)), CFG, seed=5)
    assert evaluation(random_policy("coef", model)).figures["score_gain_std"] == 0


def test_a_score_that_the_reference_never_earns_keeps_its_own_units():
    """A rare word to avoid: divided by a deviation of almost 0, its first hit would outweigh the KL penalty a million times."""
    standardize = Standardize.by_reference(random_policy("coef", random_model()), prompts(), lambda tokens_BT, mask_BT: torch.full((len(tokens_BT),), 3.0),
                                           CFG, torch.Generator().manual_seed(0))
    assert standardize(torch.tensor([3.0, 2.0])).tolist() == [0.0, -1.0]
    evaluation = Evaluation(random_model(), prompts(), lambda tokens_BT, mask_BT: torch.zeros(len(tokens_BT)), CFG, seed=5)
    evaluation.score_fn = lambda tokens_BT, mask_BT: torch.full((len(tokens_BT),), -2.0)
    figures = evaluation(random_policy("coef", random_model())).figures
    assert figures["score_gain_std"] == -2 and figures["score_ref_std"] == 0
    assert evaluation.gain_by(sevens, evaluation.reference, "gold")["gold_gain_std"] == 0


def test_micro_batches_only_save_memory():
    """The gradient of a minibatch is the same in one piece and in many, though responses are of different length."""
    model, generator = random_model(F64), torch.Generator().manual_seed(0)
    policy, critic = random_policy("coef", model), Critic(32, R, model.device).double()
    advantages_BR = torch.randn(32, R, generator=generator, dtype=F64)
    rollout = collect_rollouts(policy, *prompts().draw(32, 1, generator), 0, CFG, generator)
    rollout = score(rollout, Sevens(), Standardize(0.5, 2.0), critic, CFG)
    rollout = rollout._replace(mask_BR=(torch.arange(R) <= torch.arange(32)[:, None] % R).long())
    optimizer, gradients = torch.optim.SGD([policy.trainable()["2.coef_F"], *critic.parameters()], lr=0.0), []
    optimizer.register_step_pre_hook(lambda *_: gradients.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]]))
    for size in (32, 8):
        update_policy(policy, critic, optimizer, {}, rollout, advantages_BR, advantages_BR,
                      replace(CFG, micro_batch=size, minibatches=1, epochs=1), torch.Generator().manual_seed(1), "update")
        assert all(p.grad is None for p in optimizer.param_groups[0]["params"])              # they would take memory while responses are sampled
    assert len(gradients) == 2 and len(gradients[0]) == 4 and all(gradient.abs().max() > 1e-4 for gradient in gradients[0])
    torch.testing.assert_close(*gradients, atol=1e-8, rtol=0)


def test_full_in_bfloat16_says_what_it_costs(capsys):
    make_policy("full", random_model(), [], {}, CFG)
    assert not capsys.readouterr().out
    make_policy("full", random_model().bfloat16(), [], {}, CFG)
    assert "--dtype float32" in capsys.readouterr().out
    with pytest.raises(UserError, match="full in float16.*--dtype float32 or bfloat16"):
        make_policy("full", random_model().half(), [], {}, CFG)


@pytest.mark.parametrize("targets", [("dense",), ("query_key_value", "dense_4h_to_h")], ids=str)
def test_lora_is_a_low_rank_change_of_shared_weights(targets):
    model = random_model()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    policy = make_policy("lora", model, [], {}, replace(CFG, lora_rank=3, lora_targets=targets))
    tokens_BT, mask_BT = padded()
    assert torch.equal(policy.model(tokens_BT, mask_BT), model(tokens_BT, mask_BT)) and policy.n_changed() == 0
    another = make_policy("lora", model, [], {}, replace(CFG, lora_rank=3, lora_targets=targets), seed=1).trainable()
    assert all(p.equal(another[name]) == name.endswith("B_KD") for name, p in policy.trainable().items())
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.trainable().values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    merged = random_model()
    for name, module in policy.model.named_modules():
        if name.endswith(targets):
            merged.get_submodule(name).weight.data += (module.A_DK @ module.B_KD).T
            assert torch.linalg.matrix_rank(module.A_DK @ module.B_KD) == 3
    torch.testing.assert_close(policy.model(tokens_BT, mask_BT), merged(tokens_BT, mask_BT), atol=1e-5, rtol=1e-5)
    assert (merged(tokens_BT, mask_BT) - model(tokens_BT, mask_BT)).abs().max() > 0.01
    assert len(policy.trainable()) == 2 * len(targets) * model.cfg.num_layers and policy.n_changed() > 0
    assert all(torch.equal(p, weights[name]) for name, p in policy.reference.named_parameters())
    assert {id(p) for p in model.parameters()} < {id(p) for p in policy.model.parameters()}       # no second copy of the weights


@pytest.mark.parametrize("name", ["full", "lora", "coef"])
def test_recomputed_activations_give_the_same_gradients(name):
    gradients = []
    for recompute in (False, True):
        policy, (tokens_BT, mask_BT) = random_policy(name, random_model(dtype=F64)), padded()
        policy.model.recompute = recompute
        trunk = policy.observe(tokens_BT, mask_BT, R)
        policy.hidden(tokens_BT, mask_BT, R, trunk).square().sum().backward()
        gradients.append([p.grad for p in policy.trainable().values() if p.grad is not None])
    assert len(gradients[0]) > 0 and all(map(torch.equal, *gradients))


@pytest.mark.parametrize("name, edit, lr", [("coef", "scale+bias", 1.2), ("full", "scale", 3e-3), ("lora", "scale", 1e-2)])
def test_training_learns_a_planted_reward(tmp_path, name, edit, lr):
    model, cfg = random_model(), replace(CFG, iterations=10, episodes=128, epochs=4, micro_batch=64, lr=lr, temperature=1.0)
    weights = [parameter.clone() for parameter in model.parameters()]
    policy = random_policy(name, model, (2, 3), edit, moved=False)
    evaluation, run = Evaluation(model, prompts(), sevens, cfg, seed=1), Run(tmp_path / "x", {}, resume=False)
    train_ppo(policy, prompts(), sevens, cfg, run, torch.Generator().manual_seed(0))
    figures, rows = evaluation(policy).figures, run.rows()
    assert figures["score_ref"] < 0.2 and figures["score_policy"] > 1.5 and figures["score_gain_std"] > 1.5 and figures["kl"] > 1
    assert [row["step"] for row in rows] == list(range(10))
    now = {name: p.clone() for name, p in policy.state_dict().items()}
    shares, points = zip(*evaluation.frontier(policy))
    assert shares == (0.25, 0.5, 0.75, 1.0) and points[-1].figures == figures
    assert 0 < points[0].figures["kl"] < points[1].figures["kl"] < points[2].figures["kl"] < figures["kl"]
    assert all(torch.equal(p, now[name]) for name, p in policy.state_dict().items())
    assert all(map(torch.equal, weights, model.parameters()))       # the reference is as it was


@pytest.mark.parametrize("name, edit, keep", [("coef", "scale", 0), ("coef", "scale", 7), ("coef", "scale+bias", 7), ("neurons", "scale", 0),
                                              ("steer", "scale", 0), ("full", "scale", 0), ("lora", "scale", 0)])
def test_same_seed_same_bits_also_when_killed_and_resumed(tmp_path, name, edit, keep):
    model = random_model()

    def train(run):
        policy = random_policy(name, model, (1, 3), edit, moved=False, keep=keep)
        return train_ppo(policy, prompts(), Sevens(), replace(CFG, keep=keep, keep_rollouts=1), run, torch.Generator().manual_seed(0)).trainable()

    runs = [Run(tmp_path / folder, {}, resume=False) for folder in "ab"]
    results = [train(run) for run in runs]
    resumed, run = killed_and_resumed(tmp_path / "c", 3, train)
    for other in (results[1], resumed):
        assert all(map(torch.equal, results[0].values(), other.values()))
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in r.rows()] for r in (*runs, run)]
    assert rows[0] == rows[1] == rows[2] and [row["step"] for row in rows[2]] == [0, 1, 2, 3]


@pytest.mark.parametrize("poison, named", [("score", "reward"), ("model", "activation"), ("critic", "value"), ("loss", "loss"),
                                           ("edit", "kl")])
def test_nan_is_named_before_a_step(tmp_path, monkeypatch, poison, named):
    model, calls = random_model(), iter(range(10_000))
    policy = random_policy("coef", model, moved=False)

    def score_fn(tokens_BT, mask_BT):
        scores_B = sevens(tokens_BT, mask_BT)
        late = next(calls) >= 40                     # behind the 32 calls of 256 samples and the 4 of the first rollout
        if poison == "model" and late:
            model.gpt_neox.layers[0].mlp.dense_h_to_4h.bias.fill_(torch.inf)
        return scores_B / 0 if poison == "score" and late else scores_B

    if poison == "edit":
        policy.trainable()["2.coef_F"].data.fill_(torch.nan)
    if poison == "critic":
        monkeypatch.setattr(Critic, "forward", lambda self, prefix_BR, hidden_BRD: prefix_BR * torch.nan)
    if poison == "loss":
        monkeypatch.setattr("ppo.whiten", lambda advantages_BR, mask_BR: advantages_BR / 0)
    with pytest.raises(UserError, match=f"rlhf, step [0-3]: {named} is NaN or infinite; the step was not applied"):
        train_ppo(policy, prompts(), score_fn, CFG, Run(tmp_path, {}, resume=False), torch.Generator().manual_seed(0))
    if poison in ("score", "model"):
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        assert state["step"] >= 1 and all(value.isfinite().all() for value in state["policy"].values())


@pytest.mark.parametrize("field, value", [
    ("episodes", 510), ("episodes", 0), ("episodes", -4), ("samples_per_prompt", 0), ("minibatches", 0), ("minibatches", 3),
    ("iterations", 0), ("response_tokens", 0), ("epochs", 0), ("micro_batch", 0), ("temperature", 0.0), ("kl_horizon", 0.0),
    ("kl_target", 0.0), ("eval_samples", 0), ("lora_rank", 0)])
def test_config_refuses(field, value):
    assert "--rlhf-" in complaint(PPOConfig, **{field: value})


def test_other_misuse_is_explained():
    model = random_model()
    assert "coef, random" in complaint(make_policy, "none", model, [], {}, CFG)
    assert "scale, scale+bias" in complaint(make_policy, "coef", model, [], {}, CFG, "shift")
    assert "--edit scale+bias is for" in complaint(make_policy, "steer", model, [], {}, CFG, "scale+bias")
    assert "--rlhf-lora-targets dense,mlp: choose" in complaint(replace, CFG, lora_targets=("dense", "mlp")) and "choose" in complaint(replace, CFG, lora_targets=())
    assert complaint(prompts, ["2" * 59]).startswith("1 of 1 prompts have more than 59 tokens")


def test_a_policy_that_nobody_makes_is_not_another(monkeypatch):
    monkeypatch.setattr("policies.POLICIES", ("gated",))
    with pytest.raises(NotImplementedError, match="gated"):
        make_policy("gated", random_model(), [1], {1: random_sae(random_model(), 0)}, CFG)


def test_prompts_that_are_too_long_are_left_out_and_told(capsys):
    assert prompts(["1", "2" * 58]).tokens_BT.shape == (2, 59) and not capsys.readouterr().out
    assert torch.equal(prompts(["2" * 59, "13", "4"]).tokens_BT, prompts(["13", "4"]).tokens_BT)
    assert "1 of 3 prompts" in capsys.readouterr().out
    few = Prompts(["123", "12", "1", "2"], Characters(), R, 64, CPU, longest=3, number=2)
    assert few.mask_BT.tolist() == [[1, 1, 1], [0, 1, 1]]


# ----------------------------------------------------------------------------------------------------------------- comparison

def test_gain_at_kl_is_read_off_the_first_crossing():
    kl_E, gain_E = np.array([1.0, 4.0, 3.0, 9.0]), np.array([0.5, 2.0, 7.0, 8.0])
    for at, gain in ((1.0, 0.5), (4.0, 2.0), (0.25, 0.25), (2.25, 1.25)):
        assert gain_at_kl(kl_E, gain_E, at) == pytest.approx(gain)
    assert gain_at_kl(kl_E, gain_E, 6.25) == pytest.approx(7 + (2.5 - 3 ** 0.5) / (3 - 3 ** 0.5)) and math.isnan(gain_at_kl(kl_E, gain_E, 9.1))


def test_bootstrap_intervals_cover_what_they_should():
    """Gains 1 + noise of prompts and of seeds at 4 nats: the bootstrap's spread is that of the mean; paired differences have less."""
    rng, spreads, means = np.random.default_rng(0), [], []
    for _ in range(40):
        prompt_P, seeds = rng.normal(size=100), rng.normal(size=6)
        runs = [(np.full((1, 100), 4.0), (1 + 0.5 * seed + 2 * prompt_P)[None]) for seed in seeds]
        gain_K, drawn_DK = gains_at_kls(runs, (4.0, 5.0), draws=100)
        means.append(gain_K[0])
        spreads.append(drawn_DK[:, 0].std())
        assert math.isnan(gain_K[1])
    assert np.mean(spreads) == pytest.approx(np.std(means), rel=0.3)
    better = [(kl_EP, gain_EP + 0.1) for kl_EP, gain_EP in runs]
    assert (gains_at_kls(better, (4.0,), 100)[1] - gains_at_kls(runs, (4.0,), 100)[1]).std() < 1e-9


@pytest.mark.parametrize("seed_sd, prompt_sd, cell_sd", [(0.3, 0.0, 0.0), (0.0, 2.0, 0.0), (0.0, 0.0, 2.0), (0.1, 0.5, 1.0)])
def test_the_bootstrap_counts_cells_more_than_once_as_its_docstring_says(seed_sd, prompt_sd, cell_sd):
    rng, S, P, variances = np.random.default_rng(0), 4, 60, []
    for _ in range(30):
        gain_SP = seed_sd * rng.normal(size=(S, 1)) + prompt_sd * rng.normal(size=P) + cell_sd * rng.normal(size=(S, P))
        variances.append(gains_at_kls([(np.full((1, P), 4.0), gain_P[None]) for gain_P in gain_SP], (4.0,), 50)[1].var())
    expected = (S - 1) / S * seed_sd ** 2 / S + prompt_sd ** 2 / P + (3 - 2 / S) * cell_sd ** 2 / (S * P)
    assert np.mean(variances) == pytest.approx(expected, rel=0.25)
