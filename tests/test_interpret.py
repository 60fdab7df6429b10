"""interpret.py's explanation scores against a slow reading of their definition, and on columns whose score is known; causal effects against
sums over all possible responses, and on a planted example; contexts."""

import collections
import itertools

import numpy as np
import pytest
import torch

import policies
import interpret
import ppo
from bench import shuffled_weights
from conftest import Characters, complaint, random_model, random_tokens
from interpret import InterpretConfig, Samples, as_sparse_as, carriers, explanation_score
from sae import SAE


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


# ------------------------------------------------------------------------------------------------------------ causal effects

class Counting:
    """A reward: for each token of a text, its worth."""

    def __init__(self, worth_V: torch.Tensor):
        self.worth_V = worth_V

    def __call__(self, tokens_BT, mask_BT):
        return (self.worth_V[tokens_BT] * mask_BT).sum(1)

    def prefixes(self, tokens_BT, mask_BT, R):
        T = tokens_BT.shape[1]
        return torch.stack([self(tokens_BT[:, :t], mask_BT[:, :t]) for t in range(T - R, T + 1)], dim=1)


def edited(layers: list[int], prompts: list[str], R: int, samples: int, worth_V: torch.Tensor, dtype=torch.float64, features: int = 12, **shape):
    """-> a policy with coefficients and biases at `layers`, nothing learned, and the evaluation of a Counting reward."""
    model = random_model(dtype, **shape)
    saes = {layer: SAE(32, features, seeded(layer)).to(dtype) for layer in layers}
    policy = policies.EditPolicy(model, {layer: policies.FeatureScale(sae, bias=True) for layer, sae in saes.items()})
    cfg = ppo.PPOConfig(response_tokens=R, eval_samples=samples)
    texts = ppo.Prompts(prompts, Characters(), R, model.cfg.max_positions, model.device)
    return policy, ppo.Evaluation(model, texts, Counting(worth_V), cfg, seed=3)


def numbers(policy, seed: int, size: float) -> dict[str, torch.Tensor]:
    """-> coefficients and biases at random around their starts."""
    return {name: policy.start(name) + size * torch.randn(p.shape, generator=seeded(seed), dtype=p.dtype) for name, p in policy.trainable().items()}


def test_change_of_the_mean_score_is_that_of_a_sum_over_all_responses():
    """The estimate's expectation, summed over every response with its probability, is the difference of the two policies' mean scores,
    whatever the control variate: with edits at two layers, biases, and responses that end early."""
    policy, evaluation = edited([1, 2], ["\3\5"], 3, 1, torch.linspace(-1, 1, 6).double() ** 3, vocab_size=6)
    response_BR = torch.tensor(list(itertools.product(range(6), repeat=3)))
    tokens_BT = torch.cat([evaluation.prompts.tokens_BT.expand(216, -1), response_BR], 1)
    ended_BR = (response_BR == 0).long()
    mask_BT = torch.cat([torch.ones(216, 3).long(), (ended_BR.cumsum(1) - ended_BR == 0).long()], 1)
    sampled = ppo.Evaluated({}, tokens_BT, mask_BT, evaluation.score_fn(tokens_BT, mask_BT))
    first, second = numbers(policy, 0, 0.5), numbers(policy, 1, 0.5)
    with policy.holding(first):
        samples = Samples(policy, evaluation, sampled, 1, 1.0)
    assert all((p == policy.start(name)).all() for name, p in policy.trainable().items())              # put back

    def probabilities(values):                       # 0 where a response is the same as an earlier one, but for what follows its end
        with torch.no_grad(), policy.holding(values):
            logprob_B = (samples.logprobs(slice(0, 216)) * samples.rollout.mask_BR).sum(1)
        return logprob_B.exp() * torch.tensor([not any(row[t] == 0 and row[t + 1] for t in range(2)) and not (row[0] == 0 and row[2])
                                               for row in response_BR.tolist()])

    p_B, q_B = probabilities(first), probabilities(second)
    assert p_B.sum().item() == pytest.approx(1) and q_B.sum().item() == pytest.approx(1) and (p_B - q_B).abs().max() > 0.01
    change_B, ess = samples.change(second)
    assert (p_B * change_B).sum().item() == pytest.approx(((q_B - p_B) * sampled.scores_B).sum().item(), abs=1e-9)
    assert 1 < ess < 216 and samples.change(first)[0].abs().max() < 1e-9 and samples.change(first)[1] == pytest.approx(216)
    plain_B = samples.score_B - samples.score_B.mean()
    assert (samples.score_B[:, None] - samples.value_BR).square().mean() < 0.9 * plain_B.square().mean()    # the control variate does help


