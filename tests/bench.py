"""Measurements, one JSON line each. Run by hand on an idle machine; no test depends on them.

    python tests/bench.py bow --corpus TRAIN.jsonl.gz --eval-corpus VAL.jsonl.gz --reward tiny-reward --half 1
    python tests/bench.py planted --objective l1,topk --tokens 2000000
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from pythia import Tokenizer, read_rows  # noqa: E402
from reward import RewardModel, cut_pairs, encode_pairs, pad_right, pairs_from_labels  # noqa: E402
from sae import ActivationBuffer, SAEConfig, mmcs, train_on_rows  # noqa: E402


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
        cut = cut_pairs(train, length)
        x = bag_of_words([pair[side] for side in (0, 1) for pair in cut], tokenizer.vocab_size)
        y = torch.cat([torch.ones(len(cut)), torch.zeros(len(cut))])
        weights += [fit_logistic(x, y, l2) for l2 in (1e-5, 1e-4, 1e-3)]
    for length in (32, 256):
        cut = cut_pairs(heldout, length)
        chosen, rejected = (bag_of_words([pair[side] for pair in cut], tokenizer.vocab_size) for side in (0, 1))
        best = max(all_pairs_accuracy(chosen @ w, rejected @ w) for w in weights)
        with torch.no_grad():
            scores = [torch.cat([model.score(*pad_right([pair[side] for pair in cut[i:i + 64]], model.device))
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
        sae, = train_on_rows(buffer, [cfg], run, generator)
        seconds = time.monotonic() - start
        fired_F = torch.stack([(sae.encode(chunk) > 0).sum(0) for chunk in buffer.rows_ND.split(8192)]).sum(0)
        print(json.dumps({"bench": "planted", "objective": objective, "seed": args.seed, "tokens": args.tokens, "lr": args.lr,
                          "mean_best_cosine": round(mmcs(buffer.directions_GD, sae.W_dec_FD), 4),
                          "dead": (fired_F == 0).float().mean().item(), "l0": round(fired_F.sum().item() / len(buffer.rows_ND), 2),
                          "resampled": sum(line.get("resampled", 0) for line in run.lines), "fvu": round(run.lines[-1]["fvu"], 4),
                          "seconds": round(seconds, 1)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=["bow", "planted"])
    parser.add_argument("--corpus")
    parser.add_argument("--eval-corpus")
    parser.add_argument("--reward", default="tiny-reward")
    parser.add_argument("--half", type=int, default=0)
    parser.add_argument("--objective", default="l1,topk")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--l0", type=float, default=10.0)
    parser.add_argument("--lr", type=float, default=SAEConfig.lr)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    {"bow": bow, "planted": planted}[args.bench](args)


if __name__ == "__main__":
    main()
