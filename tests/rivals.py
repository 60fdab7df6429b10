"""Our SAEs against dictionary_learning's and SAELens', on the very same rows: FVU and ce_recovered at equal L0, and seconds a step.

    python train.py --stage sae                                        # the rows: MLP outputs of its text
    python tests/rivals.py runs/tiny/sae --objective l1,topk,batchtopk

Every side draws from the same rows in the same order, scaled alike (E‖x‖² = D; where ours resamples, it draws some of them for that), the
same number of features, steps and schedule (warm-up, decay, sparsity warm-up as shares of the run), and trains at each of --lrs with seed
0; the best of these, by FVU on held-out rows, then with all seeds. An L1 library that has no L0 target gets the coefficient that leads to
--l0 (± 3 %). Theirs are saved by themselves and read back by `load_sae`. ms_per_step is of the training loop; with --time 3, that is all:
medians of 3 interleaved trainings of 100 steps. Needs dictionary_learning 0.1.0 and sae-lens 6.54.12, which this project does not. One JSON
line a run.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench import NoRun  # noqa: E402
from files import read_json, write_json  # noqa: E402
from pythia import Pythia, read_safetensors  # noqa: E402
from sae import SAE, SAEConfig, evaluate_sae, load_sae, mlp_rows, train_sae  # noqa: E402

LIBRARY_CLASSES = {"l1": "StandardTrainer", "topk": "TopKTrainer", "batchtopk": "BatchTopKTrainer"}


class Rows:
    """The buffer of all sides: rows of one activation file, in an order that the seed alone decides."""

    def __init__(self, rows_ND: Tensor, seed: int):
        self.rows_ND, self.generator = rows_ND, torch.Generator().manual_seed(seed)
        self.shuffle()

    def shuffle(self) -> None:
        self.shuffled_N, self.drawn = torch.randperm(len(self.rows_ND), generator=self.generator), 0

    def draw(self, rows: int) -> Tensor:
        if self.drawn + rows > len(self.rows_ND):
            self.shuffle()
        self.drawn += rows
        return self.rows_ND[self.shuffled_N[self.drawn - rows:self.drawn]]


def ours(args: argparse.Namespace, rows: Rows, seed: int, lr: float, objective: str, l0: float, _: float) -> tuple[SAE, float]:
    cfg = SAEConfig(num_features=args.features, objective=objective, l0=l0, tokens=args.tokens, batch_size=args.batch, lr=lr, refit=args.refit)
    trained = train_sae(rows, cfg, run := NoRun(), torch.Generator().manual_seed(seed))
    return trained, args.tokens / run.tokens_per_second


def dictionary_learning(args: argparse.Namespace, rows: Rows, seed: int, lr: float, objective: str, l0: float, coef: float) -> tuple[Path, float]:
    sys.modules.setdefault("nnsight", types.SimpleNamespace(LanguageModel=object))               # its buffer's, which is not used here
    import dictionary_learning.trainers as trainers

    steps, d_in = args.tokens // args.batch, rows.rows_ND.shape[1]
    options = {"l1_penalty": coef, "sparsity_warmup_steps": int(0.05 * steps)} if objective == "l1" else {"k": round(l0)}
    trainer = getattr(trainers, LIBRARY_CLASSES[objective])(
        steps=steps, activation_dim=d_in, dict_size=args.features, layer=args.layer, lm_name="tiny", lr=lr, warmup_steps=int(0.02 * steps),
        decay_start=int(0.7 * steps), seed=seed, device="cpu", **options)
    start = time.monotonic()
    for step in range(steps):
        trainer.update(step, rows.draw(args.batch))
    seconds, folder = time.monotonic() - start, Path(tempfile.mkdtemp())
    torch.save(trainer.ae.state_dict(), folder / "ae.pt")
    write_json(folder / "config.json", {"trainer": trainer.config})
    return folder, seconds


def saelens(args: argparse.Namespace, rows: Rows, seed: int, lr: float, objective: str, l0: float, coef: float) -> tuple[Path, float]:
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(seed)
    steps, name = args.tokens // args.batch, {"l1": "Standard", "topk": "TopK", "batchtopk": "BatchTopK"}[objective]
    options = {"l1_coefficient": coef, "l1_warm_up_steps": int(0.05 * steps)} if objective == "l1" else {"k": round(l0)}
    sae = getattr(sae_lens, f"{name}TrainingSAE")(getattr(sae_lens, f"{name}TrainingSAEConfig")(
        d_in=rows.rows_ND.shape[1], d_sae=args.features, normalize_activations="none", **options))
    cfg = SAETrainerConfig(total_training_samples=steps * args.batch, train_batch_size_samples=args.batch, lr=lr, lr_end=lr / 100,
                           lr_warm_up_steps=int(0.02 * steps), lr_decay_steps=int(0.3 * steps))

    def batches() -> Iterator[Tensor]:
        while True:
            yield rows.draw(args.batch)

    start = time.monotonic()
    trained = SAETrainer(cfg, sae, batches()).fit()
    seconds = time.monotonic() - start
    trained.cfg.metadata.hook_name, trained.cfg.metadata.model_name = f"blocks.{args.layer}.hook_mlp_out", "tiny"
    folder = Path(tempfile.mkdtemp())
    trained.save_inference_model(str(folder))
    return folder, seconds


SIDES: dict[str, Callable] = {"ours": ours, "dictionary_learning": dictionary_learning, "saelens": saelens}


class Bench:
    """The rows that all sides share, and the measure of what they make of them."""

    def __init__(self, args: argparse.Namespace):
        self.args, text = args, read_safetensors(args.folder / "text.safetensors")
        self.model, self.heldout_BT = Pythia.from_pretrained("tiny", dtype=torch.float32), text["heldout"]
        train_ND, heldout_ND = (mlp_rows(self.model, args.layer, tokens_BT).float()
                                for tokens_BT in (text["train"], self.heldout_BT))
        self.scale = math.sqrt(train_ND.shape[1] / train_ND.square().sum(-1).mean().item())
        self.train_ND, self.heldout_ND = self.scale * train_ND, self.scale * heldout_ND

    @torch.no_grad()
    def run(self, side: str, objective: str, seed: int, lr: float, coef: float = 0.0) -> tuple[dict, SAE]:
        """Train one SAE -> its figures on held-out rows, and itself."""
        with torch.enable_grad():
            made, seconds = SIDES[side](self.args, Rows(self.train_ND, seed), seed, lr, objective, self.args.l0, coef)
        sae = load_sae(made, model=self.model, model_name="tiny", layer=self.args.layer) if isinstance(made, Path) else made
        features_NF, centred_ND = sae.encode(self.heldout_ND), self.heldout_ND - self.heldout_ND.mean(0)
        line = {"bench": "rivals", "side": side, "objective": objective, "seed": seed, "lr": lr, "coef": coef, "tokens": self.args.tokens,
                "l0": (features_NF > 0).sum().item() / len(features_NF),
                "fvu": ((self.heldout_ND - sae.decode(features_NF)).square().sum() / centred_ND.square().sum()).item(),
                "dead": (features_NF > 0).any(0).logical_not().float().mean().item(),
                "ms_per_step": 1000 * seconds / (self.args.tokens // self.args.batch)}
        print(json.dumps(line), flush=True)
        return line, sae

    def steered(self, side: str, objective: str, lr: float, coef: float) -> tuple[dict, SAE]:
        """-> a run of seed 0 whose L0 is within 3 % of --l0: its L1 coefficient is sought by steps along log L0 against log coefficient."""
        slope, previous = -1.0, None
        for _ in range(6):
            line, sae = self.run(side, objective, 0, lr, coef)
            x, y = math.log(coef), math.log(line["l0"] / self.args.l0)
            if abs(y) < 0.03:
                break
            if previous and previous[0] != x:
                slope = min(-0.3, max(-3.0, (y - previous[1]) / (x - previous[0])))
            previous, coef = (x, y), math.exp(x - y / slope)
        return line, sae

    def compare(self, side: str, objective: str) -> None:
        """Sweep the learning rate with seed 0, then run the best one with all seeds."""
        tried, coef = [], 1.0
        for lr in map(float, self.args.lrs.split(",")):
            if objective == "l1" and side != "ours":
                tried.append(self.steered(side, objective, lr, coef))
                coef = tried[-1][0]["coef"]
            else:
                tried.append(self.run(side, objective, 0, lr))
        best = min(tried, key=lambda pair: pair[0]["fvu"])
        runs = [best] + [self.run(side, objective, seed, best[0]["lr"], best[0]["coef"]) for seed in range(1, self.args.seeds)]
        lines = [line | evaluate_sae(self.model, self.args.layer, sae.unscaled(self.scale), self.heldout_BT) for line, sae in runs]
        print(json.dumps({"bench": "rivals", "side": side, "objective": objective, "lr": best[0]["lr"], "seeds": self.args.seeds} | {
            f"{key} (mean, sd)": [statistics.mean(line[key] for line in lines), statistics.stdev(line[key] for line in lines)]
            for key in ("l0", "fvu", "ce_recovered", "dead", "ms_per_step")}), flush=True)

    def time(self, objectives: list[str], sides: list[str], repeats: int) -> None:
        """Print the medians of `repeats` trainings of 100 steps, all sides and objectives in turn, behind one round to warm up."""
        self.args.tokens, found = 100 * self.args.batch, {}
        for repeat in range(repeats + 1):
            for objective, side in itertools.product(objectives, sides):
                seconds = SIDES[side](self.args, Rows(self.train_ND, repeat), repeat, 4e-3, objective, self.args.l0, 1.2)[1]
                found.setdefault((objective, side), []).append(10 * seconds)
        for (objective, side), ms in found.items():
            print(json.dumps({"bench": "rivals", "side": side, "objective": objective, "ms_per_step": statistics.median(ms[1:])}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, help="of a finished sae stage")
    add("--objective", default="l1,topk")
    add("--sides", default=",".join(SIDES))
    add("--lrs", default="1e-3,2e-3,4e-3")
    add("--seeds", type=int, default=3)
    add("--l0", type=float, default=31)
    add("--tokens", type=int, default=512_000)
    add("--batch", type=int, default=512)
    add("--features", type=int, default=2048)
    add("--no-refit", dest="refit", action="store_false", help="ours without the least squares at the end")
    add("--time", type=int, default=0, metavar="N", help="only time N interleaved trainings of 100 steps")
    args = parser.parse_args()
    args.layer = int(read_json(args.folder / "config.json")["layers"].strip("[]"))
    bench, objectives, sides = Bench(args), args.objective.split(","), args.sides.split(",")
    if args.time:
        bench.time(objectives, sides, args.time)
        return
    for objective in objectives:
        for side in sides:
            bench.compare(side, objective)


if __name__ == "__main__":
    main()
