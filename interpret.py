"""From coefficients to evidence: what each feature that RLHF moved stands for and does to the reward, and a page that shows it.

Dimension key: B batch   T tokens   R response tokens   P held-out prompts   N rows (tokens, flattened)   D hidden size   F SAE features
               G the features looked at   C classes of tokens   V vocabulary
"""

import math
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import ppo
from compare import frontier
from files import UserError, finite, read_json, write_json, write_whole
from policies import EditPolicy
from ppo import Evaluated, Evaluation, by_prompt, spread
from pythia import END_OF_TEXT, Pythia, Tokenizer
from report import render_report
from run import check_positive
from sae import SAE, mlp_rows

Feature = tuple[int, int]                            # (layer, number)


@dataclass(frozen=True)
class InterpretConfig:
    """--stage interpret"""

    features: int = 64                   # listed: those whose coefficients, to first order, change the reward most
    contexts: int = 6                    # contexts a feature from its strongest activations; two more from each of QUANTILES
    width: int = 12                      # tokens of context on each side of the one looked at
    samples: int = 16                    # held-out prompts shown with the text before and after
    effect_samples: int = 2              # the policy's a held-out prompt, reweighted for each feature's effect; of the reference's half as many
    fresh_samples: int = 3               # a held-out prompt, drawn anew; no more than the run's --rlhf-eval-samples, as those above
    checks: int = 5                      # features whose effect is also measured on fresh samples
    columns: int = 256                   # features, MLP coordinates and random directions whose explanation scores are averaged

    def __post_init__(self):
        check_positive(self, "interpret", "features", "samples", "effect_samples", "fresh_samples", "columns")
        if min(self.contexts, self.width, self.checks) < 0:
            raise UserError("--interpret-contexts, -width and -checks must not be negative")


# ------------------------------------------------------------------------------------------------------------ feature cards

@dataclass
class Context:
    """A stretch of text and one feature's activation on each of its tokens."""
    tokens: list[str]
    activations: list[float]
    label: str = ""                      # where it is from


@dataclass
class FeatureCard:
    """What is known of one feature, all of it measured."""
    layer: int
    feature: int
    coef: float                          # c, 1 where RLHF left it alone
    bias: float                          # b, 0 likewise
    firing_rate: float                   # share of held-out tokens on which it is active, windows' first ones left out
    peak: float                          # its largest activation there
    histogram: list[int]                 # of its activations where active, in equal steps from 0 to `peak`
    tokens: list[tuple[str, float]]      # those that make up most of its activation, with their share of it
    explanation: float | None            # explanation score, Pearson r; None where it is silent
    promoted: list[tuple[str, float]]    # tokens whose logits its direction raises most, with the `logit_effect` of a unit of activation
    suppressed: list[tuple[str, float]]
    contexts: list[Context]              # from its strongest activations down to weak ones
    fired: list[Context] = field(default_factory=list)         # where it is most active in the samples shown
    effect: dict | None = None           # on the reward, see `causal_effects`


QUANTILES = (0.9, 0.5, 0.1)                          # of a feature's activations; the strongest alone would flatter it
LISTED_TOKENS = 8                                    # promoted and suppressed ones of a feature
CARRIED = 0.9                                        # the share of the gain that `carriers` carry


@torch.no_grad()
def feature_activations(sae: SAE, rows_ND: Tensor, features: list[int]) -> tuple[Tensor, Tensor]:
    """-> activations_NG of the given features on the MLP's outputs, and firing_rate_F of all features."""
    chunks, fired_F = [], torch.zeros(sae.num_features, device=rows_ND.device)
    for part_ND in rows_ND.split(2048):
        features_NF = sae.encode(part_ND)
        fired_F += (features_NF > 0).sum(0)
        chunks.append(features_NF[:, features].cpu())
    return torch.cat(chunks), (fired_F / len(rows_ND)).cpu()