def test_gradient_is_the_slope_of_the_change():
    policy, evaluation = edited([1, 2], ["123", "45", "6", "7890"], 4, 2, torch.randn(64, generator=seeded(9), dtype=torch.float64))
    at, direction = numbers(policy, 0, 0.3), numbers(policy, 1, 1.0)
    with policy.holding(at):
        samples = Samples(policy, evaluation, evaluation.samples(policy.model, policy.edits), 2, 1.0)
    step = {name: at[name] + 1e-6 * direction[name] for name in at}
    slope_P = interpret.by_prompt(samples.change(step)[0] / 1e-6, 2)
    gradient = samples.gradient(at)
    for half in (0, 1):
        predicted = sum((gradient[name][half] * direction[name]).sum() for name in at)
        assert predicted.item() == pytest.approx(slope_P[half::2].mean().item(), rel=1e-3)
    start = policy.part_way(0.0)
    by_feature = interpret.first_order(gradient, at, start)
    total = sum((gradient[name] * (at[name] - start[name])).sum(1) for name in at)
    torch.testing.assert_close(sum(by_feature.values()), total)
    assert set(by_feature) == {(layer, i) for layer in (1, 2) for i in range(12)}


def test_mixed_takes_coefficient_and_bias_of_the_given_features():
    base, other = ({f"{layer}.{kind}_F": torch.full((4,), value) for layer in (1, 12) for kind in ("coef", "bias")} for value in (0.0, 1.0))
    mix = interpret.mixed(base, other, [(1, 2), (12, 0), (12, 3)])
    assert {name: value.tolist() for name, value in mix.items()} == {
        "1.coef_F": [0, 0, 1, 0], "1.bias_F": [0, 0, 1, 0], "12.coef_F": [1, 0, 0, 1], "12.bias_F": [1, 0, 0, 1]}
    assert base["1.coef_F"].sum() == 0


def test_a_planted_feature_is_at_the_top():
    """A reward that pays for two tokens; one feature fires everywhere and promotes them, one fires on them alone and promotes them, ten have
    nothing to do with them. All twelve are turned up alike."""
    worth_V = torch.zeros(64)
    worth_V[[50, 51]] = 1.0
    policy, evaluation = edited([3], [str(n) for n in range(100, 132)], 8, 32, worth_V, torch.float32)
    model, sae = policy.model, policy.edits[3].sae
    mlp_ND = model.mlp_output(torch.arange(64)[:, None], 3).squeeze(1)
    towards_D = torch.nn.functional.normalize(model.embed_out.weight[[50, 51]].sum(0) * model.gpt_neox.final_layer_norm.weight, dim=0)
    with torch.no_grad():
        sae.b_dec_D.copy_(mlp_ND.mean(0))
        sae.W_dec_FD.copy_(torch.nn.functional.normalize(sae.W_dec_FD - (sae.W_dec_FD @ towards_D)[:, None] * towards_D, dim=1))
        sae.W_dec_FD[[4, 7]] = towards_D
        sae.W_enc_DF.mul_(0.1)
        sae.W_enc_DF[:, 4], sae.b_enc_F[4] = 0.0, 4.0
        sae.W_enc_DF[:, 7] = torch.nn.functional.normalize(mlp_ND[[50, 51]].mean(0) - mlp_ND.mean(0), dim=0)
        policy.edits[3].coef_F.fill_(3.0)
    causal = interpret.causal_effects(policy, evaluation, InterpretConfig(features=8, effect_samples=32, fresh_samples=32, checks=2))
    assert list(causal.effects)[0] == (3, 4) and (3, 7) in list(causal.effects)[:2] and len(causal.effects) == 8
    top, summary = causal.effects[3, 4], causal.summary
    assert top["set_back"]["mean"] > 3 * top["set_back"]["se"] and top["alone"]["mean"] > 0 and 1 < top["set_back"]["ess"] < 1024
    assert abs(top["fresh"]["mean"] - top["set_back"]["mean"]) < 3 * (top["fresh"]["se"] + top["set_back"]["se"])
    assert summary["r"] > 0.8 and summary["moved"] == 12 and [point["k"] for point in summary["kept"]] == [1, 2, 4, 8, 12]
    gain = summary["kept"][-1]["mean"]
    assert summary["kept"][1]["mean"] > 0.75 * gain and 2 < summary["carriers"] < 9 and summary["together"]["mean"] > 0.9 * gain > 0       # two do most
    ranked_on = (causal.sampled.scores_B - evaluation.reference.scores_B).mean() / evaluation.reference.scores_B.std()
    assert summary["kept"][-1]["mean"] != pytest.approx(ranked_on.item(), abs=1e-6), "fresh samples, other than those that ranked the features"
    assert summary["interaction"]["mean"] == pytest.approx(summary["together"]["mean"] - summary["sum"]["mean"])


