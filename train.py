"""Command line: one function a stage. Read these first; each stage tells its story and names who does the work.

What follows them is what they load, and the options: `main`, at the end, reads these (`parse`, `resolve`) and runs the stages, each in a
folder (`Run`).
"""

import argparse
import base64
import dataclasses
import functools
import inspect
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import interpret
import lm
import plots
import policies
import ppo
import reward
import sae
from compare import SAE_FIGURES, CompareConfig, SweepConfig, evaluations, frontier, gains_at_kls, intervals, means, write_tables
from files import CheckpointFiles, UserError, finite, located, read_json, reading, sha256, write_json
from pythia import Pythia, PythiaConfig, Tokenizer, read_safetensors, write_safetensors
from run import Run, multiplies_bfloat16, peak_memory_gib


# ------------------------------------------------------------------------------------------------------------------- stages

def stage_sae(args: argparse.Namespace, cfg: sae.SAEConfig, run: Run) -> dict:
    """Train a sparse autoencoder on the MLP output of --layer, or take that of --sae-load; text is sampled from the model, or read from
    --corpus."""
    model, tokenizer = load_model(args)
    (layer,) = args.layers                           # `main` runs this stage once for each
    generator = torch.Generator().manual_seed(args.seed)
    train_BT, heldout_BT = sae_text(args, cfg, model, tokenizer, run, generator)
    if cfg.load:
        trained = sae.load_sae(cfg.load, model=model, model_name=model_name(args.model), layer=layer, tokens_BT=heldout_BT)
    else:
        trained = sae.train_sae(sae.ActivationBuffer(model, layer, train_BT, cfg, generator), cfg, run, generator)
        plots.plot_curves(run.folder / "curves.png", run.rows(), ("fvu", "l0", "l1_coef", "dead"), "step")
    trained.save(run.folder, model_name=model_name(args.model), layer=layer, context=train_BT.shape[1])
    features_NF = torch.cat([trained.encode(x_ND.float()).cpu() for x_ND in sae.mlp_rows(model, layer, heldout_BT).split(2048)])
    explained_F = interpret.explanation_score(features_NF, heldout_BT).pearson_F
    return sae.evaluate_sae(model, layer, trained, heldout_BT) | {"explanation_score": finite(explained_F.nanmean().item())} | (
        {"tokens_per_second": run.tokens_per_second} if run.tokens_per_second else {})


def stage_rlhf(args: argparse.Namespace, cfg: ppo.PPOConfig, run: Run) -> dict:
    """PPO on --policy against --reward from --prompts; evaluated on --eval-prompts, also by the held-out reward model --gold."""
    model, tokenizer = load_model(args)
    saes = load_saes(args, model) if args.policy in policies.NEED_SAE else {}
    policy = policies.make_policy(args.policy, model, args.layers, saes, cfg, args.edit, args.seed)
    score_fn = reward.load_reward(required(args.reward, "--reward"), tokenizer, args.dtype, args.device)
    gold_fn = reward.load_reward(args.gold, tokenizer, args.dtype, args.device) if args.gold else None
    prompts, eval_prompts = load_prompts(args.prompts, model, tokenizer, cfg), load_prompts(args.eval_prompts, model, tokenizer, cfg, cfg.eval_size)
    evaluation = ppo.Evaluation(model, eval_prompts, score_fn, cfg, seed=1_000_000 + args.seed)
    ppo.train_ppo(policy, prompts, score_fn, cfg, run, torch.Generator().manual_seed(args.seed))
    for share, after in evaluation.frontier(policy):             # after the loop, `after` is that of the last share, of all that was learned
        run.log(share=share, **{f"eval_{key}": value for key, value in (after.figures | after.prompt_means).items()})
    write_safetensors(run.folder / "policy.safetensors", policy.state_dict())
    write_json(run.folder / "samples.json", interpret.paired_samples(tokenizer, evaluation, after))
    plots.plot_curves(run.folder / "curves.png", run.rows(), ("score", "kl", "entropy", "approx_kl", "var_explained"), "iteration")
    # A gain that the gold model, which training never saw, does not share is over-optimisation.
    figures = after.figures | (evaluation.gain_by(gold_fn, after, "gold") if gold_fn else {})
    if args.edit == "scale+bias":
        coefs_alone = {name: p if ".coef_" in name else torch.zeros_like(p) for name, p in policy.state_dict().items()}
        with policy.holding(coefs_alone):
            without_bias = evaluation(policy).figures
        figures |= {f"without_bias_{key}": value for key, value in without_bias.items() if key.startswith(("score_gain_std", "kl"))}
    return figures | {
        "n_changed": policy.n_changed(), "trainable_parameters": sum(p.numel() for p in policy.trainable().values()),
        "diverged": any("diverged" in row for row in run.rows()),
        "seconds_per_iteration": statistics.median(row["seconds"] for row in run.rows() if "seconds" in row)}