def context_at(activations_T: Tensor, tokens_T: Tensor, place: int, tokenizer: Tokenizer, width: int, label: str) -> Context:
    """-> `width` tokens on each side of a place in one window, and the activations there."""
    span = slice(max(0, place - width), place + width + 1)
    return Context([tokenizer.decode([i]) for i in tokens_T[span].tolist()], [round(a, 3) for a in activations_T[span].tolist()], label)


def top_contexts(activations_BT: Tensor, tokens_BT: Tensor, tokenizer: Tokenizer, number: int, width: int) -> list[Context]:
    """-> the contexts of one feature's strongest activations, at most one a window, strongest first; none where it is silent."""
    peak_B, place_B = activations_BT.max(1)
    order = [b for b in peak_B.argsort(descending=True, stable=True)[:number].tolist() if peak_B[b] > 0]
    return [context_at(activations_BT[b], tokens_BT[b], int(place_B[b]), tokenizer, width, "strongest") for b in order]


def quantile_contexts(activations_BT: Tensor, tokens_BT: Tensor, tokenizer: Tokenizer, width: int) -> list[Context]:
    """-> two contexts from each of QUANTILES of one feature's activations; none of those where it is active on fewer than 20 tokens."""
    flat_N = activations_BT.flatten()
    ranks = flat_N.argsort(stable=True)[int((flat_N <= 0).sum()):].tolist()                        # the active tokens, weakest first
    found = []
    for q in QUANTILES if len(ranks) >= 20 else ():
        first = int(q * len(ranks))
        for b, t in (divmod(i, activations_BT.shape[1]) for i in ranks[first - 1:first + 1]):
            found.append(context_at(activations_BT[b], tokens_BT[b], t, tokenizer, width, f"quantile {q:g} of its activations"))
    return found


@torch.no_grad()
def logit_effect(model: Pythia, direction_GD: Tensor) -> Tensor:
    """-> effect_GV: how much one unit of each direction, added to the final residual stream, moves each token's logit against the mean logit,
    multiplied by the standard deviation that the final layer norm divides by, which is held fixed. The direct path only: layers in between are
    passed by."""
    weight_D = model.gpt_neox.final_layer_norm.weight.float()
    direction_GD = direction_GD.float() - direction_GD.float().mean(-1, keepdim=True)          # the layer norm takes the mean out
    effect_GV = (direction_GD * weight_D) @ model.embed_out.weight.float().T
    return effect_GV - effect_GV.mean(-1, keepdim=True)


def top_tokens(values_V: Tensor, tokenizer: Tokenizer, number: int) -> list[tuple[str, float]]:
    """-> the tokens of the largest values, with these."""
    values, ids = values_V.topk(min(number, len(values_V)))
    return [(tokenizer.decode([i]), round(value, 4)) for value, i in zip(values.tolist(), ids.tolist())]


