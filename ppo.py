"""RLHF by PPO: rollouts, losses, the loop, few numbers in place of many, the evaluation. What is learned stands in policies.py.

Dimension key: B episodes   T tokens of prompt and response   R response tokens   D hidden size   M MLP neurons   V vocabulary
               P held-out prompts

References:
    PPO: Schulman et al. 2017, arXiv:1707.06347;  GAE: Schulman et al. 2016, arXiv:1506.02438
    RLHF of language models: Ziegler et al. 2019, arXiv:1909.08593 ("Ziegler" below)
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from files import UserError
from policies import LORA_TARGETS, EditPolicy, Policy, Trunk
from pythia import Pythia, Tokenizer, pad, tempered
from reward import ScoreFn
from run import Run, check_finite, check_positive

SHARES = (0.25, 0.5, 0.75, 1.0)                      # of the learned change, where gain and KL are measured


@dataclass(frozen=True)
class PPOConfig:
    """--stage rlhf"""

    iterations: int = 20                 # rollouts, each followed by `epochs` passes over it
    episodes: int = 512                  # responses a rollout
    samples_per_prompt: int = 4          # responses to each prompt of a rollout
    prompt_tokens: int = 256             # longer prompts are left out; all are padded to the longest that is left
    response_tokens: int = 24            # R; a response is cut after its first end-of-text token
    temperature: float = 1.0             # of sampling, and of the policy's and the reference's logprobs alike
    epochs: int = 1                      # passes over a rollout (Ziegler: 4; steps are small here, and a new rollout is worth more)
    minibatches: int = 4                 # optimizer steps a pass
    micro_batch: int = 64                # episodes a forward pass; lower it to save memory
    generate_batch: int = 512            # responses sampled at once; lower it to save memory (keys and values of all of them)
    recompute: bool = False              # recompute activations in the backward pass: less memory, a third more time
    lora_rank: int = 8                   # of --policy lora
    lora_targets: tuple[str, ...] = LORA_TARGETS         # layers that get an adapter
    lr: float = 0.0                      # Adam, falls linearly; 0: the policy's own, 0.6 for coefficients, 0.04 steer, 1e-3 adapters, 5e-5 weights
    critic_lr: float = 3e-3              # of the value head
    gamma: float = 1.0                   # discount
    lam: float = 0.7                     # λ of GAE (Ziegler: 0.95); README, Departures, says why
    clip: float = 0.2                    # of the ratio, and of the value around its old value
    kl_coef: float = 0.05                # β at the start, with scores of unit standard deviation
    kl_target: float = 6.0               # nats a response that the controller of β aims at (Ziegler)
    kl_horizon: float = 10.0             # iterations; 10,000 episodes in Ziegler's code
    keep: int = 0                        # how many numbers an edit may move in the end, chosen after ¾ of the iterations (see keep_few); 0: all
    keep_rollouts: int = 4               # with `keep`: rollouts of the reference by which they are chosen
    kl_stop: float = 20.0                # nats a response; a policy farther than this from the reference has diverged, and training ends
    eval_size: int = 128                 # held-out prompts of an evaluation, the first of their file
    eval_samples: int = 8                # samples for each of them
    checkpoint_seconds: float = 120.0    # between resumable states

    def __post_init__(self):
        check_positive(self, "rlhf", "iterations", "episodes", "samples_per_prompt", "prompt_tokens", "response_tokens", "temperature", "epochs",
                       "minibatches", "micro_batch", "generate_batch", "lora_rank", "critic_lr", "clip", "kl_target", "kl_horizon",
                       "keep_rollouts", "kl_stop", "eval_size", "eval_samples")
        if min(self.lr, self.kl_coef, self.keep) < 0 or not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1):
            raise UserError("--rlhf-lr, --rlhf-kl-coef and --rlhf-keep must not be negative, --rlhf-gamma and --rlhf-lam lie between 0 and 1")
        if self.episodes % self.samples_per_prompt or self.episodes % self.minibatches:
            raise UserError("--rlhf-episodes must be a multiple of --rlhf-samples-per-prompt and of --rlhf-minibatches")
        if not self.lora_targets or set(self.lora_targets) - set(LORA_TARGETS):
            raise UserError(f"--rlhf-lora-targets {','.join(self.lora_targets)}: choose from {', '.join(LORA_TARGETS)}")
        if self.keep and self.iterations < 2:
            raise UserError("--rlhf-keep chooses after three quarters of the iterations: --rlhf-iterations must be 2 or more")


class Critic(nn.Module):
    """V_t = a_t s_t + w_t · h_t / √D + b_t: the return from response token t on (the score, less β times the KL still to come), with weights
    of each position's own.

    s_t is the (standardised) score of the text before response token t, where the reward can be asked for it, and h_t the
    *reference's* final hidden state there: no transformer pass of the critic's own. At the start V_t = s_t.
    """

    def __init__(self, hidden_size: int, response_tokens: int, device: torch.device):
        super().__init__()
        self.prefix_R = nn.Parameter(torch.ones(response_tokens, device=device))
        self.weight_RD = nn.Parameter(torch.zeros(response_tokens, hidden_size, device=device))
        self.bias_R = nn.Parameter(torch.zeros(response_tokens, device=device))

    def forward(self, prefix_scores_BR: Tensor, ref_hidden_BRD: Tensor) -> Tensor:
        """-> values_BR"""
        from_hidden_BR = (ref_hidden_BRD.float() * self.weight_RD).sum(-1) / ref_hidden_BRD.shape[-1] ** 0.5
        return self.prefix_R * prefix_scores_BR + from_hidden_BR + self.bias_R


# ----------------------------------------------------------------------------------------------------------------- rollouts

class Rollout(NamedTuple):
    """Episodes of one iteration. Prompts are padded on the left to one length, so the last R columns are the response."""
    tokens_BT: Tensor
    mask_BT: Tensor                      # 1: prompt, and response up to and including its first end-of-text token
    mask_BR: Tensor                      # that of the response
    trunk: Trunk
    logprobs_BR: Tensor                  # of the policy that sampled
    ref_logprobs_BR: Tensor
    kl_BR: Tensor                        # exact KL(policy ‖ reference) of each next-token distribution, nats; 0 outside the mask
    entropy_BR: Tensor                   # of the policy's next-token distribution, nats; 0 outside the mask
    scores_B: Tensor | None = None       # standardised, as are the prefix scores; filled in by `score`
    prefix_scores_BR: Tensor | None = None
    values_BR: Tensor | None = None      # of the critic, before this iteration's updates

    @property
    def mean_kl(self) -> float:
        """Nats a response."""
        return self.kl_BR.sum(1).mean().item()


def select(value: Any, rows: Tensor | slice) -> Any:
    """-> the given rows (episodes) of a tensor, of all in a named tuple, or of None."""
    if isinstance(value, tuple):
        return type(value)(*(select(part, rows) for part in value))
    return None if value is None else value[rows]


def join(parts: Sequence) -> Any:
    """The reverse of `select`: one value of many parts, in order."""
    first = parts[0]
    if isinstance(first, tuple):
        return type(first)(*map(join, zip(*parts)))
    return None if first is None else torch.cat(parts)


@torch.no_grad()
def collect_rollouts(policy: Policy, prompt_BT: Tensor, prompt_mask_BT: Tensor, end_of_text: int, cfg: PPOConfig,
                     generator: torch.Generator) -> Rollout:
    """Sample one response a row of the prompts, and compute what a Rollout holds but scores and values (see `score`), in micro-batches."""
    parts = []
    for rows in slices(len(prompt_BT), cfg.generate_batch):
        record = []                                  # (resid, mlp, neurons) of the prompts, then of each new token but the last
        tokens_BT, mask_BT = respond(policy.model, policy.edits, prompt_BT[rows], prompt_mask_BT[rows], end_of_text, cfg, generator, record)
        recorded = [torch.cat(pieces, dim=1) for pieces in zip(*record)]
        parts += [make_rollout(policy, tokens_BT[micro], mask_BT[micro], cfg, [x[micro] for x in recorded])
                  for micro in slices(len(tokens_BT), cfg.micro_batch)]
    return join(parts)


def slices(length: int, size: int) -> Iterator[slice]:
    """-> consecutive slices of at most `size` that cover `length`."""
    return (slice(start, start + size) for start in range(0, length, size))


def respond(model: Pythia, edits: dict, prompt_BT: Tensor, prompt_mask_BT: Tensor, end_of_text: int, cfg: PPOConfig,
            generator: torch.Generator, record: list | None = None) -> tuple[Tensor, Tensor]:
    """-> tokens_BT of prompt and response, mask_BT; what follows a response's first end-of-text token is masked out. `record` (see
    Pythia.generate) only with at most generate_batch rows."""
    R = cfg.response_tokens
    tokens_BT = torch.cat([model.generate(prompt_BT[rows], R, prompt_mask_BT[rows], cfg.temperature, edits, generator, record)
                           for rows in slices(len(prompt_BT), cfg.generate_batch)])
    ended_BR = (tokens_BT[:, -R:] == end_of_text).long()
    mask_BR = (ended_BR.cumsum(1) - ended_BR == 0).long()
    return tokens_BT, torch.cat([prompt_mask_BT, mask_BR], dim=1)


@torch.no_grad()
def make_rollout(policy: Policy, tokens_BT: Tensor, mask_BT: Tensor, cfg: PPOConfig, recorded: Sequence[Tensor] = ()) -> Rollout:
    """Compute logprobs (through the training path, so that the first ratio is exactly 1), KL and entropy of responses. For `recorded`, see
    EditPolicy.observe."""
    R = cfg.response_tokens
    mask_BR, response_BR = mask_BT[:, -R:], tokens_BT[:, -R:]
    trunk = policy.observe(tokens_BT, mask_BT, R, recorded)
    logp_BRV = next_logprobs(policy.model, policy.hidden(tokens_BT, mask_BT, R, trunk), cfg.temperature)
    ref_logp_BRV = next_logprobs(policy.reference, trunk.ref_hidden_BRD, cfg.temperature)
    logprobs_BR, ref_logprobs_BR, p_BRV = pick(logp_BRV, response_BR), pick(ref_logp_BRV, response_BR), logp_BRV.exp()
    entropy_BR = -torch.linalg.vecdot(p_BRV, logp_BRV) * mask_BR
    kl_BR = torch.linalg.vecdot(p_BRV, logp_BRV.sub_(ref_logp_BRV)) * mask_BR            # in place: these are the largest tensors of all
    return Rollout(tokens_BT, mask_BT, mask_BR, trunk, logprobs_BR, ref_logprobs_BR, kl_BR, entropy_BR)


def next_logprobs(model: Pythia, hidden_BRD: Tensor, temperature: float) -> Tensor:
    """-> log-probabilities of the next token, logprobs_BRV: of logits in the model's dtype, but computed in float32 or better."""
    logits_BRV = model.embed_out(hidden_BRD.contiguous())           # one matrix product, where a slice of T would become B small ones
    return torch.log_softmax(tempered(logits_BRV, temperature), dim=-1)