def stage_interpret(args: argparse.Namespace, cfg: interpret.InterpretConfig, run: Run) -> dict:
    """What RLHF changed, feature by feature, and what each of them does to the reward: one page. With no RLHF run yet, a page on the SAE."""
    model, tokenizer = load_model(args)
    learned, figures = finished_coefs(args)          # nothing where there is no run yet
    saes, folders = load_saes(args, model), {layer: sae_folder(args, layer) for layer in args.layers}
    texts = {layer: read_safetensors(path / "text.safetensors")["heldout"] for layer, path in folders.items()}
    folder = folder_of(args, "rlhf")
    config = read_json((folder if learned else folders[args.layers[0]]) / "config.json")
    causal, commands = None, [command_line(args, "sae", read_json(path / "config.json")) for path in folders.values()]
    if learned:
        check_unchanged(args, folder, config)
        policy, evaluation = learned_policy(args, cfg, model, tokenizer, saes, learned, config)
        causal = interpret.causal_effects(policy, evaluation, cfg)
        commands.append(command_line(args, "rlhf", config))
    report = interpret.describe(model, tokenizer, saes, texts, learned, causal, cfg)
    for layer, path in folders.items():
        report["saes"][layer]["metrics"] = read_json(path / "metrics.json")
    runs = interpret.finished_runs(args.out)
    images = {"RLHF": folder / "curves.png"} | {f"SAE {layer}": path / "curves.png" for layer, path in folders.items()}       # --sae-load: none
    if causal:
        images |= plots.plot_report(run.folder, learned, causal, {r["name"]: [r["frontier"]] for r in runs if r["reward"] == config["reward"]})
    page = interpret.write_report(run.folder, report | {
        "title": f"{'What RLHF changed in' if learned else 'The features of'} {model_name(args.model)}, layer {', '.join(map(str, args.layers))}",
        "name": folder.name.removeprefix("rlhf-"), "rlhf": figures, "runs": runs, "config": config,
        "commands": [*commands, command_line(args, "interpret", run.config)],
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "plots": {name: base64.b64encode(path.read_bytes()).decode() for name, path in images.items() if path.exists()}})
    print(f"report: {page}")
    return {"features": len(report["features"])} | ({key: causal.summary[key] for key in ("r", "r_other_prompts", "carriers")} if causal else {})


def stage_compare(args: argparse.Namespace, cfg: CompareConfig, run: Run) -> dict:
    """Train each of --compare-runs with every seed, all in folders OUT/rlhf-… of their own, and lay them side by side; finished ones are not
    run again. Gains are read off at equal KL, with 95 % bootstrap intervals over seeds and prompts; the first is compared with each of the
    others seed by seed and prompt by prompt."""
    names = cfg.names()
    cells = {name: [variant(args, ["--policy", *shlex.split(name), "--seed", str(seed)], [*name.split()[1:], args.tag, f"seed{seed}"])
                    for seed in range(cfg.seeds)] for name in names}
    folders = {name: [folder_of(cell, "rlhf") for cell in cells[name]] for name in names}
    if len({folder for some in folders.values() for folder in some}) < len(names) * cfg.seeds:
        raise UserError("--compare-runs: two of them would share a folder: they are the same, or differ in signs or capitals alone")
    for cell in itertools.chain(*cells.values()):
        check_inputs(cell)
    for seed in range(cfg.seeds):                    # so that an early end leaves as many of each
        for name in names:
            run_if_unfinished(cells[name][seed], "rlhf")
    gains = {name: gains_at_kls([evaluations(folder) for folder in folders[name]], cfg.kls) for name in names}      # (value, bootstrap samples)
    figures = {name: means([read_json(folder / "metrics.json") for folder in folders[name]]) for name in names}
    rows = [{"run": name} | intervals("gain at", cfg.kls, *gains[name]) | figures[name] for name in names]
    first, first_drawn = gains[names[0]]
    differences = [{f"{names[0]} minus": name} | intervals("at", cfg.kls, first - gains[name][0], first_drawn - gains[name][1]) for name in names[1:]]
    plots.plot_frontier(run.folder / "frontier.png", {name: [frontier(folder) for folder in folders[name]] for name in names})
    write_tables(run.folder / "tables.md", rows, differences)
    return {"runs": rows, "differences": differences}


