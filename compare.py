"""What --stage compare and --stage sweep (in train.py) lay side by side: gain at equal KL, read off frontiers, with intervals; tables.

Dimension key: E points of a frontier   P held-out prompts   S runs, one a seed   K KLs at which gains are read off
"""

import math
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from files import UserError, read_rows, reading, write_whole
from run import check_positive

# Columns of the tables: keys of metrics.json.
RLHF_FIGURES = ("score_gain_std", "kl", "gold_gain_std", "reward_loss", "distinct_2", "ref_perplexity", "n_changed", "seconds", "peak_memory_gib")
SAE_FIGURES = ("l0", "fvu", "ce_recovered", "dead_fraction", "shrinkage", "explanation_score")


@dataclass(frozen=True)
class CompareConfig:
    """--stage compare"""

    runs: str = "coef; random; steer; full"      # policies to train, each with options of its own, as in "coef --edit scale+bias --rlhf-keep 64"
    seeds: int = 3                               # runs of each, with seeds 0, 1, …
    kls: tuple[float, ...] = (1.0, 2.0, 4.0, 6.0)        # nats at which gains are compared

    def __post_init__(self):
        check_positive(self, "compare", "seeds")
        if not self.names() or not all(kl > 0 for kl in self.kls):
            raise UserError("--compare-runs needs a policy or more, and --compare-kls numbers above 0")
        with reading("--compare-runs", "not readable as options"):
            for name in self.names():
                shlex.split(name)

    def names(self) -> list[str]:
        """-> the runs one by one."""
        return [" ".join(part.split()) for part in self.runs.split(";") if part.strip()]


@dataclass(frozen=True)
class SweepConfig:
    """--stage sweep"""

    objectives: tuple[str, ...] = ("l1", "topk", "batchtopk", "jumprelu")        # of the SAEs
    l0: tuple[float, ...] = (10.0, 20.0, 40.0)           # their targets
    seeds: int = 3                                       # of each, with seeds 0, 1, …
    rlhf: bool = True                                    # also train --policy on each SAE
    kl: float = 2.0                                      # nats at which gains are compared

    def __post_init__(self):
        check_positive(self, "sweep", "seeds", "kl")
        if not self.objectives or not self.l0:
            raise UserError("--sweep-objectives and --sweep-l0 need one or more")


def evaluations(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """-> KL and gain of each held-out prompt at each point of a run's frontier, kl_EP and gain_EP."""
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "eval_kls" in row]
    return np.array([row["eval_kls"] for row in rows]), np.array([row["eval_gains"] for row in rows])


def frontier(folder: Path) -> list[tuple[float, float]]:
    """-> (KL, gain) of each point of a run's frontier."""
    return [(kl_P.mean(), gain_P.mean()) for kl_P, gain_P in zip(*evaluations(folder))]


def gain_at_kl(kl_E: np.ndarray, gain_E: np.ndarray, at: float) -> float:
    """-> the gain where a frontier comes to `at` > 0 nats, between its points E (and from 0 on) linear in √KL, as gain is near the reference;
    NaN where it ends before."""
    root_E, gain_E = np.append(0.0, kl_E) ** 0.5, np.append(0.0, gain_E)
    if not (reached := np.flatnonzero(root_E >= at ** 0.5)).size:
        return math.nan
    i = reached[0]
    return float(np.interp(at ** 0.5, root_E[i - 1:i + 1], gain_E[i - 1:i + 1]))


def gains_at_kls(runs: list[tuple[np.ndarray, np.ndarray]], kls: tuple[float, ...], draws: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """-> mean over runs (one a seed; each kl_EP and gain_EP, the points of a frontier by held-out prompts) of the gain at each KL, (K,),
    NaN where a run does not come so far; and the same for `draws` bootstrap samples of seeds and of prompts, (draws, K). The samples are
    the same in every call with as many seeds and prompts, so that differences between policies are paired. Resampling both counts the
    variance between S seeds (S − 1)/S times, and that of single cells, of a seed's samples for a prompt, 3 − 2/S times: where cells
    dominate, intervals of the quantiles are too wide, by √(3 − 2/S); where two or three seeds differ much, too narrow, by √(1 − 1/S)."""
    def mean_gains(seeds: Sequence[int], prompts: np.ndarray | slice) -> list[float]:
        frontiers = [[x_EP[:, prompts].mean(1) for x_EP in runs[s]] for s in seeds]
        return [np.mean([gain_at_kl(kl_E, gain_E, at) for kl_E, gain_E in frontiers]) for at in kls]

    rng, S, P = np.random.default_rng(0), len(runs), runs[0][0].shape[1]
    drawn = [mean_gains(rng.integers(S, size=S), rng.integers(P, size=P)) for _ in range(draws)]
    return np.array(mean_gains(range(S), slice(None))), np.array(drawn)


def means(figures: list[dict], keys: tuple[str, ...] = RLHF_FIGURES) -> dict:
    """-> the means over runs, of what each of them measured."""
    return {key: statistics.mean(each[key] for each in figures) for key in keys if all(each.get(key) is not None for each in figures)}


def intervals(title: str, kls: tuple[float, ...], values: np.ndarray, drawn: np.ndarray) -> dict[str, str]:
    """-> columns of a table: the value at each KL with the middle 95 % of its bootstrap samples, the rows of `drawn`; "not reached" where more
    than 2.5 % of these do not come so far, for the others would make the interval too high."""
    return {f"{title} {at:g}": f"{value:.2f} [{np.nanquantile(sample, 0.025):.2f}, {np.nanquantile(sample, 0.975):.2f}]"
            if math.isfinite(value) and np.isnan(sample).mean() <= 0.025 else "not reached" for at, value, sample in zip(kls, values, drawn.T)}


def write_tables(path: Path, *tables: list[dict]) -> None:
    """Print tables, and write them in Markdown."""
    lines = []
    for rows in filter(None, tables):
        columns = list(dict.fromkeys(key for row in rows for key in row))                # a run without a gold model has no such figure
        cells = [[f"{value:.3g}" if isinstance(value, float) else str(value) for value in (row.get(key, "") for key in columns)] for row in rows]
        lines += ["", *("| " + " | ".join(line) + " |" for line in (columns, ["---"] * len(columns), *cells))]
    print("\n".join(lines))
    write_whole(path, lambda file: file.write("\n".join([*lines[1:], ""]).encode()))
