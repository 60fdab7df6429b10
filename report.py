"""The page that shows what RLHF changed: from report.json, and nothing else, to one self-contained HTML file.

`interpret.write_report` writes both. A report is a dict of numbers and texts, with plots as base64 PNG:

    title, name, commands, config, versions what was run, and how to run it again
    rlhf, runs, causal, samples             figures of this run and of those beside it, `interpret.causal_effects`, before and after;
                                            rlhf and causal are None where there is an SAE alone
    saes, features                          figures of each layer's SAE; `interpret.FeatureCard`s as dicts
    plots                                   {name: data}
"""

import base64
import hashlib
import html
import math
import re

SECTIONS = 256                                       # features with a section of their own; a browser takes no 10,000 of them

STYLE = """
:root { color-scheme: light; --ink: #1c1c1c; --paper: #fff; --line: #d9d9d9; --soft: #5f5f5f; --tint: #f3f3f1; --link: #0b57a4;
  --a: 236,150,20; --p: 40,120,215; --n: 214,90,50; }
@media screen and (prefers-color-scheme: dark) {
  :root { color-scheme: dark; --ink: #e4e4e4; --paper: #1a1a1a; --line: #3b3b3b; --soft: #a3a3a3; --tint: #262626; --link: #8ab8ec;
    --a: 205,125,10; --p: 60,130,225; --n: 205,80,45; }
  img { filter: invert(.9) hue-rotate(180deg); } }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 78rem; margin: 0 auto;
  padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.3rem; margin: 3rem 0 .5rem; border-top: 1px solid var(--line); padding-top: 1.2rem; }
h3 { font-size: 1.05rem; margin: 1.4rem 0 .4rem; }
p { max-width: 46rem; margin: .6rem 0; } a { color: var(--link); } nav a { margin-right: 1rem; } .soft { color: var(--soft); font-size: .85rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: 1rem; margin: 1.5rem 0; }
.figures div { border-left: 3px solid var(--link); padding-left: .8rem; }
.figures b { display: block; font-size: 1.8rem; font-weight: 600; line-height: 1.25; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: .4rem 2rem; align-items: start; }
.pair > * { min-width: 0; } figure { margin: .6rem 0; } figcaption { font-size: .85rem; color: var(--soft); }
img { max-width: 100%; height: auto; } .wide { overflow-x: auto; } .wide img { max-width: none; width: 64rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; margin: .4rem 0; }
td, th { border-bottom: 1px solid var(--line); padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; }
td[data-v], td code, nav a { white-space: nowrap; }
.bar { height: .8rem; margin-top: .3rem; background: rgb(var(--p)); }
#listed td:not([data-v]) { min-width: 8rem; } #listed td:nth-child(2) { min-width: 0; }
th button { all: unset; cursor: pointer; font-weight: 600; text-decoration: underline dotted; }
th button:focus-visible { outline: 2px solid var(--link); }
th[aria-sort=descending] button::after { content: " ▾"; } th[aria-sort=ascending] button::after { content: " ▴"; }
input { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--soft); border-radius: 4px; padding: .3rem .6rem;
  width: min(100%, 20rem); }
code, .text { font: .82rem/1.65 ui-monospace, monospace; overflow-wrap: anywhere; white-space: pre-wrap; }
code { background: var(--tint); border-radius: 3px; padding: 0 .25em; } .text { border-bottom: 1px dotted var(--line); padding: .1rem 0; }
.text, code, i { unicode-bidi: isolate; } i { font-style: normal; border-radius: 2px; }
.card { content-visibility: auto; contain-intrinsic-size: auto 44rem; border-top: 1px solid var(--line); padding-bottom: 1rem; }
.card:target h3 { text-decoration: underline; }
svg { display: block; width: 100%; max-width: 22rem; height: 4rem; fill: rgb(var(--p)); border-bottom: 1px solid var(--soft); }
@media print { nav, .search { display: none; } .sample, figure, tr { break-inside: avoid; } .card { content-visibility: visible; }
  body { font-size: 11px; max-width: none; } i { print-color-adjust: exact; -webkit-print-color-adjust: exact; } .wide { overflow: visible; }
  .wide img { max-width: 100%; } }
""" + "".join(f".{kind}{n}{{background:rgba(var(--{kind}),{(n + 1) / 13:.2f})}}" for kind in "apn" for n in range(1, 10))

