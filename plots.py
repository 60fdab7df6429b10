"""Plots, written as PNG: training curves, frontiers, sweeps, and the report's."""

from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from files import write_whole
from interpret import CARRIED, Causal


def plot_curves(path: Path, rows: list[dict], keys: tuple[str, ...], x_label: str) -> None:
    """One panel a key, against the step, from the lines of a metrics.jsonl."""
    figure = Figure((3.2 * len(keys), 2.6), layout="constrained")
    for axis, key in zip(figure.subplots(1, len(keys)), keys):
        points = [(row["step"], row[key]) for row in rows if key in row]
        axis.plot(*zip(*points), marker="." if len(points) < 40 else None)
        axis.set(title=key, xlabel=x_label)
    save_figure(path, axis.figure)


def plot_report(folder: Path, learned: dict[str, Tensor], causal: Causal, runs: dict[str, list]) -> dict[str, Path]:
    """-> the report's plots by name, written to folder/NAME.png. `runs`: see `plot_frontier`."""
    paths = {name: folder / f"{name}.png" for name in ("coefficients", "frontier", "effects", "share")}
    plot_coefficients(paths["coefficients"], {name.removesuffix(".coef_F"): p for name, p in learned.items() if name.endswith(".coef_F")})
    plot_frontier(paths["frontier"], runs)
    plot_effects(paths["effects"], list(causal.effects.values()))
    plot_share(paths["share"], causal.summary["kept"])
    return paths


def plot_coefficients(path: Path, coefs: dict[str, Tensor]) -> None:
    """All coefficients in order of their values, a line a layer."""
    axis = Figure((5, 3.4), layout="constrained").subplots()
    for layer, coef_F in coefs.items():
        axis.plot(coef_F.float().cpu().sort().values.numpy(), label=f"layer {layer}")
    axis.axhline(1, color="grey", linewidth=0.6)
    axis.set(xlabel="features, sorted", ylabel="coefficient c")
    if len(coefs) > 1:
        axis.legend(frameon=False)
    save_figure(path, axis.figure)


def plot_frontier(path: Path, runs: dict[str, list[list[tuple[float, float]]]]) -> None:
    """Gain against KL of the learned change in part and whole: a colour for each name, a line for each of its runs (seeds), a list of (kl, gain)."""
    axis = Figure((5, 3.8), layout="constrained").subplots()
    for i, (name, seeds) in enumerate(runs.items()):
        for number, points in enumerate(seeds):
            axis.plot(*zip((0.0, 0.0), *points), marker=".", color=f"C{i}", linewidth=1, label=None if number else name)
    axis.set(xlabel="KL from the reference, nats a response", ylabel="gain, standard deviations")
    axis.figure.legend(loc="outside upper left", ncols=2, frameon=False)
    save_figure(path, axis.figure)


def plot_sweep(path: Path, rows: list[dict]) -> None:
    """What each SAE explains against its L0, and, where RLHF was run, what it gains at equal KL: a colour for each objective."""
    panels = [key for key in ("fvu", "ce_recovered", "explanation_score", "gain", "carriers") if any(row.get(key) is not None for row in rows)]
    figure = Figure((3.6 * len(panels), 3), layout="constrained")
    for axis, key in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for i, objective in enumerate(dict.fromkeys(row["objective"] for row in rows)):
            points = sorted((row["l0"], row[key]) for row in rows if row["objective"] == objective and row.get(key) is not None)
            axis.plot(*zip(*points) if points else ((), ()), marker=".", color=f"C{i}", linewidth=1, label=objective)
        axis.set(title=key, xlabel="L0")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    save_figure(path, axis.figure)


def plot_effects(path: Path, effects: list[dict]) -> None:
    """Measured against predicted effects."""
    axis = Figure((5, 3.4), layout="constrained").subplots()
    x, y = [effect["predicted"] for effect in effects], [effect["set_back"]["mean"] for effect in effects]
    axis.axline((0, 0), slope=1, color="grey", linewidth=0.6)
    axis.errorbar(x, y, [effect["set_back"]["se"] or 0 for effect in effects], fmt=".", linewidth=0.7)
    axis.set(xlabel="predicted: gradient × move", ylabel="measured: loss when set back, ± SE")
    save_figure(path, axis.figure)


def plot_share(path: Path, kept: list[dict]) -> None:
    """The gain that the k strongest features reach alone, against k."""
    axis = Figure((5, 3.4), layout="constrained").subplots()
    axis.errorbar([point["k"] for point in kept], [point["mean"] for point in kept], [point["se"] or 0 for point in kept], marker=".", linewidth=1)
    axis.axhline(CARRIED * kept[-1]["mean"], color="grey", linewidth=0.6, linestyle="--")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="features kept, strongest first; dashed: 90 % of the gain", ylabel="gain, standard deviations")
    save_figure(path, axis.figure)


def save_figure(path: Path, figure: Figure) -> None:
    """Write a matplotlib figure as PNG, whole or not at all."""
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=150))
