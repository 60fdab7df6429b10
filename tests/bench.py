"""Measurements, one JSON line each: what was measured, on which device, shapes and dtype, the median of interleaved repeats, peak memory.

    python tests/bench.py load|trunk|prefill|generate|sae|ppo|update|write [--model tiny|trl-random|14m-random|…|12b-random|NAME] [--against transformers|trl]
    python tests/bench.py bow --corpus TRAIN.jsonl.gz --eval-corpus VAL.jsonl.gz --reward tiny-reward --half 1
    python tests/bench.py planted --objective l1,topk --seed 1
    python tests/bench.py explain --run runs/tiny/sae
    python tests/bench.py busy --run runs/tiny/sae
    python tests/bench.py cross --run runs/tiny/sae-1
    python tests/bench.py crowd --rlhf runs/tiny/rlhf-random_rates --share 0.25
    python tests/bench.py words --run runs/tiny/sae --rlhf runs/tiny/rlhf-coef-avoid --words assets/avoid.txt

Run by hand on an idle machine; no test depends on them. A random model has the shape of a Pythia and is written as a checkpoint first, so
that the real loader is measured. --against needs that library installed (trl 1.12.0, the last release with PPO), which this project does not.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import policies  # noqa: E402
import ppo  # noqa: E402
import train  # noqa: E402
from files import read_json, read_rows, write_json  # noqa: E402
from interpret import as_sparse_as, class_means, explanation_score, logit_effect  # noqa: E402
from pythia import Pythia, PythiaConfig, Tokenizer, pad, read_safetensors, write_safetensors  # noqa: E402
from reward import RewardModel, ScoreFn, encode_pairs, load_reward, pairs_from_labels, window  # noqa: E402
from run import peak_memory_gib  # noqa: E402
from sae import SAE, ActivationBuffer, SAEConfig, SAETrainer, evaluate_sae, load_sae, mlp_rows, mmcs, random_dictionary, train_sae  # noqa: E402

# name -> (layers, hidden size, heads, vocabulary) of the published models; `trl` is the small shape of research on PPO's speed
SHAPES = {"trl": (4, 192, 6, 4096), "14m": (6, 128, 4, 50304), "70m": (6, 512, 8, 50304), "160m": (12, 768, 12, 50304),
          "410m": (24, 1024, 16, 50304), "1b": (16, 2048, 8, 50304), "1.4b": (24, 2048, 16, 50304), "2.8b": (32, 2560, 32, 50304),
          "6.9b": (32, 4096, 32, 50432), "12b": (36, 5120, 40, 50688)}


# ------------------------------------------------------------------------------------------------------------------- models

def random_checkpoint(name: str, folder: Path) -> None:
    """Write random bfloat16 weights of the shape `name`, in shards of 4 GiB with an index, as the hub has them."""
    layers, hidden, heads, vocab = SHAPES[name]
    with torch.device("meta"):
        model = Pythia(cfg := PythiaConfig(vocab, hidden, layers, heads, 4 * hidden))
    noise = (0.02 * torch.randn(2 ** 22 + 2 ** 16, generator=torch.Generator().manual_seed(0))).bfloat16()       # tiled: writing is quick
    shards: list[dict[str, Tensor]] = [{}]
    for i, (key, p) in enumerate(model.named_parameters()):
        start = 997 * i % 2 ** 16
        part = noise[start:start + 2 ** 22]
        value = part.repeat(-(-p.numel() // len(part)))[:p.numel()].view(p.shape)
        shards[-1][key] = value + 1 if "norm" in key and key.endswith("weight") else value
        if sum(v.nbytes for v in shards[-1].values()) > 2 ** 32 or i == len(list(model.parameters())) - 1:
            folder.mkdir(parents=True, exist_ok=True)
            write_safetensors(folder / f"model-{len(shards):05}.safetensors", shards[-1])
            shards[-1] = dict.fromkeys(shards[-1])                                                               # the names only
            shards.append({})
    weight_map = {key: f"model-{number:05}.safetensors" for number, shard in enumerate(shards, 1) for key in shard}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 2 * sum(p.numel() for p in model.parameters())},
                                                         "weight_map": weight_map})
    write_json(folder / "config.json", cfg.to_json(torch.bfloat16))


def checkpoint(args: argparse.Namespace, name: str | None = None) -> str:
    """-> the model's name or folder; NAME-random is written to --cache first, by a process of its own, whose memory is not counted here."""
    name = name or args.model
    if not name.endswith("-random"):
        return name
    folder = args.cache / name
    if not (folder / "config.json").exists():
        subprocess.run([sys.executable, __file__, "write", "--model", name, "--cache", str(args.cache)], check=True)
    return str(folder)


def load(args: argparse.Namespace) -> Pythia:
    return Pythia.from_pretrained(checkpoint(args), dtype=args.dtype, device=args.device)


def random_tokens(model: Pythia, *shape: int) -> Tensor:
    return torch.randint(4, model.cfg.vocab_size, shape, generator=torch.Generator().manual_seed(1)).to(model.device)


# --------------------------------------------------------------------------------------------------------------- measurement