def make_cards(model: Pythia, tokenizer: Tokenizer, layer: int, sae: SAE, chosen: list[int] | None, learned: dict[str, Tensor],
               tokens_BT: Tensor, cfg: InterpretConfig) -> tuple[list[FeatureCard], dict]:
    """-> cards of the chosen features of one layer, in order, and what is known of its whole SAE (`mean_explanations`). `learned` holds
    `{layer}.coef_F` and perhaps `{layer}.bias_F`, or nothing. With None chosen: of `cfg.columns` features, evenly spaced, the
    `cfg.features` that the text explains best."""
    strided = torch.linspace(0, sae.num_features - 1, min(cfg.columns, sae.num_features)).round().long().tolist()
    looked_at = (chosen or []) + strided
    rows_ND = mlp_rows(model, layer, tokens_BT).float()                                    # without the windows' first tokens
    activations_NG, rate_F = feature_activations(sae, rows_ND, looked_at)
    activations_BTG = F.pad(activations_NG.view(len(tokens_BT), -1, len(looked_at)), (0, 0, 1, 0))            # 0 on a window's first
    score = explanation_score(activations_NG, tokens_BT)
    about = mean_explanations(rows_ND, tokens_BT, rate_F, Explanation(*(part[-len(strided):] for part in score)), len(strided))
    listed = range(len(chosen)) if chosen is not None else score.pearson_F.nan_to_num(-1).argsort(descending=True)[:cfg.features].tolist()
    cards = []
    for g in listed:
        i, activations_BT = looked_at[g], activations_BTG[..., g]
        effect_V = logit_effect(model, sae.W_dec_FD[[i]])[0, :tokenizer.vocab_size]
        weight_V = torch.zeros(model.cfg.vocab_size).index_add(0, tokens_BT.flatten().long(), activations_BT.flatten())[:tokenizer.vocab_size]
        coef = learned[f"{layer}.coef_F"][i].item() if learned else 1.0
        bias = learned[f"{layer}.bias_F"][i].item() if f"{layer}.bias_F" in learned else 0.0
        peak = activations_BT.max().item()
        histogram = torch.histc(activations_BT[activations_BT > 0], 20, 0, peak or 1).int().tolist()
        fires_on = [pair for pair in top_tokens(weight_V / weight_V.sum().clamp(min=1e-9), tokenizer, 5) if pair[1] > 0]
        contexts = top_contexts(activations_BT, tokens_BT, tokenizer, cfg.contexts, cfg.width)
        cards.append(FeatureCard(
            layer, i, coef, bias, rate_F[i].item(), peak, histogram, fires_on, finite(score.pearson_F[g].item()),
            top_tokens(effect_V, tokenizer, LISTED_TOKENS), [(token, -v) for token, v in top_tokens(-effect_V, tokenizer, LISTED_TOKENS)],
            contexts + quantile_contexts(activations_BT, tokens_BT, tokenizer, cfg.width)))
    return cards, about


def mean_explanations(rows_ND: Tensor, tokens_BT: Tensor, rate_F: Tensor, features: "Explanation", columns: int) -> dict:
    """-> mean explanation scores of features, and of as many MLP coordinates and random directions made as sparse; firing rates."""
    D, generator = rows_ND.shape[1], torch.Generator().manual_seed(0)
    random_DG = F.normalize(torch.randn(D, columns, generator=generator), dim=0).to(rows_ND.device)
    coordinates = torch.linspace(0, D - 1, min(columns, D)).round().long()
    controls = {"MLP coordinates": rows_ND[:, coordinates], "random directions": rows_ND @ random_DG}
    scores = {name: explanation_score(as_sparse_as(values_NG, rate_F), tokens_BT) for name, values_NG in controls.items()}
    means = {}
    for name, score in ({"SAE features": features} | scores).items():
        pearson_G, f1_G = (part[~part.isnan()].double() for part in score)
        means[name] = {"columns": len(pearson_G), "pearson": mean_se(pearson_G), "f1": mean_se(f1_G)}
    return {"explanations": means, "num_features": len(rate_F)}


def paired_samples(tokenizer: Tokenizer, evaluation: Evaluation, after: Evaluated) -> list[dict]:
    """-> one sample a held-out prompt, before and after, drawn with the same random numbers."""
    R, before = evaluation.cfg.response_tokens, evaluation.reference

    def text(tokens_T: Tensor, mask_T: Tensor) -> str:
        return tokenizer.decode(tokens_T[mask_T.bool()].cpu()).removeprefix(END_OF_TEXT)

    return [{"prompt": text(before.tokens_BT[b, :-R], before.mask_BT[b, :-R]),
             "before": text(before.tokens_BT[b, -R:], before.mask_BT[b, -R:]), "score_before": before.scores_B[b].item(),
             "after": text(after.tokens_BT[b, -R:], after.mask_BT[b, -R:]), "score_after": after.scores_B[b].item()}
            for b in range(0, len(after.tokens_BT), evaluation.cfg.eval_samples)]


