"""From coefficients to evidence: what each feature that RLHF moved stands for, and a page that shows it.

Dimension key: B batch   T tokens   N rows (tokens, flattened)   D hidden size   F SAE features   G the features looked at
               C classes of tokens   V vocabulary
"""

import base64
import copy
import html
import io
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor

from ppo import Evaluated, Evaluation
from pythia import END_OF_TEXT, Pythia, Tokenizer, read_json, write_json, write_whole
from sae import SAE

matplotlib.use("Agg")                                # draw into files, without a screen
from matplotlib import pyplot as plt  # noqa: E402  (the backend is chosen first)


@dataclass(frozen=True)
class InterpretConfig:
    """--stage interpret"""

    features: int = 32                   # cards: half of them for the features turned up most, half for those turned down most
    contexts: int = 8                    # top contexts a card
    width: int = 12                      # tokens of context on each side of the strongest one
    logit_tokens: int = 10               # promoted and suppressed tokens a card
    samples: int = 16                    # held-out prompts shown with the text before and after


# ------------------------------------------------------------------------------------------------------------ feature cards

@dataclass
class Context:
    """A stretch of text and one feature's activation on each of its tokens."""
    tokens: list[str]
    activations: list[float]


@dataclass
class FeatureCard:
    """What is known of one feature, all of it measured."""
    layer: int
    feature: int
    coef: float                          # c, 1 where RLHF left it alone
    bias: float                          # b, 0 likewise
    firing_rate: float                   # share of held-out tokens on which it is active
    contexts: list[Context]              # where it is most active, one a window of text
    promoted: list[tuple[str, float]]    # tokens whose logits its direction raises most, with the change per unit of activation
    suppressed: list[tuple[str, float]]


@torch.no_grad()
def feature_activations(model: Pythia, layer: int, sae: SAE, tokens_BT: Tensor, features: list[int], batch_size: int = 16) -> tuple[Tensor, Tensor]:
    """-> activations_BTG of the given features on windows of text, and firing_rate_F of all features. Both leave out each
    window's first token, which SAEs here are not trained on."""
    chunks, fired_F = [], torch.zeros(sae.num_features, device=model.device)
    for batch_BT in tokens_BT.split(batch_size):
        features_BTF = sae.encode(model.mlp_output(batch_BT.long().to(model.device), layer).float())
        features_BTF[:, 0] = 0
        fired_F += (features_BTF > 0).flatten(0, 1).sum(0)
        chunks.append(features_BTF[..., features].cpu())
    return torch.cat(chunks), (fired_F / (tokens_BT.shape[0] * (tokens_BT.shape[1] - 1))).cpu()


def top_contexts(activations_BT: Tensor, tokens_BT: Tensor, tokenizer: Tokenizer, number: int, width: int) -> list[Context]:
    """-> the contexts of one feature's strongest activations, at most one a window, strongest first; none where it is silent."""
    peak_B, place_B = activations_BT.max(1)
    contexts = []
    for b in peak_B.argsort(descending=True, stable=True)[:number].tolist():
        if peak_B[b] <= 0:
            break
        span = slice(max(0, int(place_B[b]) - width), int(place_B[b]) + width + 1)
        contexts.append(Context([tokenizer.decode([i]) for i in tokens_BT[b, span].tolist()],
                                [round(a, 4) for a in activations_BT[b, span].tolist()]))
    return contexts


@torch.no_grad()
def logit_effect(model: Pythia, direction_GD: Tensor) -> Tensor:
    """-> effect_GV: how much one unit of each direction, added to the final residual stream, moves each token's logit beside
    the others'. The direct path only: layers in between are passed by, and the final layer norm's division is left out (it
    scales all tokens alike)."""
    weight_D = model.gpt_neox.final_layer_norm.weight.float()
    direction_GD = direction_GD.float() - direction_GD.float().mean(-1, keepdim=True)          # the layer norm takes the mean out
    effect_GV = (direction_GD * weight_D) @ model.embed_out.weight.float().T
    return effect_GV - effect_GV.mean(-1, keepdim=True)