def stage_sweep(args: argparse.Namespace, cfg: SweepConfig, run: Run) -> dict:
    """Train an SAE for each objective, L0 target and seed, and --policy on each, in folders OUT/sweep-OBJECTIVE-L0-SEED, all of a seed on the
    same text; then lay the SAEs' figures and the gains side by side, means over seeds; of coef also how many features carry 90 % of the gain, from
    each cell's report. Finished cells are not run again."""
    if len(args.layers) > 1:
        raise UserError("--stage sweep lays SAEs of one layer side by side: give one --layer")
    stages = ["sae"] + ["rlhf"] * cfg.rlhf + ["interpret"] * (cfg.rlhf and args.policy == "coef")
    variants = {(objective, l0): [variant(args, ["--sae-objective", objective, "--sae-l0", f"{l0:g}", "--seed", str(seed), "--out",
                                                 f"{args.out}/sweep-{objective}-{l0:g}-{seed}"], [args.tag]) for seed in range(cfg.seeds)]
                for objective, l0 in itertools.product(cfg.objectives, cfg.l0)}          # all, so that a wrong one is told before the first is run
    if cfg.rlhf:
        check_inputs(next(iter(variants.values()))[0])             # of one cell: they differ in their SAEs alone, each in its own folder
    rows = []
    for (objective, l0), cells in variants.items():
        for cell, stage in itertools.product(cells, stages):
            run_if_unfinished(cell, stage)
        measured = [read_json(folder_of(cell, "sae") / "metrics.json") for cell in cells]
        figures = means(measured, SAE_FIGURES) | {"sae_seconds": statistics.mean(each["seconds"] for each in measured)}
        if cfg.rlhf:
            folders = [folder_of(cell, "rlhf") for cell in cells]
            gain, drawn = gains_at_kls([evaluations(folder) for folder in folders], (cfg.kl,))
            shown = intervals("gain at", (cfg.kl,), gain, drawn)
            figures |= {"gain": None if "not reached" in shown.values() else gain.item()} | shown
            figures |= means([read_json(folder / "metrics.json") for folder in folders])
        if "interpret" in stages:
            figures |= means([read_json(folder_of(cell, "interpret") / "metrics.json") for cell in cells], ("carriers",))
        rows.append({"objective": objective, "target": l0} | figures)
        plots.plot_sweep(run.folder / "sweep.png", rows)
        write_tables(run.folder / "tables.md", rows)
    return {"cells": rows}


def stage_reward(args: argparse.Namespace, cfg: reward.RewardConfig, run: Run) -> dict:
    """Train a reward model on the backbone of --model, from preference pairs or labelled texts in --corpus."""
    model, tokenizer = load_model(args)
    if cfg.max_tokens > model.cfg.max_positions:
        raise UserError(f"--reward-max-tokens {cfg.max_tokens}: {args.model} has only {model.cfg.max_positions} positions")
    generator = torch.Generator().manual_seed(args.seed)
    pairs, labelled = reward.read_pairs(required(args.corpus, "--corpus"), cfg.half, generator)
    heldout, _ = reward.read_pairs(required(args.eval_corpus, "--eval-corpus"), 0, generator)
    trained = reward.train_reward(reward.RewardModel.from_backbone(model.float(), generator), reward.encode_pairs(pairs, tokenizer), cfg,
                                  run, generator, random_cut=labelled)
    trained.half().save_pretrained(run.folder / "model")
    tokenizer.save_pretrained(run.folder / "model")
    trained = reward.RewardModel.from_pretrained(run.folder / "model", dtype=torch.float32, device=args.device)     # as it was saved
    heldout_ids = reward.encode_pairs(heldout, tokenizer)
    figures = {"pairs": len(pairs), "heldout_pairs": len(heldout)}
    for suffix, length in (("", cfg.max_tokens), ("_32", 32))[:2 if labelled else 1]:      # 32 tokens: about what RLHF scores
        cut = reward.window if labelled else reward.keep_end                              # as in training
        measured = reward.evaluate_reward(trained, [tuple(cut(ids, length) for ids in pair) for pair in heldout_ids])
        figures |= {key + suffix: value for key, value in measured.items()}
    return figures


def stage_lm(args: argparse.Namespace, cfg: lm.LMConfig, run: Run) -> dict:
    """Train a language model on --corpus; its held-out loss is measured on --eval-corpus with the weights as saved."""
    tokenizer = Tokenizer.from_pretrained(cfg.tokenizer)
    windows_BT = lm.token_windows(lm.read_texts(required(args.corpus, "--corpus")), tokenizer, cfg.context)
    shape = PythiaConfig(math.ceil(tokenizer.vocab_size / 64) * 64, cfg.hidden_size, cfg.num_layers, cfg.num_heads,
                         intermediate_size=4 * cfg.hidden_size, max_positions=cfg.context)
    generator = torch.Generator().manual_seed(args.seed)
    model = lm.train_lm(Pythia(shape).initialize(generator).to(args.device), windows_BT, cfg, run, generator)
    model.half().save_pretrained(run.folder / "model")
    tokenizer.save_pretrained(run.folder / "model")
    steps = run.rows()[-1]["step"] + 1
    return {"steps": steps, "tokens": steps * cfg.batch_size * cfg.context, "train_loss": run.rows()[-1]["loss"],
            "loss": lm.evaluate_lm(run.folder / "model", args.eval_corpus, cfg.context, args.device) if args.eval_corpus else None}


# ------------------------------------------------------------------------------------------------- what stages load and share

def load_model(args: argparse.Namespace) -> tuple[Pythia, Tokenizer]:
    """-> the frozen model of --model and its tokenizer."""
    model, tokenizer = Pythia.from_pretrained(args.model, dtype=args.dtype, device=args.device), Tokenizer.from_pretrained(args.model)
    tokenizer.check_fits(model, args.model)
    return model, tokenizer