SCRIPT = """
const table = document.getElementById("listed"), search = document.getElementById("search"), count = document.getElementById("count");
const rows = [...table.tBodies[0].rows], texts = rows.map(row => row.textContent.toLowerCase());
const heads = [...table.querySelectorAll("th")];
const key = (row, i) => row.cells[i].dataset.v === undefined ? row.cells[i].textContent : Number(row.cells[i].dataset.v);
heads.forEach((head, i) => head.firstChild.addEventListener("click", () => {
  const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
  heads.forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  const compare = (a, b) => Number.isNaN(a) - Number.isNaN(b) || (a < b ? -sign : a > b ? sign : 0);
  const sorted = rows.map(row => [key(row, i), row]).sort((a, b) => compare(a[0], b[0]));
  table.tBodies[0].append(...sorted.map(pair => pair[1]));
}));
search.addEventListener("input", () => {
  const wanted = search.value.toLowerCase();
  rows.forEach((row, i) => { row.hidden = !texts[i].includes(wanted); });
  count.textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length}`;
});
"""


def render_report(report: dict) -> str:
    """-> one self-contained HTML page. Every text from a model or a file is escaped; should one slip through, the page's own security
    policy runs no script but SCRIPT and loads nothing."""
    parts = {"features": ("Features", features_html), "sae": ("SAE", sae_html), "run": ("Run", run_html)}
    if report["rlhf"]:
        parts = {"answer": ("Answer", answer_html), "samples": ("Before and after", samples_html)} | parts
    links = " ".join(f'<a href="#{key}">{title}</a>' for key, (title, _) in parts.items())
    body = "".join(f"<section id={key}>{make(report)}</section>" for key, (_, make) in parts.items())
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return ('<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">'
            f'<meta http-equiv=Content-Security-Policy content="{policy}"><link rel=icon href="data:,"><title>{escape(report["title"])}</title>'
            f"<style>{STYLE}</style><body><h1>{escape(report['title'])}</h1><nav>{links}</nav>{body}<script>{SCRIPT}</script></body></html>")


# ------------------------------------------------------------------------------------------------------------------- pieces

# Control characters (but line breaks), marks that turn the direction of text round, and halves of surrogate pairs, which no file can hold.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def escape(text: object) -> str:
    """HTML-escape, with control characters made visible."""
    return html.escape(UNSEEN.sub("\ufffd", str(text)))


def show(value: float | None, form: str = "+.3f") -> str:
    """-> a number, or a dash where there is none."""
    return "–" if value is None else format(value, form).replace("-", "−")


def pm(pair: dict, form: str = "+.3f") -> str:
    """-> mean ± standard error."""
    return f"{show(pair['mean'], form)} ± {show(pair['se'], form.removeprefix('+'))}"


def table(columns: list[str], rows: list[list], name: str = "") -> str:
    """-> a table of HTML cells; a pair (number, HTML) sorts by its number. With a name its columns can be sorted."""
    def cell(content: str | tuple) -> str:
        return f"<td>{content}" if isinstance(content, str) else f'<td data-v="{"NaN" if content[0] is None else content[0]}">{content[1]}'

    heads = "".join(f"<th scope=col><button>{column}</button>" if name else f"<th scope=col>{column}" for column in columns)
    body = "".join("<tr>" + "".join(map(cell, row)) for row in rows)
    return f'<div class=wide><table{f" id={name}" if name else ""}><thead><tr>{heads}</thead><tbody>{body}</tbody></table></div>'


def values(figures: dict) -> str:
    """-> a table of names and values."""
    return table(["", ""], [[escape(key), escape(f"{v:.4g}" if isinstance(v, float) else v)] for key, v in figures.items()])


def image(report: dict, name: str, caption: str) -> str:
    """-> one of the report's plots with its caption; nothing where it has none of that name."""
    data = report["plots"].get(name)
    return (f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{escape(data)}"><figcaption>{escape(caption)}</figcaption></figure>'
            if data else "")


