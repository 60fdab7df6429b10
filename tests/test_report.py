"""report.py: the page is made of report.json alone, holds its numbers, and lets nothing in a text out."""

import base64
import copy
import hashlib
import html.parser
import json
import re

import pytest

import interpret
import report as page_of
from report import render_report

HOSTILE = ('</script><script>alert(1)</script><img src=x onerror=alert(2)>"\' onmouseover="alert(3) &lt;\x00\x1b[31m\x85\u202eevil\ud800\uffff\r\n'
           "</style>--><!--")
PAIR = {"mean": 0.123, "se": 0.045}


def feature(i: int, text: str = " good", **changes) -> dict:
    context = {"tokens": ["a", text, "b"], "activations": [0.0, 2.0, 0.5], "label": "strongest"}
    return {"layer": 2, "feature": i, "coef": 1.5, "bias": 0.0, "firing_rate": 0.0123, "peak": 2.0, "histogram": [3, 0, 1], "tokens": [[text, 0.7]],
            "explanation": 0.6, "promoted": [[text, 1.25]], "suppressed": [[text, -1.5]], "contexts": [context],
            "fired": [context | {"label": "sample 1, after"}], "effect": {"set_back": PAIR | {"ess": 99.0}, "alone": PAIR | {"ess": 77.0},
                                                                         "predicted": 0.111, "fresh": PAIR}} | changes


def example(text: str = " good", features: int = 3) -> dict:
    """A report with `text` wherever a text goes."""
    metrics = {"fvu": 0.12345, "density": [1, 2, 3, 4, 5, 6, 7], text: text}
    return {"title": text, "name": text, "commands": [text], "config": {text: text, "lr": 0.25}, "versions": {"torch": text},
            "rlhf": {"score_gain_std": 0.6517, "score_gain_std_se": 0.041, "kl": 3.95, "n_changed": 64, "gold_gain_std": 0.59, text: text},
            "runs": [{"name": text, "layers": "[2]", "reward": text, "figures": {"score_gain_std": 1.45, "kl": 2.96}, "frontier": [[1.0, 0.5]]}],
            "causal": {"samples": 256, "fresh_samples": 512, "moved": 64, "carriers": 41, "r": 0.97, "r_other_prompts": 0.81, "together": PAIR,
                       "sum": PAIR, "interaction": PAIR, "kept": [{"k": 1, **PAIR}, {"k": 64, "mean": 0.65, "se": 0.04}]},
            "samples": [{"prompt": text, "before": text, "after": text, "score_before": 0.1, "score_after": -0.2, "tokens_before": [[text, -0.4]],
                         "tokens_after": [[text, 1.9], ["x", 0.0]]}],
            "saes": {"2": {"num_features": 28, "metrics": metrics, "explanations": {
                text: {"columns": 4, "pearson": PAIR, "f1": {"mean": None, "se": None}}}}},
            "features": [feature(i, text) for i in range(features)], "plots": {"frontier": "aGk="}}