def response_logprobs(policy: Policy, batch: Rollout, cfg: PPOConfig) -> Tensor:
    """-> logprobs_BR of responses by the policy as it is now; of an edited model only the layers above the lowest edit are run."""
    hidden_BRD = policy.hidden(batch.tokens_BT, batch.mask_BT, cfg.response_tokens, batch.trunk)
    return pick(next_logprobs(policy.model, hidden_BRD, cfg.temperature), batch.tokens_BT[:, -cfg.response_tokens:])


def pick(logprobs_BRV: Tensor, tokens_BR: Tensor) -> Tensor:
    """-> the logprob of each token that was sampled, logprobs_BR."""
    return logprobs_BRV.gather(-1, tokens_BR[..., None]).squeeze(-1)


# --------------------------------------------------------------------------------------------------- rewards and advantages

def kl_rewards(logprobs_BR: Tensor, ref_logprobs_BR: Tensor, scores_B: Tensor, mask_BR: Tensor, kl_coef: float) -> Tensor:
    """r_t = −kl_coef · (logπ_t − logπref_t), plus the score on the last response token -> rewards_BR, 0 outside the mask."""
    rewards_BR = -kl_coef * (logprobs_BR - ref_logprobs_BR) * mask_BR
    last_B = mask_BR.sum(1).long() - 1
    rewards_BR[torch.arange(len(scores_B), device=scores_B.device), last_B] += scores_B.to(rewards_BR.dtype)
    return rewards_BR