@torch.no_grad()
def shown_samples(model: Pythia, tokenizer: Tokenizer, saes: dict[int, SAE], causal: "Causal", cards: list[FeatureCard],
                  cfg: InterpretConfig) -> list[dict]:
    """-> `paired_samples` with each response's tokens and their log(π/π_ref), in nats; fills in where the cards' features fired in them."""
    shown = paired_samples(tokenizer, causal.before.evaluation, causal.sampled)[:cfg.samples]
    places: dict[Feature, list[tuple[float, Context]]] = defaultdict(list)
    for n, sample in enumerate(shown):
        for name, side in (("before", causal.before), ("after", causal.after)):
            rollout = ppo.select(side.rollout, slice(n * side.per_prompt, n * side.per_prompt + 1))
            tokens_T, own_R = rollout.tokens_BT[rollout.mask_BT.bool()], rollout.mask_BR.bool()
            ratios = (rollout.logprobs_BR - rollout.ref_logprobs_BR)[own_R].tolist()
            sample[f"tokens_{name}"] = [(tokenizer.decode([i]), round(r, 3)) for i, r in zip(tokens_T[-len(ratios):].tolist(), ratios)]
            for layer, sae in saes.items():          # as the unedited model reads the text
                activations_TF = sae.encode(model.mlp_output(tokens_T[None], layer)[0].float()).cpu()
                for i in [card.feature for card in cards if card.layer == layer]:
                    peak, place = activations_TF[-len(ratios):, i].max(0)
                    if peak > 0:
                        place = len(tokens_T) - len(ratios) + int(place)
                        label = f"sample {n + 1}, {name}"
                        places[layer, i].append((peak.item(), context_at(activations_TF[:, i], tokens_T, place, tokenizer, cfg.width, label)))
    for card in cards:
        card.fired = [context for _, context in sorted(places[card.layer, card.feature], key=lambda pair: -pair[0])[:3]]
    return shown


# ---------------------------------------------------------------------------------------------- explanations without a judge

class Explanation(NamedTuple):
    """How far the text at hand predicts each column, on windows it was not fitted to; NaN for columns silent in either half."""
    pearson_F: Tensor                    # between prediction and activation
    f1_F: Tensor                         # of "active"; predictions count as such from a cut that as many fitted rows pass as were active


@torch.no_grad()
def explanation_score(activations_NF: Tensor, tokens_BT: Tensor, strength: float = 2.0) -> Explanation:
    """Predict each column of activations from the token and the one before it, fitted on even windows, scored on odd ones.

    Rows are all tokens but each window's first, window by window (`sae.mlp_rows`). The prediction is the mean of the activations at the
    same pair of tokens, drawn towards the mean at the same token, and that towards the mean of all, as if each of these had been seen
    `strength` times more (an n-gram model with additive smoothing; compare Foote et al. 2023, N2G). No language model judges. Any
    columns will do; dense ones, to be compared, are first made as sparse as features (`as_sparse_as`).
    """
    B, T = tokens_BT.shape
    token_N = tokens_BT[:, 1:].flatten().unique(return_inverse=True)[1]
    before_N = tokens_BT[:, :-1].flatten().long()
    pair_N = (before_N * (token_N.max() + 1) + token_N).unique(return_inverse=True)[1]
    token_of_pair = torch.zeros(int(pair_N.max()) + 1, dtype=torch.long).scatter(0, pair_N, token_N)
    fit_N = (torch.arange(B) % 2 == 0).repeat_interleave(T - 1)
    pearson, f1 = [], []
    for columns_NF in activations_NF.float().cpu().split(256, dim=1):
        seen_NF, held_NF = columns_NF[fit_N], columns_NF[~fit_N]
        by_token_CF = class_means(seen_NF, token_N[fit_N], seen_NF.mean(0).expand(int(token_N.max()) + 1, -1), strength)
        by_pair_CF = class_means(seen_NF, pair_N[fit_N], by_token_CF[token_of_pair], strength)
        guess_NF, on_NF, active_F = by_pair_CF[pair_N[~fit_N]], held_NF > 0, (seen_NF > 0).sum(0)
        guess_on_NF = guess_NF >= by_pair_CF[pair_N[fit_N]].sort(0, descending=True).values.gather(0, active_F.clamp(min=1)[None] - 1)
        silent_F = (active_F == 0) | ~on_NF.any(0)
        f1.append((2 * (on_NF & guess_on_NF).sum(0) / (on_NF.sum(0) + guess_on_NF.sum(0))).masked_fill(silent_F, torch.nan))
        pearson.append(F.cosine_similarity(guess_NF - guess_NF.mean(0), held_NF - held_NF.mean(0), dim=0).masked_fill(silent_F, torch.nan))
    return Explanation(torch.cat(pearson), torch.cat(f1))