def choose_layers(args: argparse.Namespace) -> None:
    """Turn --layer into args.layers, a sorted list of numbers; args.middle is the layer where none is given."""
    path = CheckpointFiles(args.model).need("config.json")
    count = PythiaConfig.from_json(read_json(path), path).num_layers
    args.middle = count // 2
    try:
        args.layers = list(range(count)) if args.layer == "all" else sorted({int(part) for part in (args.layer or str(args.middle)).split(",")})
    except ValueError:
        raise UserError(f"--layer {args.layer}: give a number, several with commas between, or all") from None
    if not 0 <= args.layers[0] <= args.layers[-1] < count:
        raise UserError(f"--layer {args.layer}: this model has layers 0 to {count - 1}")


def model_name(model: str) -> str:
    """-> a name for SAE files to remember: `tiny` for assets/tiny, too; the hub's names as they are."""
    return os.path.basename(os.path.abspath(model)) if os.path.isdir(model) else model


def same_model(one: str, other: str) -> bool:
    """-> whether two values of --model mean the same: folders by their place, else by the last part of the name."""
    if os.path.isdir(one) and os.path.isdir(other):
        return os.path.samefile(one, other)
    return os.path.basename(os.path.abspath(one)) == os.path.basename(os.path.abspath(other))


def sae_folder(args: argparse.Namespace, layer: int) -> Path:
    """-> OUT/sae, that of the middle layer; OUT/sae-LAYER of another."""
    return Path(args.out) / ("sae" if layer == args.middle else f"sae-{layer}")


def missing_saes(args: argparse.Namespace) -> list[int]:
    """-> those of --layer for which the run folder holds no finished SAE; UserError where it holds one that was made for another --model, or with
    other --sae-… options than this command gives."""
    given = {word.partition("=")[0].removeprefix("--sae-").replace("-", "_") for word in args.argv if word.startswith("--sae-")}
    wanted = json.loads(json.dumps(dataclasses.asdict(args.configs["sae"])))
    finished = [layer for layer in args.layers if (sae_folder(args, layer) / "metrics.json").exists()]
    for folder in (sae_folder(args, layer) for layer in finished):
        config = read_json(folder / "config.json")
        if not same_model(made_for := config.get("model", args.model), args.model):
            raise UserError(f"{folder}: this SAE was made for model {made_for}: choose another --out, or --model")
        if changed := sorted(name for name in given if config.get(name, wanted[name]) != wanted[name]):
            raise UserError(f"{folder} was made with another {', '.join(changed)}: leave the option out to take it, or choose another --out")
    return [layer for layer in args.layers if layer not in finished]


def load_saes(args: argparse.Namespace, model: Pythia) -> dict[int, sae.SAE]:
    """-> the SAEs of this run folder, by layer; in their place, with --policy random or random_rates, random dictionaries like them."""
    if missing := missing_saes(args):
        raise UserError(f"{sae_folder(args, missing[0])} holds no finished SAE: run --stage sae first")
    saes, generator = {}, torch.Generator().manual_seed(args.seed)
    for layer in args.layers:
        folder = sae_folder(args, layer)
        saes[layer] = sae.load_sae(folder, model=model, model_name=model_name(args.model), layer=layer)
        if args.policy == "random":
            saes[layer] = sae.random_dictionary(saes[layer], generator, l0=read_json(folder / "metrics.json")["l0"])
        elif args.policy == "random_rates":
            text_BT = read_safetensors(folder / "text.safetensors")["heldout"][:64]
            saes[layer] = sae.random_dictionary(saes[layer], generator, sae.mlp_rows(model, layer, text_BT).float())
    return saes


def finished_coefs(args: argparse.Namespace) -> tuple[dict[str, Tensor], dict | None]:
    """-> what a finished run of --policy coef has learned, and its figures; ({}, None) where the run folder has none yet."""
    folder = folder_of(args, "rlhf")
    finished = (folder / "metrics.json").exists()
    if args.policy != "coef":
        raise UserError(f"--stage interpret is for --policy coef, not {args.policy}")
    if args.tag and not finished:
        raise UserError(f"{folder} holds no finished run of --policy coef to interpret: run --stage rlhf first")
    if not finished:
        return {}, None
    figures = read_json(folder / "metrics.json")
    if figures["n_changed"] == 0:
        raise UserError(f"{folder}: no coefficient moved, so there is nothing to interpret: train it for longer")
    return read_safetensors(folder / "policy.safetensors"), figures