def gae(rewards_BR: Tensor, values_BR: Tensor, mask_BR: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation -> (advantages_BR, returns_BR), 0 outside the mask.

    δ_t = r_t + γ V_{t+1} − V_t,  A_t = δ_t + γ λ A_{t+1},  return = A_t + V_t; the value after the last token is 0.
    """
    rewards_BR, values_BR = rewards_BR * mask_BR, values_BR * mask_BR
    advantages_BR = torch.zeros_like(rewards_BR)
    next_value_B = next_advantage_B = torch.zeros_like(rewards_BR[:, 0])
    for t in reversed(range(rewards_BR.shape[1])):
        delta_B = rewards_BR[:, t] + gamma * next_value_B - values_BR[:, t]
        advantages_BR[:, t] = next_advantage_B = (delta_B + gamma * lam * next_advantage_B) * mask_BR[:, t]
        next_value_B = values_BR[:, t]
    return advantages_BR, advantages_BR + values_BR


def whiten(x_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """(x − mean) / √(var + 1e-8) over the mask, biased variance (Ziegler); 0 outside the mask."""
    mean = masked_mean(x_BR, mask_BR)
    variance = masked_mean((x_BR - mean).square(), mask_BR)
    return (x_BR - mean) * torch.rsqrt(variance + 1e-8) * mask_BR


def masked_mean(x_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """-> the mean over the mask, a scalar."""
    return (x_BR * mask_BR).sum() / mask_BR.sum()


class AdaptiveKL:
    """β ← β (1 + clip(KL / target − 1, ±0.2) / horizon), once an iteration (Ziegler; their horizon counts episodes)."""

    def __init__(self, coef: float, target: float, horizon: float):
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float) -> None:
        self.coef *= 1 + max(-0.2, min(0.2, kl / self.target - 1)) / self.horizon


class Losses(NamedTuple):
    """Scalars, under the names of the log."""
    loss: Tensor                         # the sum of the two below: what is minimised
    policy_loss: Tensor
    value_loss: Tensor
    approx_kl: Tensor                    # ½ mean (logπ − logπold)², how far the policy is from the one that sampled
    clipfrac: Tensor                     # share of tokens where the clip decides the loss
    vf_clipfrac: Tensor
    ratio: Tensor                        # mean of π / πold


def ppo_loss(logprobs_BR: Tensor, values_BR: Tensor, batch: Rollout, advantages_BR: Tensor, returns_BR: Tensor, cfg: PPOConfig) -> Losses:
    """Clipped surrogate and clipped value loss, means over the mask (Schulman et al. 2017; Ziegler):

        max(−A ρ, −A clip(ρ, 1 ± ε)),  ρ = π / πold      ½ max((V − return)², (Vold + clip(V − Vold, ±ε) − return)²)

    Ziegler weighs the second by 0.1, where the critic shares the policy's weights. Here it does not, and Adam's steps do not see a factor.
    """
    mask_BR = batch.mask_BR
    log_ratio_BR = (logprobs_BR - batch.logprobs_BR) * mask_BR
    ratio_BR = log_ratio_BR.exp()
    plain_BR = -advantages_BR * ratio_BR
    clipped_BR = -advantages_BR * ratio_BR.clamp(1 - cfg.clip, 1 + cfg.clip)
    near_values_BR = batch.values_BR + (values_BR - batch.values_BR).clamp(-cfg.clip, cfg.clip)
    error_BR, near_error_BR = (values_BR - returns_BR).square(), (near_values_BR - returns_BR).square()
    policy_loss = masked_mean(torch.maximum(plain_BR, clipped_BR), mask_BR)
    value_loss = 0.5 * masked_mean(torch.maximum(error_BR, near_error_BR), mask_BR)
    return Losses(policy_loss + value_loss, policy_loss, value_loss, 0.5 * masked_mean(log_ratio_BR.square(), mask_BR),
                  masked_mean((clipped_BR > plain_BR).float(), mask_BR), masked_mean((near_error_BR > error_BR).float(), mask_BR),
                  masked_mean(ratio_BR, mask_BR))


# ----------------------------------------------------------------------------------------------------------------- the loop

class Prompts:
    """Token ids of prompts, each after an end-of-text token, padded on the left to one length: tokens_BT, mask_BT. Prompts of more than
    `longest` tokens, that one included, or too long for the model's context with a response after them, are left out; UserError where none
    is left."""

    def __init__(self, texts: list[str], tokenizer: Tokenizer, response_tokens: int, max_positions: int, device: torch.device,
                 longest: int = 256, number: int | None = None):
        limit = min(longest, max_positions - response_tokens)
        rows = [[tokenizer.end_of_text, *tokenizer.encode(text)] for text in texts]
        fitting = [row for row in rows if len(row) <= limit]
        told = f"{len(rows) - len(fitting)} of {len(rows)} prompts have more than {limit} tokens (--rlhf-prompt-tokens, or the model's context)"
        if not fitting:
            raise UserError(f"{told}: shorten them")
        if len(fitting) < len(rows):
            print(f"{told}: left out")
        self.tokens_BT, self.mask_BT = pad(fitting[:number], tokenizer.end_of_text, "left", device)
        self.end_of_text = tokenizer.end_of_text

    def draw(self, number: int, repeats: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """-> tokens and mask of `number` prompts at random, each `repeats` times; in one call none is drawn again before all were."""
        rounds = -(-number // len(self.tokens_BT))
        order = torch.cat([torch.randperm(len(self.tokens_BT), generator=generator) for _ in range(rounds)])[:number]
        order = order.repeat_interleave(repeats).to(self.tokens_BT.device)
        return self.tokens_BT[order], self.mask_BT[order]


def train_ppo(policy: Policy, prompts: Prompts, score_fn: ScoreFn, cfg: PPOConfig, run: Run,
              generator: torch.Generator) -> Policy:
    """PPO with a per-token KL penalty against the reference -> the policy, trained in place."""
    critic = Critic(policy.model.cfg.hidden_size, cfg.response_tokens, policy.model.device)
    policy.model.recompute = cfg.recompute
    learns = {}                                      # 1 for the numbers that may move; a tensor that it does not name moves as a whole
    if cfg.keep and any(".vector_" in name for name in policy.trainable()):
        learns = {name: torch.full_like(p, float(".vector_" in name)) for name, p in policy.state_dict().items()}
    rates = (*policy.learning_rates(cfg.lr, learns), (list(critic.parameters()), cfg.critic_lr))
    # foreach=False, one tensor after the other: PyTorch's default on a GPU, all at once, takes another copy of the trained weights.
    optimizer = torch.optim.Adam([{"params": params, "peak": peak} for params, peak in rates], eps=1e-5, foreach=False)      # ε: Ziegler
    penalty = AdaptiveKL(cfg.kl_coef, cfg.kl_target, cfg.kl_horizon)
    standardize = Standardize.by_reference(policy, prompts, score_fn, cfg, generator)

    parts = {"policy": policy, "learns": learns, "critic": critic, "optimizer": optimizer, "kl": vars(penalty),      # vars: its attributes themselves
             "generator": generator}
    first = run.restore(**parts)
    bar = tqdm(range(first, cfg.iterations), desc="rlhf", initial=first, total=cfg.iterations)
    for iteration in bar:
        start = time.monotonic()
        if cfg.keep and iteration == cfg.iterations * 3 // 4:
            learns.update(keep_few(policy, prompts, cfg, generator))
            for (params, peak), group in zip(policy.learning_rates(cfg.lr, learns), optimizer.param_groups):       # the critic's is the last
                group["peak"] = peak
                for p in params:
                    optimizer.state.pop(p)           # Adam would go on moving what is to stay
        drawn = prompts.draw(cfg.episodes // cfg.samples_per_prompt, cfg.samples_per_prompt, generator)
        rollout = collect_rollouts(policy, *drawn, prompts.end_of_text, cfg, generator)
        rollout = score(rollout, score_fn, standardize, critic, cfg)
        where = f"rlhf, step {iteration}"
        check_finite(where, activation=rollout.trunk.ref_hidden_BRD, reward=rollout.scores_B, value=rollout.values_BR, kl=rollout.kl_BR)
        if rollout.mean_kl > cfg.kl_stop:
            run.log(step=iteration, kl=rollout.mean_kl, diverged=True)
            break
        rewards_BR = kl_rewards(rollout.logprobs_BR, rollout.ref_logprobs_BR, rollout.scores_B, rollout.mask_BR, penalty.coef)
        advantages_BR, returns_BR = gae(rewards_BR, rollout.values_BR, rollout.mask_BR, cfg.gamma, cfg.lam)
        advantages_BR = whiten(advantages_BR, rollout.mask_BR)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (1 - iteration / cfg.iterations)
        figures = update_policy(policy, critic, optimizer, learns, rollout, advantages_BR, returns_BR, cfg, generator, where)
        figures |= rollout_figures(rollout, rollout.scores_B * standardize.std + standardize.mean, returns_BR, penalty.coef, prompts.end_of_text)
        penalty.update(rollout.mean_kl)
        figures |= {"n_changed": policy.n_changed(), "seconds": time.monotonic() - start}
        run.log(step=iteration, **figures)
        bar.set_postfix(score=f"{figures['score']:.2f}", kl=f"{figures['kl']:.2f}", changed=figures["n_changed"])
        run.checkpoint(iteration + 1, cfg.checkpoint_seconds, **parts)
    if cfg.keep:
        if policy.n_changed() > cfg.keep or any(p.any() for name, p in policy.state_dict().items() if ".vector_" in name):
            keep_few(policy, prompts, cfg, generator)              # it diverged before they were chosen
        for edit in policy.edits.values():
            edit.vector_D = None                     # it is 0 now
    return policy


def update_policy(policy: Policy, critic: Critic, optimizer: torch.optim.Optimizer, learns: dict[str, Tensor], rollout: Rollout,
                  advantages_BR: Tensor, returns_BR: Tensor, cfg: PPOConfig, generator: torch.Generator, where: str) -> dict:
    """`epochs` passes over the rollout in shuffled minibatches -> means of the losses over all of them."""
    size, figures = cfg.episodes // cfg.minibatches, []
    for _ in range(cfg.epochs):
        for rows in torch.randperm(cfg.episodes, generator=generator).to(advantages_BR.device).split(size):
            for micro in rows.split(cfg.micro_batch):              # gradients add up over micro-batches
                batch = select(rollout, micro)
                logprobs_BR = response_logprobs(policy, batch, cfg)
                values_BR = critic(batch.prefix_scores_BR, batch.trunk.ref_hidden_BRD)
                losses = ppo_loss(logprobs_BR, values_BR, batch, advantages_BR[micro], returns_BR[micro], cfg)
                share = batch.mask_BR.sum() / rollout.mask_BR[rows].sum()      # of the minibatch's tokens: the mean is over all of them
                (losses.loss * share).backward()
                figures.append(torch.stack([loss.detach() * share for loss in losses]))
            check_finite(where, optimizer, loss=torch.stack(figures))
            for name, p in policy.trainable().items():
                if name in learns:                   # a number whose gradient was always 0 stays *exactly* where it is in Adam
                    p.grad *= learns[name].to(p.device)
            optimizer.step()
            optimizer.zero_grad()                    # frees the gradients, which nobody needs while responses are sampled
    means = torch.stack(figures).sum(0) / (cfg.epochs * cfg.minibatches)
    return dict(zip(Losses._fields, means.tolist()))


def rollout_figures(rollout: Rollout, scores_B: Tensor, returns_BR: Tensor, kl_coef: float, end_of_text: int) -> dict:
    """Figures of one rollout for the log; scores as the reward model gives them."""
    mask_BR = rollout.mask_BR
    mean = masked_mean(returns_BR, mask_BR)
    variance = masked_mean((returns_BR - mean).square(), mask_BR)
    error = masked_mean((returns_BR - rollout.values_BR).square(), mask_BR)
    return {"score": scores_B.mean().item(), "score_std": scores_B.std().item(), "kl": rollout.mean_kl, "kl_coef": kl_coef,
            "entropy": masked_mean(rollout.entropy_BR, mask_BR).item(), "returns_mean": mean.item(), "returns_var": variance.item(),
            "var_explained": (1 - error / variance.clamp(min=1e-12)).item(), "response_tokens": mask_BR.sum(1).float().mean().item(),
            "ended": (rollout.tokens_BT[:, -mask_BR.shape[1]:] == end_of_text).any(1).float().mean().item()}


@torch.no_grad()
def score(rollout: Rollout, score_fn: ScoreFn, standardize: "Standardize", critic: Critic, cfg: PPOConfig) -> Rollout:
    """-> the rollout with its scores and the critic's values.

    A score_fn that can tell the scores of a response's beginnings, `score_fn.prefixes(tokens_BT, mask_BT, R) -> (B, R + 1)`, with 0 to R
    of its tokens, gives the critic most of what it needs: a reward model's score of half a response says much of its score in the end.
    Less noise in the advantages is what a few thousand coefficients need most.
    """
    if hasattr(score_fn, "prefixes"):
        scores_BX = standardize(score_in_batches(score_fn.prefixes, rollout.tokens_BT, rollout.mask_BT, cfg.micro_batch, cfg.response_tokens))
        # X: R + 1 beginnings. A response's own score is that of all its tokens, of which it may have fewer than R.
        scores_B, prefix_scores_BR = scores_BX.gather(1, rollout.mask_BR.sum(1, keepdim=True)).squeeze(1), scores_BX[:, :-1]
    else:
        scores_B = standardize(score_in_batches(score_fn, rollout.tokens_BT, rollout.mask_BT, cfg.micro_batch))
        prefix_scores_BR = torch.zeros_like(rollout.logprobs_BR)
    return rollout._replace(scores_B=scores_B, prefix_scores_BR=prefix_scores_BR, values_BR=critic(prefix_scores_BR, rollout.trunk.ref_hidden_BRD))


@torch.no_grad()
def score_in_batches(score_fn: Callable[..., Tensor], tokens_BT: Tensor, mask_BT: Tensor, size: int, *options: int) -> Tensor:
    """-> what score_fn gives, for all episodes, in float32."""
    return torch.cat([score_fn(tokens_BT[rows], mask_BT[rows], *options).float() for rows in slices(len(tokens_BT), size)])


class Standardize(NamedTuple):
    """Scores to mean 0 and standard deviation 1 on the reference's samples, so that clips and β mean the same for every reward."""
    mean: float
    std: float

    @classmethod
    def by_reference(cls, policy: Policy, prompts: Prompts, score_fn: ScoreFn, cfg: PPOConfig, generator: torch.Generator) -> "Standardize":
        """By 256 samples of the reference (Ziegler)."""
        drawn = prompts.draw(256, 1, generator)
        tokens_BT, mask_BT = respond(policy.reference, None, *drawn, prompts.end_of_text, cfg, generator)
        scores_B = score_in_batches(score_fn, tokens_BT, mask_BT, cfg.micro_batch)
        return cls(scores_B.mean().item(), spread(scores_B).item())

    def __call__(self, scores: Tensor) -> Tensor:
        return (scores - self.mean) / self.std


def spread(scores_B: Tensor) -> Tensor:
    """-> their standard deviation; 1 where all are equal, as by a rare word to avoid, so that the score keeps its own units."""
    std = scores_B.std()
    return torch.where(std > 1e-6, std, 1.0)


# ------------------------------------------------------------------------------------------------------------ few numbers

def keep_few(policy: EditPolicy, prompts: Prompts, cfg: PPOConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Express what a policy has learned with `cfg.keep` of its coefficients and biases alone, those that together come nearest to it, and put
    all others, and vectors, back to their start exactly -> by parameter, 1 for the numbers that are kept.

    Nearest in KL: near the reference, policies moved by δ and by δ' are ½ mean (s·δ − s·δ')² nats apart, with s an episode's gradient of
    log π; here from `cfg.keep_rollouts` rollouts of the reference. N: their episodes, K: all coefficients and biases.
    """
    numbers, start, parts = policy.state_dict(), policy.part_way(0.0), []
    moved = {name: p - start[name] for name, p in numbers.items()}
    with policy.holding(start):
        for _ in tqdm(range(cfg.keep_rollouts), desc="keep"):
            drawn = prompts.draw(cfg.episodes // cfg.samples_per_prompt, cfg.samples_per_prompt, generator)
            rollout = collect_rollouts(policy, *drawn, prompts.end_of_text, cfg, generator)
            parts += [episode_gradients(policy, select(rollout, rows), cfg) for rows in slices(cfg.episodes, cfg.micro_batch)]
    grads = {name: torch.cat([part[name] for part in parts]) for name in numbers}
    learned_N = sum(grads[name] @ step for name, step in moved.items())                        # s·δ of all that was learned
    candidates = [name for name in numbers if ".vector_" not in name]
    grad_NK = torch.cat([grads[name] for name in candidates], 1)
    chosen_C, step_C = forward_selection(grad_NK, grad_NK.T @ learned_N / len(learned_N), cfg.keep)
    sizes, zeros_K = [numbers[name].numel() for name in candidates], torch.zeros_like(grad_NK[0])
    steps = dict(zip(candidates, zeros_K.index_copy(0, chosen_C, step_C).split(sizes)))
    kept = dict(zip(candidates, zeros_K.index_fill(0, chosen_C, 1.0).split(sizes)))
    policy.load_state_dict({name: p + steps.get(name, 0.0) for name, p in start.items()})
    return {name: kept.get(name, torch.zeros_like(p)) for name, p in start.items()}


def episode_gradients(policy: EditPolicy, batch: Rollout, cfg: PPOConfig) -> dict[str, Tensor]:
    """-> the gradient of an episode's log π by each of the policy's numbers, {name: (B, numbers)}; for a policy at its start, where every
    change is 0. One backward pass to the residual stream after each edited layer tells them all."""
    probes = {layer: torch.zeros_like(batch.trunk.resid_BTD, requires_grad=True) for layer in policy.edits}
    features = {policy.lowest: batch.trunk.features}

    def watch(layer: int, mlp_BTD: Tensor, neurons_BTM: Tensor) -> Tensor:
        features[layer] = policy.edits[layer].encode(mlp_BTD.detach(), neurons_BTM.detach())
        return probes[layer]

    edits = {layer: functools.partial(watch, layer) for layer in policy.edits}
    # Not with last=R: the last layer may be edited, and its probe has all positions.
    hidden_BTD = policy.model.hidden_from(batch.trunk.resid_BTD + probes[policy.lowest], policy.lowest, batch.mask_BT[:, :-1], edits)
    logp_BRV = next_logprobs(policy.model, hidden_BTD[:, -cfg.response_tokens:], cfg.temperature)
    logprobs_BR = pick(logp_BRV, batch.tokens_BT[:, -cfg.response_tokens:])
    gradients = torch.autograd.grad((logprobs_BR * batch.mask_BR).sum(), list(probes.values()))
    return {f"{layer}.{name}": value for layer, gradient_BTD in zip(probes, gradients)
            for name, value in policy.edits[layer].gradients(features[layer], gradient_BTD).items()}


def forward_selection(grad_NK: Tensor, target_K: Tensor, number: int, ridge: float = 0.03) -> tuple[Tensor, Tensor]:
    """Solve F δ = target with only `number` of the K entries of δ other than 0 -> their indices in the order of choice, and their values.

    F is the Fisher information, the mean of s sᵀ over N episodes' gradients s of log π (`grad_NK`); ½ δᵀFδ is the KL of a small step. With
    target = Fδ*, δ is the nearest in KL to a step δ*; with the policy gradient g it is the natural gradient F⁻¹g (Kakade 2001;
    tests/capacity.py). The numbers are chosen one by one, each time the one with the largest residual: orthogonal matching pursuit
    (Pati et al. 1993), in units in which F has diagonal 1, with a ridge against noise. Features that say the same are not chosen twice.
    """
    N, rms_K = len(grad_NK), grad_NK.square().mean(0).sqrt().clamp(min=1e-8)
    grad_NK, target_K = grad_NK / rms_K, target_K / rms_K
    chosen_C, residual_K = [], target_K.abs()        # C: those chosen so far
    for _ in range(min(number, len(residual_K))):
        chosen_C.append(int(residual_K.argmax()))
        some_NC = grad_NK[:, chosen_C]
        step_C = torch.linalg.solve(some_NC.T @ some_NC / N + ridge * torch.eye(len(chosen_C), device=some_NC.device), target_K[chosen_C])
        residual_K = (target_K - grad_NK.T @ (some_NC @ step_C) / N).abs()
        residual_K[chosen_C] = -1.0
    return torch.tensor(chosen_C, device=residual_K.device), step_C / rms_K[chosen_C]


# --------------------------------------------------------------------------------------------------------------- evaluation

class Evaluated(NamedTuple):
    """What an evaluation measured, and the samples it measured it on."""
    figures: dict[str, float]
    tokens_BT: Tensor                    # the policy's samples on the held-out prompts
    mask_BT: Tensor
    scores_B: Tensor
    prompt_means: dict[str, list[float]] = {}        # gain and KL of each prompt, for intervals over prompts


class Evaluation:
    """The same for every policy: held-out prompts, `eval_samples` samples each, policy and reference drawn with the same uniforms,
    so that with nothing learned the texts are equal. Standard errors (`_se`) are over prompts, whose samples are averaged first.

    score_gain_std   (mean policy score − mean reference score) / std of all reference scores
    reward_loss      mean −log σ(score_policy − score_ref), sample by sample: the reward model's own loss on "the policy's answer
                     is better"; exactly ln 2 with nothing learned
    kl               mean over the policy's samples of the exact KL(policy ‖ reference) summed over the response, nats
    entropy          mean entropy of the policy's next-token distributions, nats a token (as KL and perplexity, at --rlhf-temperature)
    distinct_2       share of different ones among all pairs of neighbouring response tokens; ref_distinct_2: of the reference's samples
    ref_perplexity   of the policy's responses under the reference
    """

    def __init__(self, reference: Pythia, prompts: Prompts, score_fn: ScoreFn, cfg: PPOConfig, seed: int):
        self.prompts, self.score_fn, self.cfg, self.seed = prompts, score_fn, cfg, seed
        self.reference = self.samples(reference, None)

    def samples(self, model: Pythia, edits: dict) -> Evaluated:
        """Sample and score, the same uniforms in every call."""
        generator = torch.Generator().manual_seed(self.seed)
        return self.scored(*respond(model, edits, *self.each_prompt(), self.prompts.end_of_text, self.cfg, generator))

    def each_prompt(self) -> tuple[Tensor, Tensor]:
        """-> tokens and mask of the held-out prompts, each `eval_samples` times."""
        return tuple(t.repeat_interleave(self.cfg.eval_samples, 0) for t in (self.prompts.tokens_BT, self.prompts.mask_BT))

    def scored(self, tokens_BT: Tensor, mask_BT: Tensor) -> Evaluated:
        """-> samples with their scores, no figures yet."""
        return Evaluated({}, tokens_BT, mask_BT, score_in_batches(self.score_fn, tokens_BT, mask_BT, self.cfg.micro_batch))

    def __call__(self, policy: Policy) -> Evaluated:
        """-> figures, samples and scores of the policy."""
        (prompt_BT, prompt_mask_BT), generator = self.each_prompt(), torch.Generator().manual_seed(self.seed)
        parts = (collect_rollouts(policy, prompt_BT[rows], prompt_mask_BT[rows], self.prompts.end_of_text, self.cfg, generator)
                 for rows in slices(len(prompt_BT), self.cfg.generate_batch))
        rollout = join([part._replace(trunk=None) for part in parts])
        sampled, mask_BR, kl_B = self.scored(rollout.tokens_BT, rollout.mask_BT), rollout.mask_BR, rollout.kl_BR.sum(1)
        rise_B, std = sampled.scores_B - self.reference.scores_B, spread(self.reference.scores_B)
        return sampled._replace(figures={
            "score_ref": self.reference.scores_B.mean().item(), "score_ref_std": self.reference.scores_B.std().item(),
            "score_policy": sampled.scores_B.mean().item(),
            **self.mean_and_error("score_gain_std", rise_B / std), **self.mean_and_error("reward_loss", -F.logsigmoid(rise_B)),
            **self.mean_and_error("kl", kl_B), "entropy": masked_mean(rollout.entropy_BR, mask_BR).item(),
            "distinct_2": distinct_2(sampled, mask_BR.shape[1]), "ref_distinct_2": distinct_2(self.reference, mask_BR.shape[1]),
            "ref_perplexity": masked_mean(rollout.ref_logprobs_BR, mask_BR).neg().exp().item()},
            prompt_means={name: by_prompt(x_B, self.cfg.eval_samples).tolist() for name, x_B in (("gains", rise_B / std), ("kls", kl_B))})

    def frontier(self, policy: Policy) -> Iterator[tuple[float, Evaluated]]:
        """-> (share, what was measured) with the learned numbers taken a quarter, half, three quarters and all of the way that they have gone.

        So is gain known at smaller KLs than the run ended at (as by Ramé et al. 2024, arXiv:2406.16768, of all weights). A run passes such KLs
        in training too, but right after its first, large and noisy steps, with less gain.
        """
        for share in SHARES:
            with policy.holding(policy.part_way(share)):
                measured = self(policy)
            yield share, measured

    def gain_by(self, score_fn: ScoreFn, sampled: Evaluated, name: str) -> dict:
        """-> the gain of the same samples by another score function, in its own standard deviations on the reference's samples."""
        before_B, after_B = (score_in_batches(score_fn, s.tokens_BT, s.mask_BT, self.cfg.micro_batch) for s in (self.reference, sampled))
        return self.mean_and_error(f"{name}_gain_std", (after_B - before_B) / spread(before_B))

    def mean_and_error(self, name: str, x_B: Tensor) -> dict[str, float]:
        """-> mean and its standard error over prompts."""
        mean_P = by_prompt(x_B, self.cfg.eval_samples)
        return {name: mean_P.mean().item(), f"{name}_se": (mean_P.std() / len(mean_P) ** 0.5).item()}


def by_prompt(x_B: Tensor, samples: int) -> Tensor:
    """-> the mean over each prompt's samples, x_P in float64."""
    return x_B.double().cpu().view(-1, samples).mean(1)


def distinct_2(sampled: Evaluated, R: int) -> float:
    """-> share of different ones among all pairs of neighbouring response tokens: it falls when a policy repeats itself."""
    tokens_BR, mask_BR = sampled.tokens_BT[:, -R:], sampled.mask_BT[:, -R:].bool()
    pairs = torch.stack([tokens_BR[:, :-1], tokens_BR[:, 1:]], -1)[mask_BR[:, 1:]]
    return len(pairs.unique(dim=0)) / max(1, len(pairs))