def class_means(values_NF: Tensor, class_N: Tensor, prior_CF: Tensor, strength: float) -> Tensor:
    """-> mean_CF of each class's rows, with `strength` more rows equal to its prior."""
    count_C = torch.bincount(class_N, minlength=len(prior_CF))[:, None]
    return (strength * prior_CF).index_add(0, class_N, values_NF) / (count_C + strength)


def as_sparse_as(values_NG: Tensor, rate_F: Tensor) -> Tensor:
    """-> (values − threshold)⁺ with a threshold for each column, such that their firing rates are spread as rate_F is."""
    rate_G = rate_F.cpu().sort().values[torch.linspace(0, len(rate_F) - 1, values_NG.shape[1]).round().long()]
    rank_G = (rate_G * len(values_NG)).round().long().clamp(max=len(values_NG) - 1)
    threshold_G = values_NG.sort(0, descending=True).values.gather(0, rank_G.to(values_NG.device)[None])
    return F.relu(values_NG - threshold_G)


# --------------------------------------------------------------------------------------------- causal effects on the reward

def mixed(base: dict[str, Tensor], other: dict[str, Tensor], features: list[Feature]) -> dict[str, Tensor]:
    """-> base's numbers, but other's for `features`, coefficients and biases alike."""
    mix = {name: value.clone() for name, value in base.items()}
    for name, value in mix.items():
        at = [i for layer, i in features if name.startswith(f"{layer}.")]
        value[at] = other[name][at]
    return mix


