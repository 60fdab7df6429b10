"""How much reward can a policy buy per nat, to first order? One JSON line a policy, without any training.

    python tests/capacity.py --out runs/tiny --layer 2 --reward tiny-reward          (about 5 minutes on 2 cores; the SAE must be there)

Near the reference, moving a policy's numbers by δ gains g·δ and costs ½ δᵀFδ nats, g the gradient of the mean score and F the Fisher
information. The best δ (the natural gradient) gains √(2 gᵀF⁻¹g · KL): printed is its gain at 1 nat, in standard deviations of the reference's
scores. g and F are estimated on one half of the reference's episodes and the gain is measured on the other half, both ways round: noise that
was fitted does not count. With --keep, only so many numbers move, chosen by `ppo.forward_selection` on the first half.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import policies  # noqa: E402
import ppo  # noqa: E402
import reward  # noqa: E402
import sae  # noqa: E402
import train  # noqa: E402
from files import read_json  # noqa: E402
from pythia import Pythia, Tokenizer  # noqa: E402

RIDGE = 1.0              # added to F where its diagonal is 1


def gradients(args: argparse.Namespace) -> dict[str, tuple[Tensor, ...]]:
    """-> by policy, for each episode N and number K: the gradients of log π (s_NK), of GAE's advantages' weighted log π with λ as in training
    (choice_NK), and with λ = 1, which is unbiased (gain_NK)."""
    model, tokenizer, cfg = Pythia.from_pretrained(args.model, dtype=torch.float32), Tokenizer.from_pretrained(args.model), ppo.PPOConfig()
    layer, mlp = args.layer, model.gpt_neox.layers[args.layer].mlp
    folder = train.sae_folder(argparse.Namespace(out=args.out, middle=model.cfg.num_layers // 2), layer)
    trained = sae.load_sae(folder, model=model, model_name=args.model, layer=layer)
    generator = torch.Generator().manual_seed(args.seed)
    dictionaries = {"coef": trained, "random": sae.random_dictionary(trained, generator, l0=read_json(folder / "metrics.json")["l0"])}
    score_fn = reward.load_reward(args.reward, tokenizer)
    prompts = train.load_prompts("assets/prompts.txt", model, tokenizer, cfg)
    policy, critic = policies.make_policy("steer", model, [layer], {}, cfg), ppo.Critic(model.cfg.hidden_size, cfg.response_tokens, model.device)
    standardize, found = ppo.Standardize.by_reference(policy, prompts, score_fn, cfg, generator), {}
    for _ in tqdm(range(args.episodes // cfg.episodes)):
        rollout = ppo.collect_rollouts(policy, *prompts.draw(cfg.episodes // 4, 4, generator), prompts.end_of_text, cfg, generator)
        rollout = ppo.score(rollout, score_fn, standardize, critic, cfg)
        rewards_BR = ppo.kl_rewards(rollout.logprobs_BR, rollout.ref_logprobs_BR, rollout.scores_B, rollout.mask_BR, 0.0)
        weights = [rollout.mask_BR.float(), *(ppo.gae(rewards_BR, rollout.values_BR, rollout.mask_BR, 1.0, lam)[0] for lam in (cfg.lam, 1.0))]
        for rows in ppo.slices(cfg.episodes, cfg.micro_batch):
            batch = ppo.select(rollout, rows)
            with torch.no_grad():
                resid_BTD, mlp_BTD, neurons_BTM = model.trunk(batch.tokens_BT, layer, batch.mask_BT)
            hidden_BTD = model.hidden_from(resid_BTD.requires_grad_(True), layer, batch.mask_BT)
            logp_BRV = ppo.next_logprobs(model, hidden_BTD[:, -cfg.response_tokens - 1:-1], cfg.temperature)
            logprobs_BR = ppo.pick(logp_BRV, batch.tokens_BT[:, -cfg.response_tokens:])
            for i, weight_BR in enumerate(weights):
                gradient_BTD, = torch.autograd.grad((logprobs_BR * weight_BR[rows]).sum(), resid_BTD, retain_graph=i < 2)
                each = {"steer": gradient_BTD.sum(1), "bias": gradient_BTD.sum(1) @ trained.W_dec_FD.T,
                        "neurons": ((gradient_BTD @ mlp.dense_4h_to_h.weight) * neurons_BTM).sum(1)}
                each |= {name: ((gradient_BTD @ d.W_dec_FD.T) * d.encode(mlp_BTD)).sum(1) for name, d in dictionaries.items()}
                for name, value_BK in each.items():
                    found.setdefault(name, ([], [], []))[i].append(value_BK)
    return {name: tuple(torch.cat(part) for part in parts) for name, parts in found.items()}


def gain_at_one_nat(s_NK: Tensor, choice_NK: Tensor, gain_NK: Tensor, keep: int) -> tuple[float, float]:
    """-> the held-out gain of the natural gradient, in standard deviations at 1 nat, mean of both ways round, and its standard error."""
    gains, errors = [], []
    for fit_N in (torch.arange(len(s_NK)) % 2 == 0, torch.arange(len(s_NK)) % 2 == 1):
        size_K = s_NK[fit_N].square().mean(0).sqrt().clamp(min=1e-8)
        kept_C = ppo.forward_selection(s_NK[fit_N], choice_NK[fit_N].mean(0), keep, RIDGE)[0] if keep else torch.arange(s_NK.shape[1])
        s_NC, g_C = s_NK[fit_N][:, kept_C] / size_K[kept_C], choice_NK[fit_N][:, kept_C].mean(0) / size_K[kept_C]
        fisher_CC = s_NC.T @ s_NC / len(s_NC) + RIDGE * torch.eye(len(kept_C))
        step_C = torch.linalg.solve(fisher_CC, g_C) / size_K[kept_C]
        nats = (s_NK[~fit_N][:, kept_C] @ step_C).square().mean() / 2
        gain_N = gain_NK[~fit_N][:, kept_C] @ step_C / nats.sqrt()
        gains.append(gain_N.mean().item())
        errors.append((gain_N.std() / len(gain_N) ** 0.5).item())
    return sum(gains) / 2, (sum(error ** 2 for error in errors) ** 0.5) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="tiny")
    add("--out", default="runs/tiny", help="the run folder whose SAE to measure")
    add("--layer", type=int, default=2)
    add("--reward", default="tiny-reward")
    add("--keep", default="0,64", help="how many numbers may move; 0: all")
    add("--episodes", type=int, default=8192)
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, parts in gradients(args).items():
        for keep in (int(text) for text in args.keep.split(",")):
            gain, error = gain_at_one_nat(*parts, keep)
            print(json.dumps({"policy": name, "layer": args.layer, "reward": args.reward, "numbers": parts[0].shape[1], "keep": keep,
                              "gain_at_1_nat": round(gain, 3), "se": round(error, 3)}), flush=True)


if __name__ == "__main__":
    main()