def shade(token: str, value: float, kind: str, full: float) -> str:
    """-> a token, shaded in proportion to value / full; line breaks are made visible."""
    level = min(9, math.ceil(9 * value / full)) if full > 0 else 0
    text = escape(token.replace("\n", "↵"))
    return f'<i class={kind}{level} title="{value:.3g}">{text}</i>' if level > 0 else text


def tokens(pairs: list, form: str = "") -> str:
    """-> tokens in a row, spaces made visible, long ones cut, with their numbers where they are given a form."""
    return " ".join(f"<code>{escape(token.replace(chr(10), '↵').replace(' ', '·')[:20])}</code>" + (f" {show(value, form)}" if form else "")
                    for token, value in pairs)


# ----------------------------------------------------------------------------------------------------------------- sections

def answer_html(report: dict) -> str:
    """The question, the answer in three figures, the frontier, the runs side by side."""
    rlhf, causal = report["rlhf"], report["causal"]
    bias = ", and another, the bias b that adds its vector to every token (0: as it was)" if report["config"].get("edit") == "scale+bias" else ""
    gold = f"; {show(rlhf['gold_gain_std'], '+.2f')} by a reward model that training never saw" if "gold_gain_std" in rlhf else ""
    runs = []
    for run in report["runs"]:
        figures = run["figures"]
        pairs = [{"mean": figures.get(key), "se": figures.get(f"{key}_se")} for key in ("score_gain_std", "gold_gain_std", "kl")]
        names = [escape(run[key]) for key in ("name", "layers", "reward")]
        names[0] = f"<b>{names[0]}</b>" if run["name"] == report["name"] else names[0]
        runs.append([*names, escape(figures.get("n_changed", "–")), *(pm(pair, ".2f") for pair in pairs)])
    return (
        "<p>Which features of the language model did RLHF turn up or down, and is it they that raise the reward? Training learned one number "
        f"for each feature of a sparse autoencoder, the coefficient c that scales its output vector (1: as it was){bias}, and nothing else.</p>"
        f"<div class=figures><div><b>{pm({'mean': rlhf['score_gain_std'], 'se': rlhf['score_gain_std_se']}, '+.2f')}</b>gain in mean score on "
        f"held-out prompts, in standard deviations of the reference's scores{gold}</div>"
        f"<div><b>{show(rlhf['kl'], '.2f')} nats</b>KL divergence from the reference, a response</div>"
        f"<div><b>{show(causal['carriers'], 'd')} of {causal['moved']}</b>features that moved carry 90 % of the gain</div></div><div class=pair>"
        + image(report, "frontier", "Gain against KL of a quarter, half, three quarters and all of what runs with this reward learned.")
        + image(report, "share", "Gain when only the k strongest features are moved: fresh samples, ± SE.") + "</div>"
        + table(["run", "layers", "reward", "numbers moved", "gain", "gain by gold model", "KL, nats"], runs))


def samples_html(report: dict) -> str:
    """Prompts with the reference's and the policy's responses, side by side, each token shaded by its log-ratio."""
    def side(sample: dict, name: str) -> str:
        text = "".join(shade(token, abs(ratio) if abs(ratio) >= 0.1 else 0, "p" if ratio > 0 else "n", 2.0)
                       for token, ratio in sample[f"tokens_{name}"])
        return f"<div><span class=soft>{name}, score {show(sample[f'score_{name}'], '.2f')}</span><div class=text>{text}</div></div>"

    shown = "".join(f"<div class=sample id=s{n}><h3>{n}. {escape(sample['prompt'])} …</h3><div class=pair>{side(sample, 'before')}"
                    f"{side(sample, 'after')}</div></div>" for n, sample in enumerate(report["samples"], start=1))
    return ("<h2>Before and after</h2><p>The first sample of each of the first held-out prompts, not chosen; both drawn with the same random "
            "numbers. Shading: log(π/π<sub>ref</sub>) from 0.1 to 2 nats, of tokens that the policy <i class=p6>prefers more</i> or "
            f"<i class=n6>prefers less</i> than the reference does.</p>{shown}")