def seconds(args: argparse.Namespace, **contestants: Callable[[], object]) -> dict[str, float]:
    """-> median seconds of each contestant; they take turns, --repeats times, after one turn that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(args.repeats + 1):
        for name, run in contestants.items():
            synchronize(args)
            start = time.perf_counter()
            run()
            synchronize(args)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken[1:] or taken) for name, taken in times.items()}


def synchronize(args: argparse.Namespace) -> None:
    if args.device.type == "cuda":
        torch.cuda.synchronize()


def show(args: argparse.Namespace, bench: str, **figures) -> None:
    """Print one measurement."""
    figures = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in figures.items()}
    device = torch.cuda.get_device_name() if args.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(json.dumps({"bench": bench, "model": args.model, "device": device, "dtype": str(args.dtype).removeprefix("torch.")} | figures
                     | {"repeats": args.repeats, "peak_gib": round(peak_memory_gib(args.device), 3)}), flush=True)


def compare(args: argparse.Namespace, bench: str, tokens: int, shapes: dict, taken: dict[str, float]) -> None:
    """Print a line a contestant, and how many times faster than each other one `ours` is."""
    for name, s in taken.items():
        ratio = {} if name == "ours" else {"ours_faster": s / taken["ours"]}
        show(args, bench, who=name, **shapes, seconds=s, tokens_per_second=tokens / s, **ratio)


# ------------------------------------------------------------------------------------------------------------------- benches

def bench_load(args: argparse.Namespace) -> None:
    """Loading; peak_gib is of the whole process, so give it one of its own."""
    folder = checkpoint(args)
    start = time.perf_counter()
    model = Pythia.from_pretrained(folder, dtype=args.dtype, device=args.device)
    synchronize(args)
    taken, gib = time.perf_counter() - start, sum(p.nbytes for p in model.parameters()) / 2 ** 30
    show(args, "load", seconds=taken, weights_gib=gib, peak_over_weights=peak_memory_gib(args.device) / gib)


def bench_trunk(args: argparse.Namespace) -> None:
    """MLP outputs of layer 1 run two layers: their time beside the whole forward pass's, and the share of layers."""
    model, layer = load(args), 1
    tokens_BT = random_tokens(model, 8, 64)
    with torch.no_grad():
        taken = seconds(args, mlp_output=lambda: model.mlp_output(tokens_BT, layer), hidden=lambda: model.hidden(tokens_BT))
    show(args, "trunk", layer=layer, shape=[8, 64], seconds=taken["mlp_output"], whole_seconds=taken["hidden"],
         share=taken["mlp_output"] / taken["hidden"], share_of_layers=(layer + 1) / model.cfg.num_layers)


def theirs(args: argparse.Namespace):
    """-> the same model by transformers."""
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(Path(__file__).parent.parent / "assets" / "tiny" if args.model == "tiny" else checkpoint(args),
                                                dtype=args.dtype).to(args.device).eval()


@torch.no_grad()
def bench_prefill(args: argparse.Namespace) -> None:
    """Logits of a batch of 8 × 128 tokens."""
    model = load(args)
    tokens_BT = random_tokens(model, 8, 128)
    contestants = {"ours": lambda: model(tokens_BT)}
    if args.against == "transformers":
        other = theirs(args)
        contestants["transformers"] = lambda: other(tokens_BT).logits
    compare(args, "prefill", tokens_BT.numel(), {"shape": [8, 128]}, seconds(args, **contestants))


@torch.no_grad()
def bench_generate(args: argparse.Namespace) -> None:
    """Cached sampling at temperature 1, by default prompts of 16 tokens and 48 new ones."""
    model, (B, T, new) = load(args), (args.batch, args.prompt_tokens, args.new_tokens)
    prompt_BT = random_tokens(model, B, T)
    contestants = {"ours": lambda: model.generate(prompt_BT, new)}
    if args.device.type == "cuda":
        contestants["first"] = lambda: model.generate(prompt_BT, 1)                      # the prompt alone
    if args.against == "transformers":
        other = theirs(args)
        contestants["transformers"] = lambda: other.generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), do_sample=True, top_k=0,
                                                             max_new_tokens=new, min_new_tokens=new, pad_token_id=0)
    taken = seconds(args, **contestants)
    figures = {"shape": [B, T, new]}
    if args.device.type == "cuda":                   # each step reads all weights and the cache so far
        step = (taken["ours"] - taken.pop("first")) / (new - 1)
        cache = 2 * model.cfg.num_layers * B * (T + new / 2) * model.cfg.hidden_size * model.dtype.itemsize
        weights = sum(p.nbytes for p in model.parameters()) - model.gpt_neox.embed_in.weight.nbytes         # of the embedding only B rows
        bandwidth = copy_bandwidth(args)
        figures |= {"step_seconds": step, "copy_gib_per_second": bandwidth, "share_of_bandwidth": (weights + cache) / 2 ** 30 / step / bandwidth}
    compare(args, "generate", B * new, figures, taken)


def copy_bandwidth(args: argparse.Namespace) -> float:
    """-> GiB/s read and written by a copy of 1 GiB."""
    source = torch.ones(2 ** 28, device=args.device)
    target = torch.empty_like(source)
    return 2 / seconds(args, copy=lambda: target.copy_(source))["copy"]