def test_a_reward_that_cannot_be_asked_for_beginnings_takes_the_other_samples_of_the_prompt():
    policy, evaluation = edited([2], ["1", "2"], 2, 3, torch.rand(64, generator=seeded(4), dtype=torch.float64))
    evaluation.score_fn = evaluation.score_fn.__call__
    samples = Samples(policy, evaluation, evaluation.reference, 3, 1.0)
    a, b, c = samples.score_B[:3].tolist()
    torch.testing.assert_close(samples.early_scores()[:3], torch.tensor([[b + c] * 2, [a + c] * 2, [a + b] * 2]) / 2)


@pytest.mark.parametrize("gains, errors, want", [
    ([(1, 0.1), (2, 0.2), (4, 0.95), (8, 1.0)], 0.1, 4),           # between 2 and 4, nearer to 4
    ([(1, 0.95), (2, 1.0)], 0.1, 1),
    ([(1, 0.0), (64, 1.0), (4096, 1.2)], 0.1, 95),                 # 1.08 lies two fifths of the way from 64, by logarithms: 64 · 64^0.4
    ([(1, 0.1), (2, 0.15)], 0.1, None),                            # no gain to speak of
    ([(1, -0.2), (2, -1.0)], 0.1, None)])
def test_carriers(gains, errors, want):
    if want == 95:
        want = int(np.ceil(64 * 64 ** 0.4))
    assert carriers([{"k": k, "mean": mean, "se": errors} for k, mean in gains]) == want


def test_contexts_of_strong_and_of_weak_activations():
    activations_BT, tokens_BT = torch.zeros(20, 21), random_tokens(20, 21)
    activations_BT[torch.arange(20), torch.arange(20)] = torch.arange(1.0, 21)             # window b is active at b, at strength b + 1
    activations_BT[19, 0] = 19.5
    top = interpret.top_contexts(activations_BT, tokens_BT, Characters(), 3, 2)
    assert [max(context.activations) for context in top] == [20, 19, 18] and top[0].tokens == [chr(i) for i in tokens_BT[19, 17:].tolist()]
    weak = interpret.quantile_contexts(activations_BT, tokens_BT, Characters(), 2)
    assert [(context.label, max(context.activations)) for context in weak] == [
        (f"quantile {q} of its activations", value) for q, value in ((0.9, 18), (0.9, 19), (0.5, 10), (0.5, 11), (0.1, 2), (0.1, 3))]
    activations_BT[0] = activations_BT[1] = 0                                              # of 19 active tokens no quantiles are told
    assert interpret.quantile_contexts(activations_BT, tokens_BT, Characters(), 2) == []
    assert interpret.top_contexts(torch.zeros(2, 4), tokens_BT, Characters(), 3, 2) == []
    assert interpret.quantile_contexts(torch.zeros(2, 4), tokens_BT, Characters(), 2) == []


def test_tokens_beyond_the_tokenizers_vocabulary():
    """Embeddings are padded to a round number of rows, and a model may sample those."""
    model, tokenizer = random_model(), Characters()
    tokens_BT = random_tokens(6, 12)
    tokenizer.vocab_size = int(tokens_BT.max())                          # the largest token lies beyond it
    sae = SAE(model.cfg.hidden_size, 8, seeded()).requires_grad_(False)
    cards, _ = interpret.make_cards(model, tokenizer, 1, sae, [0, 1, 2], {}, tokens_BT, InterpretConfig(columns=4))
    assert len(cards) == 3 and all(card.tokens for card in cards)
    shown = {token for card in cards for token, _ in [*card.tokens, *card.promoted, *card.suppressed]}
    assert max(map(ord, shown)) < tokenizer.vocab_size


def test_options_are_checked():
    assert "--interpret-effect-samples must be positive" in complaint(InterpretConfig, effect_samples=0)


def test_what_all_effects_share_is_no_agreement():
    """Effects of one half of the prompts may be larger than those of the other all together, by noise that they share."""
    generator = seeded()
    true_G = torch.randn(400, generator=generator)
    shift = torch.tensor([3.0, -3.0], dtype=torch.float64)                     # by the even and by the odd prompts
    for strength in (0.0, 1.0):
        predicted = {(2, i): strength * true_G[i].double() + shift + torch.randn(2, generator=generator) for i in range(400)}
        single = {(2, i): torch.stack([strength * true_G[i].double() + shift[half] + torch.randn(1, generator=generator).double() for half in (0, 1)]).flatten()
                  for i in range(400)}
        found = interpret.agreement(dict.fromkeys(predicted), single, predicted)
        assert abs(found["r_other_prompts"] - 0.5 * strength) < 0.1 and found["r"] is not None
    assert interpret.correlation(torch.ones(5), torch.arange(5.0)) is None