class Reader(html.parser.HTMLParser):
    """Collects what a browser would act on, and the text that it would show."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self.texts = [], []
        self.feed(page)
        self.text = "".join(self.texts)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_says_what_the_report_says(tmp_path):
    path = interpret.write_report(tmp_path, example())
    page = path.read_text()
    assert page == render_report(json.loads((tmp_path / "report.json").read_text()))
    for number in ("+0.65 ± 0.04", "3.95 nats", "41 of 64", "+0.59", "r = 0.97", "0.81", "1.500", "1.23", "0.60", "+0.123 ± 0.045", "+0.111", "99",
                   "77", "19 % of the gain of +0.650 ± 0.040", "1.45 ± –", "0.1235", "512 fresh", "256 of", "0.25"):
        assert number in Reader(page).text, number
    other = example()
    other["features"][1]["effect"]["set_back"]["mean"] = -0.777
    assert "−0.777 ± 0.045" in Reader(render_report(other)).text and "0.777" not in page
    other["config"]["edit"] = "scale+bias"           # also where none of the listed features has one
    assert "the bias b" in Reader(render_report(other)).text and "the bias b" not in page
    moved = example()
    for card, coef, bias in zip(moved["features"], (1.5, -0.5, 1.0), (0.0, 2.0, -2.0)):
        card.update(coef=coef, bias=bias)
    cells = re.findall('href="#f[^>]*>[^<]*</a><td>([^<]*)', render_report(moved).partition("id=listed")[2])
    assert cells == ["c up", "c down, b up", "b down"]


def test_hostile_texts_stay_texts():
    page = render_report(example(HOSTILE))
    page.encode()                                    # half a surrogate pair could not be written
    found = Reader(page)
    allowed = {tag for tag, _ in Reader(render_report(example())).found}
    assert {tag for tag, _ in found.found} == allowed and sum(tag == "script" for tag, _ in found.found) == 1
    assert not any(name.startswith("on") for _, attributes in found.found for name in attributes)
    assert all(value.startswith(("#", "data:")) for _, attributes in found.found for name, value in attributes.items() if name in ("src", "href"))
    assert len(found.found) == len(Reader(render_report(example())).found)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", page) and "alert(1)" in found.text


def test_nothing_but_our_script_may_run():
    page = render_report(example())
    script = re.search("<script>(.*?)</script>", page, re.S)[1]
    policy = next(attributes["content"] for tag, attributes in Reader(page).found if tag == "meta" and "http-equiv" in attributes)
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy and policy.startswith("default-src 'none'")
    assert not re.search(r"https?:|url\(|@import|eval|\.src\b", page)


def test_ten_thousand_features():
    page = render_report(example(features=10_000))
    ids = re.findall(' id="?([^">]+)', page)
    assert page.count('class=card') == page_of.SECTIONS == sum(name.startswith("f2.") for name in ids) and "2.9999" in page and len(page) < 20e6
    assert len(ids) == len(set(ids))
    links = set(re.findall('href="?#([^">]+)', page))
    assert links <= set(ids) and "s1" in links, links - set(ids)


@pytest.mark.parametrize("change", [
    lambda r: r["causal"].update(carriers=None, r=None, r_other_prompts=None, interaction={"mean": None, "se": None}),
    lambda r: r["features"][0].update(explanation=None, histogram=[], contexts=[], fired=[], tokens=[], peak=0.0),
    lambda r: r["causal"]["kept"][-1].update(mean=0.0, se=None),
    lambda r: r.update(rlhf=None, causal=None, samples=[], runs=[], plots={}),
    lambda r: r.update(features=[], samples=[]),
    lambda r: r["features"][0].update(bias=-0.25)])
def test_what_is_missing_is_left_out_or_a_dash(change):
    changed = copy.deepcopy(example())
    change(changed)
    page = render_report(changed)
    assert "None" not in page and "nan" not in Reader(page).text.split() and page.endswith("</html>")
    assert ("<button>b<" in page) == any(card["bias"] for card in changed["features"]) and ("Before and after" in page) == bool(changed["rlhf"])


def test_finished_runs_are_found_with_their_frontiers(tmp_path):
    for name, done in (("coef", True), ("full-x", True), ("steer", False)):
        (tmp_path / f"rlhf-{name}").mkdir()
        (tmp_path / f"rlhf-{name}" / "config.json").write_text(json.dumps({"reward": "r", "layers": "[2]"}))
        (tmp_path / f"rlhf-{name}" / "metrics.jsonl").write_text(
            '{"step": 0}\n{"step": 1, "eval_kls": [0.5, 1.5], "eval_gains": [0.5, 0.5]}\n{"step": 2, "eval_kls": [1, 3], "eval_gains": [0.5, 1]}\n')
        if done:
            (tmp_path / f"rlhf-{name}" / "metrics.json").write_text(json.dumps({"kl": 2.0, "score_gain_std": 0.75}))
    runs = interpret.finished_runs(tmp_path)
    assert [run["name"] for run in runs] == ["coef", "full-x"] and runs[0]["frontier"] == [(1.0, 0.5), (2.0, 0.75)] and runs[0]["reward"] == "r"