def bench_sae(args: argparse.Namespace) -> None:
    """One training step of the SAE, on rows that are there already: --features features of --width inputs, batch --batch."""
    D, N = args.width, args.batch
    for objective in args.objective.split(","):
        cfg = SAEConfig(num_features=args.features, batch_size=N, tokens=10 ** 9, objective=objective)
        generator = torch.Generator().manual_seed(0)
        trainer = SAETrainer(SAE(D, args.features, generator, k=round(cfg.l0) * (objective == "topk")).to(args.device), 1.0, cfg, generator)
        x_ND = torch.randn(N, D, device=args.device)
        dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32          # of the trainer's products
        a_ND, b_DF = x_ND.to(dtype), trainer.sae.W_enc_DF.detach().to(dtype, copy=True)
        taken = seconds(args, step=lambda: trainer.step(10 ** 5, x_ND), product=lambda: a_ND @ b_DF)
        # Five such products: encode and its gradient for W_enc, decode and its two gradients.
        show(args, "sae", objective=objective, shape=[N, D, args.features], seconds=taken["step"], rows_per_second=N / taken["step"],
             product_tflops=2 * a_ND.numel() * args.features / taken["product"] / 1e12, share_of_matmul_rate=5 * taken["product"] / taken["step"])


def random_edits(args: argparse.Namespace, model: Pythia, layer: int) -> policies.EditPolicy:
    """Coefficients on a random SAE with about 32 active features a token."""
    sae = SAE(model.cfg.hidden_size, args.features, torch.Generator().manual_seed(0)).to(model.device)
    with torch.no_grad():
        x_ND = model.mlp_output(random_tokens(model, 4, 32), layer).flatten(0, 1).float()
        before_NF = x_ND @ sae.W_enc_DF
        sae.b_enc_F -= before_NF.quantile(1 - 32 / args.features) if before_NF.numel() < 2 ** 24 else before_NF[0].topk(32).values[-1]
    return policies.EditPolicy(model, {layer: policies.FeatureScale(sae)})


class PPOBench:
    """One PPO iteration of a policy, by phase, on random prompts, with a random reward model of the same shape."""

    def __init__(self, args: argparse.Namespace, policy: policies.Policy, score_fn: ScoreFn, cfg: ppo.PPOConfig, prompt_tokens: int):
        self.policy, self.score_fn, self.cfg, model = policy, score_fn, cfg, policy.model
        self.prompt_BT = random_tokens(model, cfg.episodes, prompt_tokens)
        self.critic = ppo.Critic(model.cfg.hidden_size, cfg.response_tokens, model.device)
        self.optimizer = torch.optim.Adam([*policy.trainable().values(), *self.critic.parameters()], lr=1e-5, foreach=False)
        self.generator = torch.Generator().manual_seed(0)
        self.standardize = ppo.Standardize(0.0, 1.0)
        model.recompute = cfg.recompute

    @torch.no_grad()
    def generate(self) -> None:
        record = []
        self.tokens_BT, self.mask_BT = ppo.respond(self.policy.model, self.policy.edits, self.prompt_BT, torch.ones_like(self.prompt_BT), 0,
                                                   self.cfg, self.generator, record)
        self.recorded = [torch.cat(pieces, dim=1) for pieces in zip(*record)]

    def reference(self) -> None:
        """Features, logprobs of policy and reference, KL."""
        self.rollout = ppo.join([ppo.make_rollout(self.policy, self.tokens_BT[rows], self.mask_BT[rows], self.cfg, [x_BT[rows] for x_BT in self.recorded])
                                 for rows in ppo.slices(self.cfg.episodes, self.cfg.micro_batch)])

    def score(self) -> None:
        self.rollout = ppo.score(self.rollout, self.score_fn, self.standardize, self.critic, self.cfg)

    def update(self) -> None:
        rollout, cfg = self.rollout, self.cfg
        rewards_BR = ppo.kl_rewards(rollout.logprobs_BR, rollout.ref_logprobs_BR, rollout.scores_B, rollout.mask_BR, 0.05)
        advantages_BR, returns_BR = ppo.gae(rewards_BR, rollout.values_BR, rollout.mask_BR, cfg.gamma, cfg.lam)
        ppo.update_policy(self.policy, self.critic, self.optimizer, {}, rollout, ppo.whiten(advantages_BR, rollout.mask_BR), returns_BR, cfg, self.generator, "bench")

    def iteration(self) -> None:
        for phase in (self.generate, self.reference, self.score, self.update):
            phase()


def make_policy(args: argparse.Namespace, name: str, model: Pythia, cfg: ppo.PPOConfig) -> policies.Policy:
    return random_edits(args, model, args.layer) if name == "coef" else policies.make_policy(name, model, [args.layer], {}, cfg)


def reward_like(model: Pythia) -> RewardModel:
    """-> a reward model with weights of its own, as big as the policy."""
    return RewardModel.from_backbone(copy.deepcopy(model), torch.Generator().manual_seed(0)).requires_grad_(False)