def causal_html(report: dict) -> str:
    """What the listed features do to the reward, one by one and together; predicted and measured effects."""
    causal, listed = report["causal"], [card for card in report["features"] if card["effect"]]
    gain = causal["kept"][-1]
    share = f", {100 * causal['together']['mean'] / gain['mean']:.0f} % of the gain of {pm(gain)}" if gain["mean"] else ""
    fresh = [[link(card), pm(card["effect"]["fresh"]), pm(card["effect"]["set_back"]), show(card["effect"]["predicted"])]
             for card in listed[:SECTIONS] if card["effect"]["fresh"]]
    return (
        f"<p>Effects on the mean score, in standard deviations of the reference's scores, ± standard error over held-out prompts. "
        f"<b>Set back</b>: what the policy loses when this feature alone goes back to its start, by importance weighting of {causal['samples']} of "
        "the policy's samples with a control variate for each token (not self-normalised). <b>Alone</b>: what the reference gains "
        "when this feature alone moves, by weighting of the reference's samples. <b>ESS</b>: the effective number of samples. <b>Predicted</b>: "
        "set back to first order, gradient × move. <b>Turned</b>: the sign of c − 1, and of b where there are biases.</p>"
        f"<p>Setting all {len(listed)} listed features back together loses {pm(causal['together'])}{share} ({causal['fresh_samples']} fresh "
        f"samples). Their single losses add up to {pm(causal['sum'])}; the rest, {pm(causal['interaction'])}, is interaction. Predicted and measured "
        f"effects correlate with "
        f"<b>r = {show(causal['r'], '.2f')}</b> on the same samples, and {show(causal['r_other_prompts'], '.2f')} where the two come from different "
        "prompts.</p><div class=pair>"
        + image(report, "effects", f"Measured against predicted effect of each listed feature, r = {show(causal['r'], '.2f')}; the line is y = x.")
        + image(report, "coefficients", "All coefficients in order.")
        + "</div><h3>The strongest, checked on fresh samples, by other random numbers</h3>"
        + table(["feature", "fresh", "set back", "predicted"], fresh))


def link(card: dict, section: bool = True) -> str:
    """-> a feature's name, layer and number, which leads to its section."""
    name = f"{card['layer']}.{card['feature']}"
    return f'<a href="#f{name}">{name}</a>' if section else name


def features_html(report: dict) -> str:
    """The table of features and a section for each of the first SECTIONS."""
    cards, causal, rows = report["features"], report["causal"], []
    biased = any(card["bias"] for card in cards)
    columns = ["feature", "turned", "c", *["b"] * biased, *(["set back ± SE", "ESS", "predicted", "alone ± SE", "ESS alone"] if causal else []),
               "fires, %", "fires on", "explained, r", "promotes"]
    for place, card in enumerate(cards):
        effect = card["effect"]
        turned = [f"{name} {'up' if move > 0 else 'down'}" for name, move in (("c", card["coef"] - 1), ("b", card["bias"])) if move]
        row = [(card["layer"] * 10 ** 7 + card["feature"], link(card, place < SECTIONS)), ", ".join(turned) or "–",
               (card["coef"], show(card["coef"], ".3f")), *[(card["bias"], show(card["bias"], ".3f"))] * biased]
        if causal:
            back, alone = ([(e["mean"], pm(e)), (e["ess"], show(e["ess"], ".0f"))] for e in (effect["set_back"], effect["alone"]))
            row += [*back, (effect["predicted"], show(effect["predicted"])), *alone]
        rows.append([*row, (card["firing_rate"], show(100 * card["firing_rate"], ".2f")), tokens(card["tokens"][:4]),
                     (card["explanation"], show(card["explanation"], ".2f")), tokens(card["promoted"][:4])])
    about = causal_html(report) if causal else "<p>No RLHF run yet: these are the features that the text at hand explains best, of those scored.</p>"
    more = f"<p class=soft>Sections follow for the first {SECTIONS} of {len(cards)}; all are in report.json.</p>" if len(cards) > SECTIONS else ""
    return (f"<h2>Features</h2>{about}<p class=search><label>Search <input id=search type=search></label> <span id=count class=soft role=status>"
            f"{len(cards)} of {len(cards)}</span></p>{table(columns, rows, 'listed')}{more}" + "".join(map(card_html, cards[:SECTIONS])))


