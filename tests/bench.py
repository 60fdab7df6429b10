"""Measurements, one JSON line each. Run by hand on an idle machine; no test depends on them.

    python tests/bench.py bow --corpus TRAIN.jsonl.gz --eval-corpus VAL.jsonl.gz --reward tiny-reward --half 1
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from pythia import Tokenizer, read_rows  # noqa: E402
from reward import RewardModel, cut_pairs, encode_pairs, pad_right, pairs_from_labels  # noqa: E402


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=["bow"])
    parser.add_argument("--corpus")
    parser.add_argument("--eval-corpus")
    parser.add_argument("--reward", default="tiny-reward")
    parser.add_argument("--half", type=int, default=0)
    args = parser.parse_args()
    {"bow": bow}[args.bench](args)


if __name__ == "__main__":
    main()