def trl_iteration(args: argparse.Namespace) -> Callable[[], None]:
    """-> a function that has TRL's PPOTrainer do one more iteration, in a process of its own, as a user would run it: a second team of OpenMP
    threads in ours would slow down both. Policy, reference, value and reward model have our policy's shape each."""
    checkpoint(args)                                 # written once, here
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    multiprocessing.get_context("spawn").Process(target=trl_process, args=(args, theirs), daemon=True).start()
    ours.recv()

    def one_more() -> None:
        ours.send("go")
        ours.recv()
    return one_more


def trl_process(args: argparse.Namespace, turns: Connection) -> None:
    """Train with TRL's PPOTrainer, each iteration when told so."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class TakeTurns(TrainerCallback):
        def on_step_end(self, *_, **__):
            turns.send("done")
            with contextlib.suppress(EOFError):      # no more turns: TRL has no clean way to end early, and this process ends with ours
                turns.recv()

    folder = checkpoint(args)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(__file__).parent.parent / "assets" / "tiny" / "tokenizer.json"),
                                        eos_token="<|endoftext|>", pad_token="<|padding|>")
    cfg = PPOConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=args.episodes, gradient_accumulation_steps=1,
                    num_mini_batches=args.minibatches, num_ppo_epochs=args.epochs, response_length=args.response_tokens, report_to="none",
                    total_episodes=args.episodes * (args.repeats + 5), use_cpu=args.device.type == "cpu", bf16=False, save_strategy="no",
                    gradient_checkpointing=False, num_sample_generations=0, logging_strategy="no")
    prompts = torch.randint(4, 4000, (4 * args.episodes, args.prompt_tokens), generator=torch.Generator().manual_seed(0)).tolist()
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=args.dtype) for _ in range(2))
    value, scorer = (AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=args.dtype) for _ in range(2))
    trainer = PPOTrainer(cfg, tokenizer, policy, reference, scorer, Dataset.from_dict({"input_ids": prompts}), value, callbacks=[TakeTurns()])
    turns.send("ready")
    turns.recv()
    trainer.train()


def bench_ppo(args: argparse.Namespace) -> None:
    """A PPO iteration by phase: --episodes, prompts and responses of --prompt-tokens and --response-tokens, --epochs."""
    model = load(args)
    score_fn = reward_like(model)
    cfg = ppo.PPOConfig(episodes=args.episodes, response_tokens=args.response_tokens, epochs=args.epochs, minibatches=args.minibatches,
                        micro_batch=args.micro_batch, samples_per_prompt=1, recompute=args.recompute)
    runs = {name: PPOBench(args, make_policy(args, name, model, cfg), score_fn, cfg, args.prompt_tokens) for name in args.policies.split(",")}
    shapes = {"layer": args.layer, "shape": [args.episodes, args.prompt_tokens, args.response_tokens], "epochs": args.epochs}
    for name, run in runs.items():
        phases = {phase: seconds(args, **{phase: getattr(run, phase)})[phase] for phase in ("generate", "reference", "score", "update")}
        show(args, "ppo phases", policy=name, **shapes, **phases, iteration=sum(phases.values()))
    contestants = {name: run.iteration for name, run in runs.items()}
    if args.against == "trl":
        contestants["trl"] = trl_iteration(args)
    taken = seconds(args, **contestants)
    for name, s in taken.items():
        ratios = {f"faster_than_{other}": taken[other] / s for other in taken if other != name}
        show(args, "ppo iteration", policy=name, **shapes, seconds=s, **ratios)


@torch.no_grad()
def trunk_anew(policy: policies.EditPolicy, tokens_BT: Tensor, mask_BT: Tensor, trunk: policies.Trunk) -> policies.Trunk:
    """-> what `trunk` caches, computed again."""
    resid_BTD, *recorded = policy.model.trunk(tokens_BT[:, :-1], policy.lowest, mask_BT[:, :-1])
    return policies.Trunk(trunk.ref_hidden_BRD, resid_BTD, policy.edits[policy.lowest].encode(*recorded))


def uncached_hidden(policy: policies.EditPolicy, cached: Callable, tokens_BT: Tensor, mask_BT: Tensor, R: int, trunk: policies.Trunk) -> Tensor:
    return cached(tokens_BT, mask_BT, R, trunk_anew(policy, tokens_BT, mask_BT, trunk))


def bench_update(args: argparse.Namespace) -> None:
    """The update phase alone: coefficients from the cached trunk; the same, with the layers up to the edited one run anew in every pass; all weights."""
    model = load(args)
    score_fn = reward_like(model)
    cfg = ppo.PPOConfig(episodes=args.episodes, response_tokens=args.response_tokens, epochs=1, minibatches=1, micro_batch=args.micro_batch,
                        samples_per_prompt=1, recompute=args.recompute)
    runs = {name: PPOBench(args, make_policy(args, name.removesuffix(" uncached"), model, cfg), score_fn, cfg, args.prompt_tokens)
            for name in ["coef", "coef uncached", *args.policies.replace("coef", "").strip(",").split(",")]}
    for name, run in runs.items():
        run.generate(), run.reference(), run.score()
        if name == "coef uncached":
            run.policy.hidden = functools.partial(uncached_hidden, run.policy, run.policy.hidden)
    taken = seconds(args, **{name: run.update for name, run in runs.items()})
    for name, s in taken.items():
        show(args, "update", policy=name, layer=args.layer, layers_above=model.cfg.num_layers - 1 - args.layer, layers=model.cfg.num_layers,
             shape=[args.episodes, args.prompt_tokens, args.response_tokens], seconds=s, coef_faster=s / taken["coef"])


# -------------------------------------------------------------------------------------------------------------- bag of words

def bag_of_words(rows: list[list[int]], vocab_size: int) -> Tensor:
    """-> log(1 + count) of each token, (rows, V)."""
    counts = torch.zeros(len(rows), vocab_size)
    for count, ids in zip(counts, rows):
        count += torch.bincount(torch.tensor(ids), minlength=vocab_size)
    return counts.log1p()


def fit_logistic(x: Tensor, y: Tensor, l2: float) -> Tensor:
    """-> weights of a logistic regression by L-BFGS, penalty l2 · ‖w‖²; the bias is left out, pairs do not see it."""
    w, bias = torch.zeros(x.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([w, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ w + bias, y) + l2 * w.square().sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    return w.detach()


def bow(args: argparse.Namespace) -> None:
    """Pair accuracy of a bag-of-words logistic regression beside the reward model's, on all pairs of the same held-out texts. The regression is
    fitted to texts of 32 and of 256 tokens, with three penalties each; its best figure counts (chosen on the held-out pairs, in its favour)."""
    tokenizer = Tokenizer.from_pretrained(args.reward)
    generator = torch.Generator().manual_seed(0)
    train, heldout = (encode_pairs(pairs_from_labels(read_rows(path), half, generator), tokenizer)
                      for path, half in ((args.corpus, args.half), (args.eval_corpus, 0)))
    model = RewardModel.from_pretrained(args.reward, dtype=torch.float32)
    weights = []
    for length in (32, 256):
        cut = [tuple(window(ids, length) for ids in pair) for pair in train]
        x = bag_of_words([pair[side] for side in (0, 1) for pair in cut], tokenizer.vocab_size)
        y = torch.cat([torch.ones(len(cut)), torch.zeros(len(cut))])
        weights += [fit_logistic(x, y, l2) for l2 in (1e-5, 1e-4, 1e-3)]
    for length in (32, 256):
        cut = [tuple(window(ids, length) for ids in pair) for pair in heldout]
        chosen, rejected = (bag_of_words([pair[side] for pair in cut], tokenizer.vocab_size) for side in (0, 1))
        best = max(all_pairs_accuracy(chosen @ w, rejected @ w) for w in weights)
        with torch.no_grad():
            scores = [torch.cat([model.score(*pad([pair[side] for pair in cut[i:i + 64]], device=model.device))
                                 for i in range(0, len(cut), 64)]) for side in (0, 1)]
        print(json.dumps({"bench": "bow", "tokens": length, "pairs": len(cut) ** 2, "bag_of_words_accuracy": round(best, 4),
                          "reward": args.reward, "reward_accuracy": round(all_pairs_accuracy(*scores), 4)}))


def all_pairs_accuracy(chosen: Tensor, rejected: Tensor) -> float:
    """-> share of all (chosen, rejected) pairs in which the chosen scores higher: less noise than one random pairing."""
    return (chosen[:, None] > rejected).float().mean().item()


class PlantedRows(ActivationBuffer):
    """Rows whose features are known: x = Σ a_i g_i of unit directions g_i, the ith of them on with a probability ~ i^-0.7, `active` of
    them on average, a_i uniform in 0.5 to 1.5."""

    def __init__(self, rows: int, generator: torch.Generator, directions: int = 1024, d_in: int = 128, active: float = 10.0):
        self.directions_GD = F.normalize(torch.randn(directions, d_in, generator=generator), dim=-1)
        rate_G = torch.arange(1, directions + 1) ** -0.7
        rate_G *= active / rate_G.sum()
        chunks = []
        for start in range(0, rows, 8192):
            size = min(8192, rows - start), directions
            on_NG = torch.rand(size, generator=generator) < rate_G
            chunks.append((on_NG * (0.5 + torch.rand(size, generator=generator))) @ self.directions_GD)
        self.rows_ND, self.generator, self.holds_all = torch.cat(chunks), generator, True
        self.order_B, self.next_window = torch.empty(0), 0
        self.shuffle()


class NoRun:
    """Training without a run folder."""

    def __init__(self):
        self.lines = []

    def log(self, **figures) -> None:
        self.lines.append(figures)

    def restore(self, **parts) -> int:
        return 0

    def checkpoint(self, *arguments, **parts) -> None:
        pass


def planted(args: argparse.Namespace) -> None:
    """Does an SAE find directions that are known? Mean over them of the best cosine with a decoder row, and features silent on all rows."""
    for objective in args.objective.split(","):
        generator = torch.Generator().manual_seed(args.seed)
        buffer, run = PlantedRows(262_144, generator), NoRun()
        cfg = SAEConfig(num_features=1024, objective=objective, l0=args.l0, tokens=args.tokens, lr=args.lr)
        start = time.monotonic()
        sae = train_sae(buffer, cfg, run, generator)
        seconds = time.monotonic() - start
        fired_F = torch.stack([(sae.encode(chunk) > 0).sum(0) for chunk in buffer.rows_ND.split(8192)]).sum(0)
        print(json.dumps({"bench": "planted", "objective": objective, "seed": args.seed, "tokens": args.tokens, "lr": args.lr,
                          "mean_best_cosine": round(mmcs(buffer.directions_GD, sae.W_dec_FD), 4),
                          "dead": (fired_F == 0).float().mean().item(), "l0": round(fired_F.sum().item() / len(buffer.rows_ND), 2),
                          "resampled": sum(line.get("resampled", 0) for line in run.lines), "fvu": round(run.lines[-1]["fvu"], 4),
                          "seconds": round(seconds, 1)}), flush=True)


def by_token(rows_ND: Tensor, tokens_BT: Tensor) -> float:
    """-> the share of the variance on odd windows that the rows' means by token, on even windows, explain."""
    token_N, fit_N = tokens_BT[:, 1:].flatten().long(), (torch.arange(len(tokens_BT)) % 2 == 0).repeat_interleave(tokens_BT.shape[1] - 1)
    seen_ND, held_ND = rows_ND[fit_N], rows_ND[~fit_N]
    mean_CD = class_means(seen_ND, token_N[fit_N], seen_ND.mean(0).expand(int(token_N.max()) + 1, -1), 2.0)
    return 1 - ((held_ND - mean_CD[token_N[~fit_N]]).square().sum() / (held_ND - held_ND.mean(0)).square().sum()).item()