def card_html(card: dict) -> str:
    """-> one feature's section; its contexts are shaded in proportion to its strongest activation on held-out text."""
    learned = f"c = {show(card['coef'], '.3f')}" + (f", b = {show(card['bias'])}" if card["bias"] else "")
    if card["effect"]:
        learned += f"; set back, the policy loses {pm(card['effect']['set_back'])}"
    contexts, label = "", None
    for context in card["contexts"] + card["fired"]:
        if context["label"] != label:                # once for all contexts of the same kind
            label = context["label"]
            sample = re.fullmatch(r"sample (\d+), \w+", label)
            contexts += f"<div class=soft>{f'<a href=#s{sample[1]}>{escape(label)}</a>' if sample else escape(label)}</div>"
        text = "".join(shade(token, value, "a", card["peak"]) for token, value in zip(context["tokens"], context["activations"]))
        contexts += f"<div class=text>{text}</div>"
    heights = [20 * math.log1p(n) / math.log1p(max(card["histogram"])) if n else 0 for n in card["histogram"]]
    bars = "".join(f'<rect x={i} y={20 - height:.2f} width=.9 height={height:.2f} />' for i, height in enumerate(heights) if height)
    name = link(card, section=False)
    return (f'<section class=card id="f{name}"><h3>Feature {name}</h3><p>{learned}. Active on {show(100 * card["firing_rate"], ".2f")} % of tokens; '
            f"explanation score {show(card['explanation'], '.2f')}.</p><div class=pair><div><p>Fires on {tokens(card['tokens'], '.0%')}</p>"
            f"<p>Promotes {tokens(card['promoted'], '+.2f')}</p><p>Suppresses {tokens(card['suppressed'], '+.2f')}</p></div>"
            f'<figure><svg viewBox="0 0 20 20" preserveAspectRatio=none role=img aria-label="histogram of activations">{bars}</svg><figcaption>'
            f"Tokens by activation, from 0 to {show(card['peak'], '.3g')}; log scale, {sum(card['histogram'])} in all</figcaption></figure></div>"
            f"{contexts or '<p>Silent on the text looked at.</p>'}</section>")


def sae_html(report: dict) -> str:
    """Each layer's SAE: its explanation scores beside controls', its features by firing rate, its figures."""
    decades = ("never", "up to 1e-5", "up to 1e-4", "up to 1e-3", "up to 1e-2", "up to 0.1", "more often")
    parts = ["<h2>Sparse autoencoder</h2><p>Explanation score: how well the token and the one before it predict an activation, on text that the "
             "prediction was not fitted to; r: Pearson correlation, F1: of active or not. Controls are made as sparse as the features.</p>"]
    for layer, about in report["saes"].items():
        scores = [[escape(name), f"{score['columns']}", *(pm(score[key], ".3f") for key in ("pearson", "f1"))]
                  for name, score in about["explanations"].items()]
        figures, F = dict(about["metrics"]), about["num_features"]
        density = [[name, f"{n}", f'<div class=bar style="width:{12 * n / F:.2f}rem"></div>'] for name, n in zip(decades, figures.pop("density", []))]
        parts += [f"<h3>Layer {escape(layer)}: {F} features</h3><div class=pair><div>", table(["mean of", "scored", "r", "F1"], scores),
                  table(["share of tokens it fires on", "features", ""], density), f"</div>{values(figures)}</div>",
                  f"<div class=wide>{image(report, f'SAE {layer}', f'Training of the SAE of layer {layer}.')}</div>"]
    return "".join(parts)


def run_html(report: dict) -> str:
    """The commands that make it all again, curves, figures, configuration, versions."""
    tables = {"Figures": report["rlhf"], "Configuration": report["config"], "Versions": report["versions"]}
    return ("<h2>Run</h2>" + "".join(f"<p><code>{escape(command)}</code></p>" for command in report["commands"])
            + f"<div class=wide>{image(report, 'RLHF', 'RLHF, iteration by iteration.')}</div><div class=pair>"
            + "".join(f"<div><h3>{title}</h3>{values(figures)}</div>" for title, figures in tables.items() if figures) + "</div>")