def moved_features(coef_F: Tensor, bias_F: Tensor | None, number: int) -> list[int]:
    """-> the features that RLHF moved most, first those turned up, then those turned down, at most half of `number` each."""
    move_F = (coef_F - 1) + (0 if bias_F is None else bias_F)
    order = move_F.argsort(descending=True, stable=True).tolist()
    up = [i for i in order if move_F[i] > 0][:number // 2]
    down = [i for i in reversed(order) if move_F[i] < 0][:number // 2]
    return up + down


def make_cards(model: Pythia, tokenizer: Tokenizer, layer: int, sae: SAE, coef_F: Tensor, bias_F: Tensor | None, tokens_BT: Tensor,
               cfg: InterpretConfig) -> tuple[list[FeatureCard], Tensor]:
    """-> cards of the features that moved most, and firing_rate_F of all."""
    chosen = moved_features(coef_F, bias_F, cfg.features)
    activations_BTG, firing_rate_F = feature_activations(model, layer, sae, tokens_BT, chosen)
    effect_GV = logit_effect(model, sae.W_dec_FD[chosen])[:, :tokenizer.vocab_size]
    cards = []
    for g, i in enumerate(chosen):
        ends = []                                    # the promoted, then the suppressed tokens
        for sign in (1, -1):
            values, ids = (sign * effect_GV[g]).topk(cfg.logit_tokens)
            ends.append([(tokenizer.decode([v]), round(sign * value, 4)) for value, v in zip(values.tolist(), ids.tolist())])
        cards.append(FeatureCard(layer, i, coef_F[i].item(), 0.0 if bias_F is None else bias_F[i].item(), firing_rate_F[i].item(),
                                 top_contexts(activations_BTG[..., g], tokens_BT, tokenizer, cfg.contexts, cfg.width), *ends))
    return cards, firing_rate_F


def paired_samples(tokenizer: Tokenizer, evaluation: Evaluation, after: Evaluated) -> list[dict]:
    """-> one sample a held-out prompt, before and after, drawn with the same random numbers."""
    R, before = evaluation.cfg.response_tokens, evaluation.reference

    def text(tokens_T: Tensor, mask_T: Tensor) -> str:
        return tokenizer.decode(tokens_T[mask_T.bool()].cpu()).removeprefix(END_OF_TEXT)

    return [{"prompt": text(before.tokens_BT[b, :-R], before.mask_BT[b, :-R]),
             "before": text(before.tokens_BT[b, -R:], before.mask_BT[b, -R:]), "score_before": before.scores_B[b].item(),
             "after": text(after.tokens_BT[b, -R:], after.mask_BT[b, -R:]), "score_after": after.scores_B[b].item()}
            for b in range(0, len(after.tokens_BT), evaluation.cfg.eval_samples)]


# ---------------------------------------------------------------------------------------------- explanations without a judge

class Explanation(NamedTuple):
    """How far the text at hand predicts each column, on windows it was not fitted to; NaN for columns silent in either half."""
    pearson_F: Tensor                    # between prediction and activation
    f1_F: Tensor                         # of "active", predicted above the level that as many fitted rows reach as were active


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


@torch.no_grad()
def token_entropy(activations_NF: Tensor, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
    """-> entropy_F in nats of the tokens on which each column is active, and share_F of the most frequent one; NaN where it is silent."""
    token_N = tokens_BT[:, 1:].flatten().unique(return_inverse=True)[1]
    on_NF = (activations_NF > 0).float().cpu()
    share_CF = torch.zeros(int(token_N.max()) + 1, on_NF.shape[1]).index_add(0, token_N, on_NF) / on_NF.sum(0)
    return torch.special.entr(share_CF).sum(0), share_CF.max(0).values


# Controls, to be scored in the same way as an SAE's features: `mlp_rows` themselves (the MLP output's coordinates) and their products with
# random unit directions, both through `as_sparse_as`, and the features of an SAE trained on `shuffled_weights`.

def as_sparse_as(values_NG: Tensor, rate_F: Tensor) -> Tensor:
    """-> (values − threshold)⁺ with a threshold for each column, such that their firing rates are spread as rate_F is."""
    rate_G = rate_F.cpu().sort().values[torch.linspace(0, len(rate_F) - 1, values_NG.shape[1]).round().long()]
    rank_G = (rate_G * len(values_NG)).round().long().clamp(max=len(values_NG) - 1)
    threshold_G = values_NG.sort(0, descending=True).values.gather(0, rank_G.to(values_NG.device)[None])
    return F.relu(values_NG - threshold_G)


def shuffled_weights(model: Pythia, generator: torch.Generator) -> Pythia:
    """-> a model whose parameters hold the same numbers, each tensor's in random order: it has learned nothing (Heap et al. 2025)."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
        parameter.data = parameter.data.flatten()[order].view_as(parameter)
    return model


# -------------------------------------------------------------------------------------------------------------------- plots

def plot_curves(path: Path, rows: list[dict], keys: tuple[str, ...], x_label: str) -> None:
    """One panel a key, against the step, from the lines of a metrics.jsonl."""
    figure, axes = plt.subplots(1, len(keys), figsize=(3.2 * len(keys), 2.6), layout="constrained")
    for axis, key in zip(axes, keys):
        points = [(row["step"], row[key]) for row in rows if key in row]
        axis.plot(*zip(*points), marker="." if len(points) < 40 else None)
        axis.set(title=key, xlabel=x_label)
    save_figure(path, figure)


def plot_coefficients(path: Path, coef_F: Tensor, firing_rate_F: Tensor) -> None:
    """All coefficients in order, and each against how often its feature fires."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    left.plot(coef_F.sort().values.numpy())
    left.axhline(1, color="grey", linewidth=0.6)
    left.set(title="coefficients, sorted", xlabel="features", ylabel="c")
    alive = firing_rate_F > 0
    right.semilogx(firing_rate_F[alive].numpy(), coef_F[alive].numpy(), ".", markersize=3, alpha=0.6)
    right.axhline(1, color="grey", linewidth=0.6)
    right.set(title="against firing rate", xlabel="share of tokens on which the feature fires")
    save_figure(path, figure)


def plot_frontier(path: Path, runs: dict[str, list[list[tuple[float, float]]]]) -> None:
    """Gain against KL along training: a colour for each name, a line for each of its runs (seeds), which is a list of (kl, gain)."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for i, (name, seeds) in enumerate(runs.items()):
        for number, points in enumerate(seeds):
            axis.plot(*zip((0.0, 0.0), *points), marker=".", color=f"C{i}", linewidth=1, label=None if number else name)
    axis.set(xlabel="KL from the reference, nats a response", ylabel="gain, standard deviations")
    axis.legend(frameon=False)
    save_figure(path, figure)


def plot_sweep(path: Path, rows: list[dict]) -> None:
    """What each SAE explains against its L0, and, where RLHF was run, what it gains: a colour for each objective."""
    panels = [key for key in ("fvu", "ce_recovered", "explanation_score", "score_gain_std") if key in rows[0]]
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3), layout="constrained", squeeze=False)
    for axis, key in zip(axes[0], panels):
        for i, objective in enumerate(dict.fromkeys(row["objective"] for row in rows)):
            points = sorted((row["l0"], row[key]) for row in rows if row["objective"] == objective)
            axis.plot(*zip(*points), marker=".", color=f"C{i}", linewidth=1, label=objective)
        axis.set(title=key, xlabel="L0")
    axes[0, 0].legend(frameon=False, fontsize="small")
    save_figure(path, figure)


def save_figure(path: Path, figure) -> None:
    """Write a matplotlib figure as PNG, whole or not at all, and free it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    write_whole(path, lambda file: file.write(buffer.getvalue()))


# --------------------------------------------------------------------------------------------------------------------- page

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #ddd; --soft: #666; --mark: 230, 140, 0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #161616; --line: #3a3a3a; --soft: #a0a0a0; }
  img { filter: invert(.88) hue-rotate(180deg); } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } img { max-width: 100%; } .soft { color: var(--soft); } .wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
td, th { border-bottom: 1px solid var(--line); padding: .35rem .5rem; text-align: left; vertical-align: top; }
.card { border: 1px solid var(--line); border-radius: 6px; padding: .6rem 1rem; margin: 1rem 0; break-inside: avoid; }
.context { font: 14px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; border-bottom: 1px dotted var(--line); }
.token { border-radius: 3px; } code { font: 14px ui-monospace, monospace; overflow-wrap: anywhere; }
"""


def write_report(folder: str | Path, report: dict) -> Path:
    """Write report.json and the page made of it alone, index.html -> the page's path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", report)
    page = render_report(read_json(folder / "report.json"))
    write_whole(folder / "index.html", lambda file: file.write(page.encode()))
    return folder / "index.html"


def render_report(report: dict) -> str:
    """-> one self-contained HTML page; every text from a model or a file is escaped."""
    cards = [FeatureCard(**card | {"contexts": [Context(**c) for c in card["contexts"]]}) for card in report["features"]]
    up, down = [c for c in cards if c.coef - 1 + c.bias > 0], [c for c in cards if c.coef - 1 + c.bias < 0]
    parts = [
        f"<h1>{escape(report['title'])}</h1>",
        "<p>RLHF learned one number for each SAE feature, the coefficient that scales its output vector; 1 leaves the model as it was. "
        f"<b>{report['rlhf']['n_changed']}</b> of {report['num_features']} coefficients moved, the score rose by "
        f"<b>{report['rlhf']['score_gain_std']:.2f} ± {report['rlhf']['score_gain_std_se']:.2f}</b> standard deviations at "
        f"<b>{report['rlhf']['kl']:.2f}</b> nats from the reference.</p>",
        *(f'<img alt="{escape(name)}" src="data:image/png;base64,{data}">' for name, data in report["plots"].items()),
        "<h2>Text before and after</h2><p class=soft>Held-out prompts; both continuations were drawn with the same random numbers.</p>",
        samples_table(report["samples"]),
        "<h2>Features turned up</h2>", *map(card_html, up), "<h2>Features turned down</h2>", *map(card_html, down),
        "<h2>Figures</h2>", figures_table("RLHF", report["rlhf"]), figures_table("SAE", report["sae"]),
        "<h2>Run</h2>", figures_table("Configuration", report["config"]), f"<p>Command: <code>{escape(report['command'])}</code></p>",
    ]
    return (f'<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">'
            f"<title>{escape(report['title'])}</title><style>{STYLE}</style><body>{''.join(parts)}</body></html>")


def escape(text: object) -> str:
    """HTML-escape, with control characters made visible."""
    return html.escape("".join(c if c >= " " or c == "\n" else "�" for c in str(text)))


def card_html(card: FeatureCard) -> str:
    """-> one feature's card; its contexts are shaded in proportion to its strongest activation."""
    peak = max((a for context in card.contexts for a in context.activations), default=1.0)
    contexts = "".join(f'<div class=context>{"".join(token_html(t, a / peak) for t, a in zip(c.tokens, c.activations))}</div>' for c in card.contexts)
    ends = (f"<p><b>{verb}</b> {' '.join(f'<code>{escape(repr(token)[1:-1])}</code> {value:+.2f}' for token, value in tokens)}</p>"
            for verb, tokens in (("promotes", card.promoted), ("suppresses", card.suppressed)))
    learned = f"c = {card.coef:.3f}" + (f", b = {card.bias:.3f}" if card.bias else "")
    return (f'<div class=card id="f{card.layer}-{card.feature}"><b>Feature {card.feature}</b> (layer {card.layer}): {learned}, '
            f"active on {100 * card.firing_rate:.2f} % of tokens{''.join(ends)}{contexts or '<p>silent on the text looked at</p>'}</div>")


def token_html(token: str, strength: float) -> str:
    """-> a token, shaded by `strength` in [0, 1]; line breaks are made visible."""
    text = escape(token.replace("\n", "↵"))
    return f'<span class=token style="background:rgba(var(--mark),{min(1, strength):.2f})">{text}</span>' if strength > 0 else text


def samples_table(samples: list[dict]) -> str:
    """-> prompts with the reference's and the policy's continuations and scores, side by side."""
    rows = "".join(f"<tr><td>{escape(s['prompt'])}</td><td>{escape(s['before'])}<br><span class=soft>score {s['score_before']:.2f}</span></td>"
                   f"<td>{escape(s['after'])}<br><span class=soft>score {s['score_after']:.2f}</span></td></tr>" for s in samples)
    return f"<div class=wide><table><tr><th>prompt</th><th>reference</th><th>after RLHF</th></tr>{rows}</table></div>"


def figures_table(title: str, figures: dict) -> str:
    """-> a heading and a table of names and values."""
    rows = "".join(f"<tr><td>{escape(key)}</td><td>{escape(f'{v:.4g}' if isinstance(v, float) else v)}</td></tr>" for key, v in figures.items())
    return f"<h3>{escape(title)}</h3><div class=wide><table>{rows}</table></div>"


def inline_png(path: Path) -> str:
    """-> a PNG file as base64."""
    return base64.b64encode(path.read_bytes()).decode()