def learned_policy(args: argparse.Namespace, cfg: interpret.InterpretConfig, model: Pythia, tokenizer: Tokenizer, saes: dict[int, sae.SAE],
                   learned: dict[str, Tensor], config: dict) -> tuple[policies.EditPolicy, ppo.Evaluation]:
    """-> the policy of a finished run, and the evaluation of its own reward on its held-out prompts, by samples that the run has not seen."""
    rlhf = ppo.PPOConfig(**{f.name: config[f.name] for f in dataclasses.fields(ppo.PPOConfig) if f.name in config})
    # keep=0: `keep_few` has turned the vector that comes with it into biases already.
    rlhf = dataclasses.replace(rlhf, keep=0, eval_samples=min(max(cfg.effect_samples, cfg.fresh_samples), rlhf.eval_samples))
    policy = policies.make_policy("coef", model, args.layers, saes, rlhf, config["edit"])
    policy.load_state_dict(learned)
    prompts = load_prompts(config["eval_prompts"], model, tokenizer, rlhf, rlhf.eval_size)
    score_fn = reward.load_reward(config["reward"], tokenizer, args.dtype, args.device)
    return policy, ppo.Evaluation(model, prompts, score_fn, rlhf, seed=2_000_000 + int(config["seed"]))


def sae_text(args: argparse.Namespace, cfg: sae.SAEConfig, model: Pythia, tokenizer: Tokenizer, run: Run,
             generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """-> windows to train on and held-out windows: from --corpus, or sampled from the model. They are kept in the run folder, and with them
    the state of the generator, so that training goes on with the same random numbers whether they were made or found."""
    path = run.folder / "text.safetensors"
    if found := find_text(run):
        text = read_safetensors(found)
        if found != path:
            write_safetensors(path, text)
        generator.set_state(text["generator"].clone())
        return text["train"], text["heldout"]
    context = min(cfg.context, model.cfg.max_positions)
    heldout = max(2, cfg.eval_tokens // context)     # explanations are fitted on half of the windows
    if args.corpus:
        windows_BT = lm.token_windows(lm.read_texts(args.corpus), tokenizer, context)
        windows_BT = windows_BT[torch.randperm(len(windows_BT), generator=generator)]
        heldout = min(heldout, len(windows_BT) // 5)
        if heldout < 2:
            raise UserError(f"{args.corpus}: {len(windows_BT)} windows of {context} tokens are too few to train on and hold some out")
    else:
        train = 0 if cfg.load else -(-cfg.text_tokens // context)
        windows_BT = lm.sample_windows(model, tokenizer, heldout + train, context, cfg.text_batch, generator)
    write_safetensors(path, {"heldout": windows_BT[:heldout], "train": windows_BT[heldout:], "generator": generator.get_state()})
    return windows_BT[heldout:], windows_BT[:heldout]


def find_text(run: Run) -> Path | None:
    """-> the text that a run made before it was stopped, or that an SAE beside it (another layer's, or a sweep's) made with the same options."""
    out, same = run.folder.parent, [name for name in run.config if name in TEXT_DEPENDS or name.startswith("sha256 ")]
    sweep = out.parent.glob("sweep-*/sae*/text.safetensors") if out.name.startswith("sweep-") else ()
    beside = sorted([*out.glob("sae*/text.safetensors"), *sweep])
    for found in (run.folder / "text.safetensors", *beside):
        config = found.with_name("config.json")
        if found.exists() and config.exists() and all(read_json(config).get(name) == run.config[name] for name in same):
            return found
    return None


def read_prompts(path: str) -> list[str]:
    """-> the non-empty lines of a text file, or the prompts of a file of preference pairs (.jsonl, .jsonl.gz), each once."""
    path = located(path)
    if path.endswith((".jsonl", ".jsonl.gz")):
        return list(dict.fromkeys(pair.prompt for pair in reward.load_preferences(path)[0]))
    with reading(path, "not readable as a list of prompts"):
        lines = [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path}: holds no prompt")
    return lines


def load_prompts(path: str, model: Pythia, tokenizer: Tokenizer, cfg: ppo.PPOConfig, number: int | None = None) -> ppo.Prompts:
    """-> a file's prompts as RLHF takes them; with `number`, the first so many, to evaluate on."""
    prompts = ppo.Prompts(read_prompts(path), tokenizer, cfg.response_tokens, model.cfg.max_positions, model.device, cfg.prompt_tokens, number)
    if number and len(prompts.tokens_BT) < 2:
        raise UserError("--eval-prompts: an evaluation needs at least two prompts (--rlhf-eval-size), for its errors are over prompts")
    return prompts


def command_line(args: argparse.Namespace, stage: str, config: dict) -> str:
    """-> the command that makes a stage's result again: the options in its config.json that are not the defaults."""
    default, words = vars(parse([])), ["python", "train.py", "--stage", stage, "--out", args.out]
    # A key that is no option (a file's hash) has no default: compared with itself, it is left out.
    for name, value in {**config, "layer": ",".join(re.findall(r"\d+", config["layers"])), "tag": args.tag if stage != "sae" else ""}.items():
        option = name if name in default else f"{stage}_{name}"
        usual = json.loads(json.dumps(default.get(option, value)))
        value = value.removeprefix("torch.") if name == "dtype" else value
        if str(value) != str(usual):
            text = ",".join(map(str, value)) if isinstance(value, list) else ("no", "yes")[value] if isinstance(value, bool) else value
            words += [f"--{option.replace('_', '-')}", str(text)]
    return shlex.join(words)


# What compare and sweep do with runs.

def variant(args: argparse.Namespace, options: list[str], tags: list[str]) -> argparse.Namespace:
    """-> the options of this command, with others in their place; the tag is made of `tags`."""
    tag = re.sub(r"[^a-z0-9]+", "-", " ".join(tags).lower()).strip("-")
    return resolve(parse([*args.argv, *options, "--tag", tag, "--resume"]))


def run_if_unfinished(cell: argparse.Namespace, stage: str) -> None:
    """Run a stage in a process of its own, so that memory is measured for it alone; not again what is finished."""
    if stage == "rlhf" and cell.policy in policies.NEED_SAE and (missing := missing_saes(cell)):
        run_process(cell, "sae", "--layer", ",".join(map(str, missing)))
    folder = folder_of(cell, stage)
    if (folder / "metrics.json").exists():
        Run(folder, run_config(cell, stage), resume=True).lock.close()           # refuses what was made with other options
    else:
        run_process(cell, stage)


def run_process(cell: argparse.Namespace, stage: str, *options: str) -> None:
    """Run `python train.py` with these options; when this process is stopped, that one may save its state."""
    child = subprocess.Popen([sys.executable, __file__, *cell.argv, "--stage", stage, *options], start_new_session=True)
    try:
        failed = child.wait()
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        raise
    if failed:
        raise UserError(f"{cell.out}: --stage {stage} {cell.tag} failed, see above; --resume goes on after the runs that are finished")


# ------------------------------------------------------------------------------------------------------------ command line

STAGES = {"lm": (stage_lm, lm.LMConfig), "sae": (stage_sae, sae.SAEConfig), "reward": (stage_reward, reward.RewardConfig),
          "rlhf": (stage_rlhf, ppo.PPOConfig), "interpret": (stage_interpret, interpret.InterpretConfig),
          "compare": (stage_compare, CompareConfig), "sweep": (stage_sweep, SweepConfig)}
# What besides its own options a stage's result depends on; another value of these is another run.
DEPENDS = {"lm": ("corpus", "eval_corpus", "seed"), "sae": ("model", "layers", "corpus", "dtype", "seed"),
           "reward": ("model", "corpus", "eval_corpus", "dtype", "seed"), "interpret": ("model", "layers", "dtype"),
           "rlhf": ("model", "layers", "policy", "edit", "reward", "gold", "prompts", "eval_prompts", "dtype", "seed"),
           "compare": ("model", "layers", "edit", "reward", "gold", "prompts", "eval_prompts", "corpus", "dtype"),
           "sweep": ("model", "layers", "policy", "edit", "reward", "gold", "prompts", "eval_prompts", "corpus", "dtype")}
PARTS = {"compare": ("rlhf",), "sweep": ("sae", "rlhf", "interpret")}          # stages that these run, with the same options
FILES = ("corpus", "eval_corpus", "prompts", "eval_prompts", "reward", "gold")           # options that may name a file
# What the text of an SAE's training depends on.
TEXT_DEPENDS = ("model", "corpus", "dtype", "seed", "context", "text_batch", "text_tokens", "eval_tokens", "load")


def parse(argv: list[str]) -> argparse.Namespace:
    """The options: those below, and one `--STAGE-FIELD` for each field of a stage's configuration."""
    parser = argparse.ArgumentParser(usage="python train.py [--OPTION VALUE …]", description="Interpretable RLHF with sparse autoencoders",
                                     allow_abbrev=False, exit_on_error=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--stage", default="all", choices=["all", *STAGES], help="all: sae where --policy needs one, rlhf, and for coef interpret")
    add("--model", default="tiny", help="an embedded model, the folder of a checkpoint, or a name of the Hugging Face hub")
    add("--layer", default=None, help="whose MLP output is read and edited, from 0: a number, several (1,2,3), or all; the middle one")
    add("--policy", default="coef", choices=policies.POLICIES, help="what RLHF trains: coefficients of the SAE, or what to compare them with")
    add("--edit", default="scale", choices=policies.EDITS, help="coefficients, or coefficients and biases")
    add("--reward", default="tiny-reward", help="a reward model (embedded, a folder, or of the hub), or avoid:FILE, a list of words to avoid")
    add("--gold", default="tiny-gold", help="a second reward model, for evaluation only; '' for none")
    add("--prompts", default="assets/prompts.txt", help="one a line, to train on; or a file of preference pairs, for theirs")
    add("--eval-prompts", default="assets/prompts-eval.txt", help="the same, held out")
    add("--corpus", default=None, help="text (.txt, .jsonl, .jsonl.gz) for lm and sae; preference pairs or labelled texts for reward")
    add("--eval-corpus", default=None, help="held-out file of the same kind, for lm and reward")
    add("--out", default="runs/tiny", help="folder of this run; each stage has its own in it")
    add("--tag", default="", help="a word added to the names of the folders but the SAEs', to tell runs apart")
    add("--device", default="auto", help="cpu, cuda, cuda:1 …")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="of the model; auto: bfloat16 where a GPU has it")
    add("--seed", type=int, default=0, help="of all random numbers; compare and sweep take 0, 1, … in its place")
    add("--resume", action="store_true", help="go on with the run in --out")
    for stage, (_, config) in STAGES.items():
        group = parser.add_argument_group(f"--stage {stage}")
        for field in dataclasses.fields(config):
            group.add_argument(f"--{stage}-{field.name.replace('_', '-')}", type=FIELD_TYPES.get(field.type, field.type),
                               default=field.default, help=comments(config).get(field.name, "–").replace("%", "%%"))
    for word in argv:
        with reading(repr(word), "not UTF-8"):
            word.encode()
    args, unknown = parser.parse_known_args(argv)
    args.argv = argv
    if unknown:
        valid = ", ".join(option for action in parser._actions for option in action.option_strings if option.startswith("--"))
        raise UserError(f"unknown option {unknown[0]!r}; valid: {valid}")
    return args


@functools.cache
def comments(config: type) -> dict[str, str]:
    """-> the comment beside each field of a configuration, for --help."""
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config), re.MULTILINE))


def yes_or_no(text: str) -> bool:
    """ValueError, of which argparse makes its line, for any other word."""
    return bool(("no", "yes").index(text))


def number(text: str) -> float:
    """float, but ValueError for NaN and infinities."""
    if not math.isfinite(value := float(text)):
        raise ValueError
    return value


def numbers(text: str) -> tuple[float, ...]:
    """`1,2.5` -> (1.0, 2.5)"""
    return tuple(number(part) for part in text.split(",") if part)


FIELD_TYPES = {bool: yes_or_no, float: number, tuple[float, ...]: numbers,               # argparse tells them by these names
               tuple[str, ...]: lambda text: tuple(part.strip() for part in text.split(",") if part.strip())}


def choose_device(args: argparse.Namespace) -> None:
    """Turn --device and --dtype into torch's."""
    try:
        args.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
        probe = torch.empty(0, device=args.device)
        if probe.device.type == "cuda":
            torch.cuda.set_device(probe.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    default = "bfloat16" if args.device.type == "cuda" and multiplies_bfloat16(args.device) else "float32"
    args.dtype = getattr(torch, default if args.dtype == "auto" else args.dtype)


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """-> the options with what follows from them: args.device, args.dtype, args.layers, and args.configs, the configuration of each stage."""
    args.configs = {stage: config(**{f.name: getattr(args, f"{stage}_{f.name}") for f in dataclasses.fields(config)})
                    for stage, (_, config) in STAGES.items()}
    if not 0 <= args.seed < 2 ** 63:
        raise UserError(f"--seed {args.seed}: give a number from 0 to 2 ** 63 − 1")
    choose_device(args)
    choose_layers(args)
    finished = folder_of(args, "rlhf")
    if args.stage == "interpret" and (finished / "metrics.json").exists():         # the layers that the run edited, whatever --layer says
        with reading(finished / "config.json", "states no layers"):
            args.layers = json.loads(read_json(finished / "config.json")["layers"])
    for path in filter(None, (args.corpus, args.eval_corpus)):
        if not os.path.isfile(path):
            raise UserError(f"{path}: no such file (--corpus, --eval-corpus)")
    return args


def required(value: str | None, option: str) -> str:
    """-> the option's value, or a UserError that asks for it."""
    if not value:
        raise UserError(f"{option} is needed for this stage")
    return value


# --------------------------------------------------------------------------------------------------- the folder of a stage

def folder_of(args: argparse.Namespace, stage: str) -> Path:
    """-> OUT/STAGE; OUT/rlhf-POLICY-TAG, whose report is OUT/report-TAG; OUT/sae-report where there is no such run yet."""
    tag = f"-{args.tag}" if args.tag else ""
    if stage == "sae":
        return sae_folder(args, *args.layers)
    rlhf = Path(args.out) / f"rlhf-{args.policy}{tag}"
    report = f"report{tag}" if (rlhf / "metrics.json").exists() else "sae-report"
    return {"rlhf": rlhf, "interpret": Path(args.out) / report}.get(stage, Path(args.out) / (stage + tag))


def run_config(args: argparse.Namespace, stage: str) -> dict:
    """-> all that a stage's result depends on, its config.json: its own options, those in DEPENDS, and the files that it reads."""
    config = dataclasses.asdict(args.configs[stage])
    for part in PARTS.get(stage, ()):
        config |= {f"{part}_{name}": value for name, value in dataclasses.asdict(args.configs[part]).items()}
    config = {name: value for name, value in config.items() if not name.endswith("checkpoint_seconds")}
    return json.loads(json.dumps(config)) | {name: str(getattr(args, name)) for name in DEPENDS[stage]} | inputs(args, stage)


def inputs(args: argparse.Namespace, stage: str) -> dict[str, str]:
    """-> hashes of the text files that a stage's options name, and of what earlier stages made for this one: coefficients mean nothing on
    another SAE than they were learned on."""
    named = [reward.text_reward(getattr(args, name) or "")[1] for name in FILES if name in DEPENDS[stage]]
    files = []
    if stage in ("rlhf", "interpret") and args.policy in policies.NEED_SAE:
        files += [sae_folder(args, layer) / "sae_weights.safetensors" for layer in args.layers]
    if stage == "interpret":
        files.append(folder_of(args, "rlhf") / "policy.safetensors")
    return {f"sha256 of {name}": sha256(located(name)) for name in named if os.path.isfile(located(name))} | {
        f"sha256 of {path.relative_to(args.out)}": sha256(path) for path in files if path.exists()}


def check_unchanged(args: argparse.Namespace, folder: Path, config: dict) -> None:
    """UserError where a finished run of --policy coef was made with other files than lie there now."""
    made_with = argparse.Namespace(**vars(args) | {name: config[name] for name in FILES if name in config})
    changed = [name.removeprefix("sha256 of ") for name, value in inputs(made_with, "rlhf").items() if config.get(name, value) != value]
    if changed:
        raise UserError(f"{folder}: its coefficients were learned with another {', '.join(changed)} than lies there now: train again, with a --tag")


# ----------------------------------------------------------------------------------------------------- the stages in order

def run_stage(stage: str, args: argparse.Namespace) -> dict:
    """Run one stage in its folder, or take its figures from there where it is finished and --resume was given (not of a comparison)."""
    function, cfg = STAGES[stage][0], args.configs[stage]
    with Run(folder_of(args, stage), run_config(args, stage), args.resume) as run:
        if (run.folder / "metrics.json").exists() and stage not in PARTS:      # a comparison is made anew, of runs that may be other ones now
            figures = read_json(run.folder / "metrics.json")
        else:
            start = time.monotonic()
            if args.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(args.device)
            try:
                figures = function(args, cfg, run)
            except Exception:
                if run.fresh and not (run.folder / "metrics.jsonl").exists():      # so that the mended command can be given again
                    shutil.rmtree(run.folder)
                raise
            figures = run.finish(figures | {"seconds": round(time.monotonic() - start, 2), "peak_memory_gib": peak_memory_gib(args.device)})
    print(f"{run.folder}: " + "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items()
                                        if not isinstance(value, list)))
    return figures


def run_saes(args: argparse.Namespace, missing: bool = False) -> None:
    """Run the sae stage for each of --layer; `missing`: only for those that the run folder has none of."""
    for layer in missing_saes(args) if missing else args.layers:
        if missing:
            print(f"{sae_folder(args, layer)} holds no finished SAE: training it first")
        run_stage("sae", argparse.Namespace(**vars(args) | {"layers": [layer]}))


def check_inputs(args: argparse.Namespace) -> None:
    """UserError for what rlhf will refuse or not find: now, not when the SAE has been trained."""
    policies.check_policy(args.policy, args.edit, args.configs["rlhf"])
    for path in (args.prompts, args.eval_prompts):
        read_prompts(path)
    if args.policy in policies.NEED_SAE:
        missing_saes(args)
    for name in filter(None, (required(args.reward, "--reward"), args.gold)):
        reward.check_reward(name)


def main(argv: list[str] | None = None) -> int:
    """-> exit code: 0; 2 with one line on stderr for what the user can mend; 128 + the signal that stopped it."""
    try:
        args = resolve(parse(sys.argv[1:] if argv is None else argv))
        whole = ["sae"] * (args.policy in policies.NEED_SAE) + ["rlhf"] + ["interpret"] * (args.policy == "coef")
        stages = whole if args.stage == "all" else [args.stage]
        if "rlhf" in stages:
            check_inputs(args)
        for stage in stages:
            if stage == "sae" or stage == "rlhf" and args.policy in policies.NEED_SAE:
                run_saes(args, missing=stage == "rlhf")
            if stage != "sae":
                run_stage(stage, args)
        return 0
    except (UserError, argparse.ArgumentError, OSError) as error:
        code, told = 2, f"error: {error}"
    except torch.OutOfMemoryError as error:
        code, told = 2, (f"error: out of GPU memory ({str(error).splitlines()[0]}): lower --lm-micro-batch, --sae-text-batch, "
                         "--sae-buffer-rows and --sae-batch-size, --reward-batch-size, or --rlhf-micro-batch and --rlhf-generate-batch, "
                         "or take --rlhf-recompute yes, or --dtype bfloat16")
    except KeyboardInterrupt as stopped:
        code, told = 128 + (stopped.args or (signal.SIGINT,))[0], "stopped; --resume goes on from the last saved state"
    print(told, file=sys.stderr)                     # not before the traceback is gone, and with it an unfinished progress bar
    return code


if __name__ == "__main__":
    sys.exit(main())