def shuffled_weights(model: Pythia, generator: torch.Generator) -> Pythia:
    """-> a model whose parameters hold the same numbers, each tensor's in random order: it has learned nothing (Heap et al. 2025)."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
        parameter.data = parameter.data.flatten()[order].view_as(parameter)
    return model


def explain(args: argparse.Namespace) -> None:
    """Do the text's tokens explain SAE features better than controls? Means over columns of `explanation_score`. The SAE of the model with
    shuffled weights is trained here, with the options of the SAE in --run, on the same text."""
    cfg, text = read_json(args.run / "config.json"), read_safetensors(args.run / "text.safetensors")
    model, layer, generator = Pythia.from_pretrained(cfg["model"], dtype=torch.float32), int(cfg["layers"].strip("[]")), torch.Generator().manual_seed(args.seed)
    trained = load_sae(args.run, model=model, model_name=cfg["model"], layer=layer)
    cfg = SAEConfig(**{field.name: cfg[field.name] for field in dataclasses.fields(SAEConfig) if field.name in cfg})
    shuffled = shuffled_weights(model, generator)
    rows_ND, other_ND = (mlp_rows(m, layer, text["heldout"]).float() for m in (model, shuffled))
    print(json.dumps({"bench": "explain", "seed": args.seed, "variance_explained_by_the_token": round(by_token(rows_ND, text["heldout"]), 4),
                      "shuffled": round(by_token(other_ND, text["heldout"]), 4)}), flush=True)
    other = train_sae(ActivationBuffer(shuffled, layer, text["train"], cfg, generator), cfg, NoRun(), generator)
    features_NF, other_NF = trained.encode(rows_ND), other.encode(other_ND)
    rate_F, directions_DG = (features_NF > 0).float().mean(0), F.normalize(torch.randn(rows_ND.shape[1], args.features, generator=generator), dim=0)
    columns = {"SAE": features_NF, "MLP coordinates": as_sparse_as(rows_ND, rate_F), "random directions": as_sparse_as(rows_ND @ directions_DG, rate_F),
               "SAE of shuffled weights": other_NF}
    for name, columns_NG in columns.items():
        figures = explanation_score(columns_NG, text["heldout"])._asdict()
        figures = {key: values_G[~values_G.isnan()] for key, values_G in figures.items()}
        print(json.dumps({"bench": "explain", "columns": name, "seed": args.seed, "scored": len(figures["pearson_F"]),
                          "l0": round((columns_NG > 0).float().sum(1).mean().item(), 2)}
                         | {key: [round(v_G.mean().item(), 4), round((v_G.std() / len(v_G) ** 0.5).item(), 4)] for key, v_G in figures.items()}), flush=True)


def words(args: argparse.Namespace) -> None:
    """Which coefficients did --reward avoid:FILE turn down: those of features that promote the listed words? A feature's push is the sum of
    its activation × its logit effect on the word, over all places of the text where a listed word of one token comes next. Printed: Spearman's
    correlation of push and coefficient over features; of the 20 features that push most, of the 100, of all the mean coefficient and how many
    are below 1 and above; the first 12."""
    cfg, text = read_json(args.run / "config.json"), read_safetensors(args.run / "text.safetensors")
    model, tokenizer, layer = Pythia.from_pretrained(cfg["model"], dtype=torch.float32), Tokenizer.from_pretrained(cfg["model"]), int(cfg["layers"].strip("[]"))
    trained, coef_F = load_sae(args.run, model=model, model_name=cfg["model"], layer=layer), read_safetensors(args.rlhf / "policy.safetensors")[f"{layer}.coef_F"]
    ids = {tuple(tokenizer.encode(f" {word}")) for word in args.words.read_text().split()}
    listed_W = torch.tensor(sorted(row[0] for row in ids if len(row) == 1))                         # W: listed words of one token
    effect_FW, push_F, places = logit_effect(model, trained.W_dec_FD)[:, listed_W], torch.zeros(trained.num_features), 0
    for tokens_BT in text["train"][:1500].long().split(50):
        next_BT = tokens_BT[:, 1:]
        hit_BT = torch.isin(next_BT, listed_W)
        features_NF = trained.encode(model.mlp_output(tokens_BT, layer)[:, :-1][hit_BT])
        push_F += (features_NF * effect_FW[:, torch.searchsorted(listed_W, next_BT[hit_BT])].T).sum(0)
        places += len(features_NF)
    order_F, rank = push_F.argsort(descending=True), lambda x_F: x_F.argsort().argsort().float()
    print(json.dumps({"bench": "words", "run": args.rlhf.name, "places": places, "words": len(listed_W),
                      "spearman": round(torch.corrcoef(torch.stack([rank(push_F), rank(coef_F)]))[0, 1].item(), 3)}
                     | {f"{name}_of_{number}": round(value.item(), 3) for number in (20, 100, len(coef_F)) for coef_G in (coef_F[order_F[:number]],)
                        for name, value in (("mean_coef", coef_G.mean()), ("below_1", (coef_G < 1).sum()), ("above_1", (coef_G > 1).sum()))}))
    for i in order_F[:12].tolist():
        most = [tokenizer.decode(listed_W[[j]]) for j in effect_FW[i].topk(4).indices.tolist()]
        print(json.dumps({"feature": i, "coef": round(coef_F[i].item(), 2), "push": round(push_F[i].item(), 1), "promotes": most}, ensure_ascii=False))


def busy(args: argparse.Namespace) -> None:
    """How are a dictionary's active features spread over tokens? Of the SAE of --run, and of the random dictionary of --policy random_rates,
    whose directions are each as often active as a feature: quantiles of the number active at a token of held-out text, and the 12 tokens that
    are most often among the busiest twentieth, with how often they are in the text."""
    cfg, text = read_json(args.run / "config.json"), read_safetensors(args.run / "text.safetensors")["heldout"]
    model, tokenizer, layer = Pythia.from_pretrained(cfg["model"], dtype=torch.float32), Tokenizer.from_pretrained(cfg["model"]), int(cfg["layers"].strip("[]"))
    trained = load_sae(args.run, model=model, model_name=cfg["model"], layer=layer)
    like = random_dictionary(trained, torch.Generator().manual_seed(args.seed), mlp_rows(model, layer, text[:64]).float())        # as --stage rlhf
    ids_N = text[64:, 1:].flatten().long()
    total_V = torch.bincount(ids_N, minlength=model.cfg.vocab_size)
    for name, dictionary in (("sae", trained), ("random_rates", like)):
        active_N = torch.cat([(dictionary.encode(x_ND) > 0).sum(1) for x_ND in mlp_rows(model, layer, text[64:]).float().split(2048)])
        among_V = torch.bincount(ids_N[active_N.argsort(descending=True)[:len(ids_N) // 20]], minlength=len(total_V))
        quantiles = {f"q{100 * q:g}": round(active_N.float().quantile(q).item()) for q in (0.05, 0.25, 0.5, 0.75, 0.95)}
        most = [f"{tokenizer.decode([i])} {among_V[i]}/{total_V[i]}" for i in among_V.topk(12).indices.tolist()]
        print(json.dumps({"bench": "busy", "run": args.run.name, "dictionary": name, "layer": layer, "mean": round(active_N.float().mean().item(), 1),
                          **quantiles, "max": active_N.max().item(), "busiest": most}, ensure_ascii=False))


@torch.no_grad()
def cross(args: argparse.Namespace) -> None:
    """What makes random directions better or worse handles than an SAE's features: when they are on, or where they push? Write two SAEs that
    take one from each: in OUT-when (beside the run folder OUT that holds --run) the activations are random_rates' and the vectors the SAE's,
    in OUT-where the other way round; `train.py --stage rlhf --out OUT-when` trains coefficients on them."""
    cfg, text = read_json(args.run / "config.json"), read_safetensors(args.run / "text.safetensors")["heldout"]
    model, layer = Pythia.from_pretrained(cfg["model"], dtype=torch.float32), int(cfg["layers"].strip("[]"))
    trained = load_sae(args.run, model=model, model_name=cfg["model"], layer=layer)
    like = random_dictionary(trained, torch.Generator().manual_seed(args.seed), mlp_rows(model, layer, text[:64]).float())        # as --stage rlhf
    for name, activations, vectors in (("when", like, trained), ("where", trained, like)):
        mixed = copy.deepcopy(activations)
        mixed.W_dec_FD.copy_(vectors.W_dec_FD)
        folder = args.run.parent.with_name(f"{args.run.parent.name}-{name}") / args.run.name
        mixed.save(folder, model_name=cfg["model"], layer=layer, context=text.shape[1])
        figures = evaluate_sae(model, layer, mixed, text[64:])
        write_json(folder / "metrics.json", figures)                 # so that it counts as finished
        write_json(folder / "config.json", cfg)
        shutil.copy(args.run / "text.safetensors", folder)
        print(json.dumps({"bench": "cross", "folder": str(folder), "l0": figures["l0"], "l1": figures["l1"]}))


def crowd(args: argparse.Namespace) -> None:
    """Where in the text does a run of coefficients gain? Gain and KL of --rlhf on its held-out prompts with --share of what it learned: by its
    edit as it is, at the busiest twentieth of tokens alone (where most of the dictionary's features are active), and at the others alone."""
    config = read_json(args.rlhf / "config.json")
    told = train.resolve(train.parse(["--policy", config["policy"], "--layer", config["layers"].strip("[]"), "--seed", config["seed"],
                                      "--out", str(args.rlhf.parent), "--dtype", "float32"]))
    (model, tokenizer), (layer,) = train.load_model(told), told.layers
    cfg = ppo.PPOConfig(**{f.name: config[f.name] for f in dataclasses.fields(ppo.PPOConfig) if f.name in config} | {"keep": 0})
    policy = policies.make_policy(told.policy, model, told.layers, train.load_saes(told, model), cfg, config["edit"])
    policy.load_state_dict(read_safetensors(args.rlhf / "policy.safetensors"))
    prompts = train.load_prompts(config["eval_prompts"], model, tokenizer, cfg, cfg.eval_size)
    evaluation = ppo.Evaluation(model, prompts, load_reward(config["reward"], tokenizer, torch.float32), cfg, seed=3_000_000)
    edit, text = policy.edits[layer], read_safetensors(train.sae_folder(told, layer) / "text.safetensors")["heldout"][64:]
    encode, rows_ND = edit.encode, mlp_rows(model, layer, text).float()
    active_N = torch.cat([(edit.sae.encode(x_ND) > 0).sum(1).float() for x_ND in rows_ND.split(2048)])
    busy = active_N.quantile(0.95)
    tests = {"all": lambda number: number >= 0, "busiest": lambda number: number > busy, "others": lambda number: number <= busy}
    for name, chosen in tests.items():
        def gated(mlp_BTD: Tensor, neurons_BTM: Tensor, chosen: Callable = chosen) -> Tensor:
            features_BTF = encode(mlp_BTD, neurons_BTM)
            return features_BTF * chosen((features_BTF > 0).sum(-1, keepdim=True))
        edit.encode = gated
        with policy.holding(policy.part_way(args.share)):
            figures = evaluation(policy).figures
        where_N = chosen(active_N)
        print(json.dumps({"bench": "crowd", "run": args.rlhf.name, "edit_at": name, "tokens": round(where_N.float().mean().item(), 3),
                          "of_all_activity": round((active_N[where_N].sum() / active_N.sum()).item(), 3),
                          **{key: round(figures[key], 3) for key in ("score_gain_std", "score_gain_std_se", "kl")}}))


def main() -> None:
    benches = {"load": bench_load, "trunk": bench_trunk, "prefill": bench_prefill, "generate": bench_generate, "sae": bench_sae,
               "ppo": bench_ppo, "update": bench_update, "bow": bow, "planted": planted, "explain": explain, "words": words, "busy": busy, "cross": cross, "crowd": crowd, "write": lambda args: random_checkpoint(
                   args.model.removesuffix("-random"), args.cache / args.model)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("bench", choices=benches)
    add("--model", default="tiny", help=f"a name, a folder, or one of {', '.join(f'{name}-random' for name in SHAPES)}")
    add("--against", choices=["transformers", "trl"])
    add("--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    add("--repeats", type=int, default=5)
    add("--cache", type=Path, default=Path(tempfile.gettempdir()) / "pythia-random", help="where random checkpoints are kept")
    add("--batch", type=int, default=16)
    add("--features", type=int, default=2048, help="of the SAE")
    add("--width", type=int, default=256, help="of the SAE's input")
    add("--policies", default="coef,full", help="which to measure: coef, full, lora")
    add("--layer", type=int, default=2)
    add("--episodes", type=int, default=32)
    add("--prompt-tokens", type=int, default=16)
    add("--response-tokens", type=int, default=24)
    add("--new-tokens", type=int, default=48, help="of the generate bench")
    add("--epochs", type=int, default=4)
    add("--minibatches", type=int, default=1)
    add("--micro-batch", type=int, default=32)
    add("--recompute", action="store_true", help="activations in the backward pass")
    add("--corpus")
    add("--eval-corpus")
    add("--reward", default="tiny-reward")
    add("--half", type=int, default=0)
    add("--run", type=Path, default=Path("runs/tiny/sae"), help="folder of a finished sae stage")
    add("--rlhf", type=Path, default=Path("runs/tiny/rlhf-coef"), help="folder of a finished rlhf stage with that SAE, of the words and crowd benches")
    add("--share", type=float, default=1.0, help="of what was learned, in the crowd bench")
    add("--words", type=Path, default=Path("assets/avoid.txt"))
    add("--objective", default="l1,topk", help="of the sae and planted benches")
    add("--tokens", type=int, default=2_000_000)
    add("--l0", type=float, default=20.0, help="of the planted bench: rows have 10 active features on average, some have 20")
    add("--lr", type=float, default=6e-3)
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype.replace("auto", "bfloat16" if args.device.type == "cuda" else "float32"))
    benches[args.bench](args)


if __name__ == "__main__":
    main()