class Samples:
    """One fixed set of samples of a policy π on held-out prompts, to tell from it what the mean score of a policy π′ would be.

    One sample's estimate of J(π′) − J(π), with score S and wₜ = Π_{s≤t} π′(token s) / π(token s), w₀ = 1:

        (w_R − 1) S − Σₜ (wₜ − wₜ₋₁) Vₜ

    Importance weighting, not self-normalised, with a control variate: each term of the sum has mean 0, whatever Vₜ is, as long as it depends
    on nothing but the text before token t. Here Vₜ = aₜ + bₜ xₜ, fitted to these samples by least squares (which costs a bias of order
    1/prompts); xₜ is the score of that text or, where the reward cannot be asked for it, the mean score of the prompt's other samples. The same
    Vₜ is the baseline of the score-function gradient ∇J = E Σₜ (S − Vₜ) ∇ log π(token t), which is the estimate above to first order. Scores
    are in `unit`s.
    """

    def __init__(self, policy: EditPolicy, evaluation: Evaluation, sampled: Evaluated, per_prompt: int, unit: Tensor,
                 sampled_by_reference: bool = False):
        self.policy, self.evaluation, self.per_prompt = policy, evaluation, min(per_prompt, evaluation.cfg.eval_samples)
        first_B = torch.arange(len(sampled.scores_B), device=sampled.scores_B.device) % evaluation.cfg.eval_samples < self.per_prompt
        self.sampled = sampled = Evaluated({}, sampled.tokens_BT[first_B], sampled.mask_BT[first_B], sampled.scores_B[first_B])
        self.rollout = ppo.join([ppo.make_rollout(policy, sampled.tokens_BT[rows], sampled.mask_BT[rows], evaluation.cfg)
                                 for rows in ppo.slices(len(sampled.tokens_BT), evaluation.cfg.micro_batch)])
        self.old_BR = self.rollout.ref_logprobs_BR if sampled_by_reference else self.rollout.logprobs_BR
        self.score_B = sampled.scores_B / unit
        guess_BR = self.early_scores()
        centred_BR, score_B1 = guess_BR - guess_BR.mean(0), (self.score_B - self.score_B.mean())[:, None]
        slope_R = (centred_BR * score_B1).mean(0) / centred_BR.square().mean(0).clamp(min=1e-12)
        self.value_BR = self.score_B.mean() + slope_R * centred_BR

    def early_scores(self) -> Tensor:
        """-> what is known of each sample's score before each of its tokens."""
        R, score_fn, sampled = self.evaluation.cfg.response_tokens, self.evaluation.score_fn, self.sampled
        if hasattr(score_fn, "prefixes"):
            return ppo.score_in_batches(score_fn.prefixes, sampled.tokens_BT, sampled.mask_BT, self.evaluation.cfg.micro_batch, R)[:, :-1]
        score_PS = self.score_B.view(-1, self.per_prompt)                    # P prompts, S samples each
        others_PS = (score_PS.sum(1, keepdim=True) - score_PS) / max(self.per_prompt - 1, 1)
        return others_PS.reshape(-1, 1).expand(-1, R)

    def logprobs(self, rows: Tensor | slice) -> Tensor:
        """-> logprobs_BR of the samples' tokens with the policy as it is now."""
        return ppo.response_logprobs(self.policy, ppo.select(self.rollout, rows), self.evaluation.cfg)

    @torch.no_grad()
    def change(self, values: dict[str, Tensor]) -> tuple[Tensor, float]:
        """-> each sample's estimate of J(π′) − J(π), π′ the policy with `values`; the effective number of samples (Σw)² / Σw²."""
        with self.policy.holding(values):
            new_BR = torch.cat([self.logprobs(rows) for rows in ppo.slices(len(self.old_BR), self.evaluation.cfg.micro_batch)])
        weight_BR = ((new_BR - self.old_BR) * self.rollout.mask_BR).double().cumsum(1).exp()
        steps_BR = weight_BR.diff(dim=1, prepend=torch.ones_like(weight_BR[:, :1]))
        last_B = weight_BR[:, -1]
        return (last_B - 1) * self.score_B - (steps_BR * self.value_BR).sum(1), (last_B.sum().square() / last_B.square().sum()).item()

    def gradient(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """-> ∇J at `values` (those that sampled), for each learned tensor (2, F): by the even prompts' samples, and by the odd ones'."""
        advantage_BR = (self.score_B[:, None] - self.value_BR) * self.rollout.mask_BR
        parameters, halves = self.policy.trainable(), []
        half_B = torch.arange(len(self.old_BR), device=self.old_BR.device) // self.per_prompt % 2
        with self.policy.holding(values):
            for half in (0, 1):
                rows = (half_B == half).nonzero().flatten()
                parts = [torch.autograd.grad((advantage_BR[micro] * self.logprobs(micro)).sum() / max(len(rows), 1), list(parameters.values()))
                         for micro in rows.split(self.evaluation.cfg.micro_batch)]
                halves.append([sum(part) for part in zip(*parts)])
        return {name: torch.stack(pair) for name, *pair in zip(parameters, *halves)}


def first_order(gradient: dict[str, Tensor], learned: dict[str, Tensor], start: dict[str, Tensor]) -> dict[Feature, Tensor]:
    """-> gradient × move of each feature that moved, (2,), by the even and by the odd prompts; biases count with their coefficient."""
    found: dict[Feature, Tensor] = {}
    for name in learned:
        move_F = learned[name] - start[name]
        predicted_F2 = (gradient[name] * move_F).T.double().cpu()
        for i in move_F.nonzero().flatten().tolist():
            feature = int(name.split(".")[0]), i
            found[feature] = found.get(feature, 0) + predicted_F2[i]
    return found


class Causal(NamedTuple):
    """What each listed feature does to the reward."""
    effects: dict[Feature, dict]         # strongest first
    summary: dict                        # of all of them together, see `causal_effects`
    sampled: Evaluated                   # of the policy, on all held-out prompts
    before: Samples                      # of the reference
    after: Samples                       # of the policy


def causal_effects(policy: EditPolicy, evaluation: Evaluation, cfg: InterpretConfig) -> Causal:
    """Effects on the mean score, in standard deviations of the reference's scores, with standard errors over prompts.

    set_back   mean score of the policy, less that with this one coefficient (and bias) set back to its start: on the policy's samples
    alone      mean score with this one moved and all others at their start, less the reference's: on the reference's samples
    predicted  gradient × move on the policy's samples, `set_back` to first order
    fresh      set_back, measured on samples drawn anew, by other random numbers than all of the above

    In the summary, of fresh samples but `sum`: `kept`, the gain when only the k strongest move; `together`, what is lost when all listed are set
    back at once; `sum`, of their set_backs; `interaction`, together − sum.

    Listed are the features with the largest gradient × move on the *reference's* samples, so that this choice does not flatter what
    is measured on the policy's.
    """
    unit, learned = spread(evaluation.reference.scores_B), {name: p.clone() for name, p in policy.state_dict().items()}
    start = policy.part_way(0.0)
    sampled = evaluation.samples(policy.model, policy.edits)
    before = Samples(policy, evaluation, evaluation.reference, -(-cfg.effect_samples // 2), unit, sampled_by_reference=True)
    after = Samples(policy, evaluation, sampled, cfg.effect_samples, unit)
    expected, predicted = (first_order(side.gradient(values), learned, start) for side, values in ((before, start), (after, learned)))
    order = sorted(expected, key=lambda feature: -abs(expected[feature].sum().item()))
    effects, lost = {}, {}                           # lost: set_back of each held-out prompt
    for feature in tqdm(order[:cfg.features], desc="effects"):
        back_B, back_ess = after.change(mixed(learned, start, [feature]))
        alone_B, alone_ess = before.change(mixed(start, learned, [feature]))
        lost[feature] = by_prompt(-back_B, after.per_prompt)
        effects[feature] = {"set_back": mean_se(lost[feature]) | {"ess": back_ess}, "predicted": predicted[feature].mean().item(),
                            "alone": mean_se(by_prompt(alone_B, before.per_prompt)) | {"ess": alone_ess}, "fresh": None}
    effects = dict(sorted(effects.items(), key=lambda item: -abs(item[1]["set_back"]["mean"])))

    # The order above is by noise, too: what is now said of the strongest must not rest on the samples that made them so.
    fresh = replace(evaluation.cfg, eval_samples=min(cfg.fresh_samples, evaluation.cfg.eval_samples))
    again = Evaluation(policy.reference, evaluation.prompts, evaluation.score_fn, fresh, evaluation.seed + 1_000_000)

    def fresh_gain(values: dict[str, Tensor]) -> Tensor:
        """-> each prompt's mean score with these values, less the reference's, in units; the same random numbers in every call."""
        with policy.holding(values):
            gain_B = again.samples(policy.model, policy.edits).scores_B - again.reference.scores_B
            return by_prompt(gain_B / unit, again.cfg.eval_samples)

    gain_P = fresh_gain(learned)
    for feature in tqdm(list(effects)[:cfg.checks], desc="check"):
        effects[feature]["fresh"] = mean_se(gain_P - fresh_gain(mixed(learned, start, [feature])))
    ranked = [*effects, *order[cfg.features:]]       # those listed by their set_back, the others to first order
    step = 2 if len(order) <= 256 else 4
    kept = [{"k": k} | mean_se(fresh_gain(mixed(start, learned, ranked[:k])))
            for k in tqdm([step ** n for n in range(32) if step ** n < len(ranked)], desc="share")]
    # Where all that moved are listed, setting them all back gives the reference: all of the gain is lost.
    together_P = gain_P if len(order) <= cfg.features else gain_P - fresh_gain(mixed(learned, start, list(effects)))
    sum_P = sum(lost.values())
    kept.append({"k": len(ranked)} | mean_se(gain_P))
    return Causal(effects, {
        "moved": len(ranked), "samples": len(after.score_B), "fresh_samples": len(again.reference.scores_B), **agreement(effects, lost, predicted),
        "together": mean_se(together_P), "sum": mean_se(sum_P), "interaction": mean_se(together_P - sum_P),
        "kept": kept, "carriers": carriers(kept)}, sampled, before, after)


def mean_se(x_P: Tensor) -> dict[str, float | None]:
    """-> mean (over prompts, mostly) and its standard error."""
    return {"mean": finite(x_P.mean().item()), "se": finite((x_P.std() / len(x_P) ** 0.5).item())}


def agreement(effects: dict[Feature, dict], lost: dict[Feature, Tensor], predicted: dict[Feature, Tensor]) -> dict:
    """-> Pearson r of predicted with measured effects: on the same samples; and of the prediction from half of the prompts with the
    measurement on the others (both ways; each half's means are taken out, for what all its effects share is no agreement)."""
    predicted_G2 = torch.stack([predicted[feature] for feature in effects])
    measured_G2 = torch.stack([torch.stack([lost[feature][half::2].mean() for half in (0, 1)]) for feature in effects])
    return {"r": correlation(predicted_G2.mean(1), measured_G2.mean(1)),
            "r_other_prompts": correlation((predicted_G2 - predicted_G2.mean(0)).flatten(), (measured_G2 - measured_G2.mean(0)).flip(1).flatten())}


def correlation(x_G: Tensor, y_G: Tensor) -> float | None:
    """-> Pearson r; None of fewer than three, and of numbers that are all the same."""
    return finite(torch.corrcoef(torch.stack([x_G, y_G]))[0, 1].item()) if len(x_G) > 2 else None


def carriers(kept: list[dict]) -> float | None:
    """-> how many coefficients carry 90 % of the gain (CARRIED): where the curve of (k, gain with the k strongest alone) first reaches it,
    between its points by the logarithm of k. None where the whole gain is within two standard errors of 0."""
    gain, previous = kept[-1]["mean"], {"k": 1, "mean": 0.0}
    if not gain > 2 * (kept[-1]["se"] or 0):
        return None
    for point in kept:
        if point["mean"] >= CARRIED * gain:
            part = (CARRIED * gain - previous["mean"]) / (point["mean"] - previous["mean"])
            return math.ceil(previous["k"] * (point["k"] / previous["k"]) ** part - 1e-9)
        previous = point


# ------------------------------------------------------------------------------------------------------------------- report

def finished_runs(out: str | Path) -> list[dict]:
    """-> the finished rlhf runs in a run folder, with (kl, gain) of each point of their frontiers."""
    runs = []
    for folder in sorted(path.parent for path in Path(out).glob("rlhf-*/metrics.json")):
        figures, config = read_json(folder / "metrics.json"), read_json(folder / "config.json")
        runs.append({"name": folder.name.removeprefix("rlhf-"), "layers": config["layers"].strip("[]"), "reward": config["reward"],
                     "figures": figures, "frontier": frontier(folder)})
    return runs


def describe(model: Pythia, tokenizer: Tokenizer, saes: dict[int, SAE], texts: dict[int, Tensor], learned: dict[str, Tensor],
             causal: Causal | None, cfg: InterpretConfig) -> dict:
    """-> what the report says of features, SAEs and samples; `texts` are each layer's held-out windows."""
    effects, cards, about = causal.effects if causal else {}, [], {}
    for layer, sae in saes.items():
        chosen = [i for where, i in effects if where == layer] if causal else None
        own, about[layer] = make_cards(model, tokenizer, layer, sae, chosen, learned, texts[layer], cfg)
        cards += own
    if causal:
        order = list(effects)
        cards.sort(key=lambda card: order.index((card.layer, card.feature)))
    for card in cards:
        card.effect = effects.get((card.layer, card.feature))
    samples = shown_samples(model, tokenizer, saes, causal, cards, cfg) if causal else []
    return {"features": [asdict(card) for card in cards], "saes": about, "samples": samples, "causal": causal and causal.summary}


def write_report(folder: str | Path, report: dict) -> Path:
    """Write report.json and the page made of it alone, index.html -> the page's path."""
    folder = Path(folder)
    write_json(folder / "report.json", report)
    page = render_report(read_json(folder / "report.json"))
    write_whole(folder / "index.html", lambda file: file.write(page.encode()))
    return folder / "index.html"
