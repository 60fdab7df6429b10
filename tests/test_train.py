"""The command line: the whole path on the embedded model, shortened, and misuse."""

import json
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils import backend_registration

import compare
import lm
import train
from conftest import complaint
from files import load_state, read_json, write_json
from pythia import Pythia, PythiaConfig, Tokenizer, read_safetensors, write_safetensors
from reward import load_reward
from run import Run

ROOT = Path(__file__).parent.parent
SHORT = ["--sae-text-tokens", "4000", "--sae-eval-tokens", "1024", "--sae-context", "32", "--sae-tokens", "12000", "--sae-batch-size", "256",
         "--sae-num-features", "128", "--sae-resample-rows", "256", "--rlhf-iterations", "3", "--rlhf-episodes", "16",
         "--rlhf-eval-size", "32", "--rlhf-eval-samples", "1", "--rlhf-response-tokens", "5", "--interpret-features", "8"]

LM = ["--lm-num-layers", "1", "--lm-hidden-size", "32", "--lm-num-heads", "2", "--lm-context", "16", "--lm-tokens", "2560"]


def run(*options: str, out: Path) -> int:
    return train.main([*SHORT, "--out", str(out), *options])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """One whole short run: sae, rlhf, interpret."""
    out = tmp_path_factory.mktemp("whole")
    assert run(out=out) == 0
    return out


def test_every_stage_writes_its_files(whole):
    for folder in ("sae", "rlhf-coef"):
        assert {"config.json", "metrics.json", "metrics.jsonl", "curves.png"} <= {p.name for p in (whole / folder).iterdir()}
    assert (whole / "report" / "report.json").exists()
    sae, rlhf = read_json(whole / "sae" / "metrics.json"), read_json(whole / "rlhf-coef" / "metrics.json")
    assert set("mse fvu l0 l1 dead_fraction shrinkage ce_base ce_sae ce_zero ce_mean ce_recovered tokens_per_second "
               "seconds".split()) <= set(sae)
    assert set("score_ref score_policy score_gain_std reward_loss kl entropy n_changed trainable_parameters seconds seconds_per_iteration "
               "peak_memory_gib gold_gain_std".split()) <= set(rlhf)
    assert rlhf["trainable_parameters"] == 128 and 0 < rlhf["n_changed"] <= 128 and rlhf["kl"] > 0
    lines = [json.loads(line) for line in (whole / "rlhf-coef" / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("step") for line in lines] == [0, 1, 2, *[None] * 4] and [line["share"] for line in lines[3:]] == [0.25, 0.5, 0.75, 1.0]
    assert lines[-1]["eval_kl"] == rlhf["kl"] > lines[-2]["eval_kl"]
    assert rlhf["seconds_per_iteration"] == np.median([line["seconds"] for line in lines[:3]])


def test_report_is_one_self_contained_page(whole):
    page = (whole / "report" / "index.html").read_text()
    report = read_json(whole / "report" / "report.json")
    coef_F = read_safetensors(whole / "rlhf-coef" / "policy.safetensors")["2.coef_F"]
    assert len(report["features"]) == 8
    for card in report["features"]:
        assert card["coef"] == pytest.approx(coef_F[card["feature"]].item()) != 1
        assert f"Feature 2.{card['feature']}" in page and f"{abs(card['coef']):.3f}" in page and card["effect"]["set_back"]["ess"] > 1
    assert len(report["samples"]) == 16 and report["samples"][0]["before"] != ""
    for sample in report["samples"]:
        assert sample["after"] == "".join(token for token, _ in sample["tokens_after"]) or "\ufffd" in sample["after"]       # a cut character
    assert report["causal"]["moved"] == read_json(whole / "rlhf-coef" / "metrics.json")["n_changed"]
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert set(report["plots"]) == {"coefficients", "frontier", "effects", "share", "RLHF", "SAE 2"}
    command = report["commands"][1].split()
    assert command[:4] == ["python", "train.py", "--stage", "rlhf"] and command[command.index("--rlhf-episodes") + 1] == "16"
    dtype = read_json(whole / "rlhf-coef" / "config.json")["dtype"].removeprefix("torch.")             # of the machine: bfloat16 on a GPU
    assert report["commands"][2] == f"python train.py --stage interpret --out {whole} --interpret-features 8 --dtype {dtype} --layer 2"
    assert "--rlhf-kl-target" not in command and "--corpus" not in command         # at their defaults


def test_interpret_of_an_sae_alone(whole, tmp_path):
    shutil.copytree(whole / "sae", tmp_path / "sae")
    assert run("--stage", "interpret", "--tag", "none", out=tmp_path) == 2 and not (tmp_path / "report-none").exists()
    assert run("--stage", "interpret", out=tmp_path) == 0
    report = read_json(tmp_path / "sae-report" / "report.json")
    assert report["rlhf"] is None and len(report["features"]) == 8 and {card["coef"] for card in report["features"]} == {1.0}
    scores = [card["explanation"] for card in report["features"]]
    assert scores == sorted(scores, reverse=True) and report["saes"]["2"]["explanations"]["SAE features"]["pearson"]["mean"] <= scores[0]
    assert "No RLHF run yet" in (tmp_path / "sae-report" / "index.html").read_text()


def test_a_run_that_moved_nothing_is_not_interpreted(whole, capsys):
    assert run("--stage", "rlhf", "--rlhf-lr", "1e-30", "--tag", "still", out=whole) == 0
    assert run("--stage", "interpret", "--tag", "still", out=whole) == 2 and "no coefficient moved" in capsys.readouterr().err


def test_resume_skips_finished_stages_and_refuses_another_run(whole, capsys):
    before = (whole / "rlhf-coef" / "policy.safetensors").read_bytes()
    assert run("--resume", out=whole) == 0
    assert (whole / "rlhf-coef" / "policy.safetensors").read_bytes() == before
    assert run(out=whole) == 2 and "--resume" in capsys.readouterr().err
    assert run("--resume", "--seed", "1", out=whole) == 2 and "seed" in capsys.readouterr().err
    assert run("--resume", "--gold", "", out=whole) == 2 and "gold" in capsys.readouterr().err


def test_coefficients_are_refused_on_another_sae(whole, tmp_path, capsys):
    for name in ("sae", "rlhf-coef"):
        shutil.copytree(whole / name, tmp_path / name)
    path = tmp_path / "sae" / "sae_weights.safetensors"
    weights = read_safetensors(path)
    write_safetensors(path, weights | {"b_dec": weights["b_dec"] + 1})
    assert run("--stage", "interpret", out=tmp_path) == 2 and "learned with another sae/sae_weights.safetensors" in capsys.readouterr().err
    assert run("--stage", "rlhf", "--resume", out=tmp_path) == 2 and "sae_weights" in capsys.readouterr().err


def test_a_report_is_refused_for_another_run(whole, tmp_path, capsys):
    for name in ("sae", "rlhf-coef", "report"):
        shutil.copytree(whole / name, tmp_path / name)
    assert run("--resume", out=tmp_path) == 0
    path = tmp_path / "rlhf-coef" / "policy.safetensors"
    write_safetensors(path, {name: p + 1 for name, p in read_safetensors(path).items()})
    assert run("--resume", out=tmp_path) == 2 and "policy.safetensors" in capsys.readouterr().err


def test_an_sae_with_other_options_is_not_taken_in_silence(whole, capsys):
    for stage in ("rlhf", "compare"):
        assert run("--stage", stage, "--compare-runs", "coef", "--tag", "other", "--sae-l0=5", "--sae-objective", "topk", out=whole) == 2
        assert "sae was made with another l0, objective" in capsys.readouterr().err and not (whole / "rlhf-coef-other").exists()


def test_a_word_list_that_changed_is_another_reward(whole, tmp_path, capsys):
    shutil.copytree(whole / "sae", tmp_path / "sae")
    words, options = tmp_path / "words.txt", [*few_prompts(tmp_path), "--reward", f"avoid:{tmp_path / 'words.txt'}"]
    words.write_text("the\na\n")
    assert run("--stage", "rlhf", *options, out=tmp_path) == 0
    words.write_text("the\n")
    assert run("--stage", "rlhf", *options, "--resume", out=tmp_path) == 2 and f"another sha256 of {words}" in capsys.readouterr().err
    assert run("--stage", "interpret", out=tmp_path) == 2 and f"learned with another {words} than" in capsys.readouterr().err


def test_a_path_with_a_colon_is_hashed_too(whole, tmp_path):
    path = tmp_path / "a:b.txt"
    path.write_text("bad\n")
    for options in (["--corpus", str(path), "--stage", "sae"], ["--reward", f"avoid:{path}", "--stage", "rlhf"]):
        args = train.resolve(train.parse([*options, "--out", str(whole)]))
        assert f"sha256 of {path}" in train.run_config(args, args.stage)


def test_a_report_of_another_layer_than_the_middle_one(whole, tmp_path):
    assert run(*few_prompts(tmp_path), "--stage", "rlhf", "--layer", "1", "--tag", "t", out=tmp_path) == 0
    assert run("--stage", "interpret", "--tag", "t", "--interpret-checks", "0", out=tmp_path) == 0
    config = read_json(tmp_path / "report-t" / "config.json")
    assert config["layers"] == "[1]" and "sha256 of sae-1/sae_weights.safetensors" in config
    assert "--layer 1" in read_json(tmp_path / "report-t" / "report.json")["commands"][2]
    assert run("--stage", "interpret", "--tag", "t", "--layer", "1", "--interpret-checks", "0", "--resume", out=tmp_path) == 0


def test_the_prompts_of_the_assets_are_found_from_everywhere_and_named_the_same(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()                      # a folder named as the embedded model, with no model in it
    assert run("--resume", out=whole) == 0 and read_json(whole / "rlhf-coef" / "config.json")["prompts"] == "assets/prompts.txt"
    assert len(train.read_prompts("assets/prompts-eval.txt")) > 100
    assert load_reward("avoid:assets/avoid.txt", Tokenizer.from_pretrained("tiny")).function(["An awful, awful film"]) == [-2]


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffThe film\nHer role\n")
    assert train.read_prompts(str(path)) == ["The film", "Her role"] and lm.read_texts(path) == ["The film\nHer role\n"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU adds up in any order")
def test_same_seed_same_result(whole, tmp_path):
    assert run("--stage", "rlhf", out=tmp_path) == 0                   # trains the SAE first
    for name in ("sae/sae_weights.safetensors", "rlhf-coef/policy.safetensors"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_full_policy_and_word_list(whole, tmp_path):
    shutil.copytree(whole / "sae", tmp_path / "sae")
    assert run("--resume", "--policy", "full", "--reward", f"avoid:{ROOT / 'assets' / 'avoid.txt'}", "--gold", "", out=tmp_path) == 0      # sae, rlhf
    figures = read_json(tmp_path / "rlhf-full" / "metrics.json")
    assert figures["trainable_parameters"] == sum(p.numel() for p in Pythia.from_pretrained("tiny").parameters())
    assert figures["score_ref"] <= 0 and "gold_gain_std" not in figures


def test_several_layers_each_with_its_own_sae(whole, capsys):
    assert run("--stage", "rlhf", "--layer", "1,2", "--edit", "scale+bias", "--tag", "two", "--rlhf-eval-size", "16", out=whole) == 0
    assert "sae-1 holds no finished SAE" in capsys.readouterr().out
    learned = read_safetensors(whole / "rlhf-coef-two" / "policy.safetensors")
    assert set(learned) == {"1.coef_F", "2.coef_F", "1.bias_F", "2.bias_F"} and all((p_F != ("coef" in name)).any() for name, p_F in learned.items())
    figures = read_json(whole / "rlhf-coef-two" / "metrics.json")
    assert 0 < figures["without_bias_kl"] < figures["kl"] and "without_bias_score_gain_std_se" in figures
    texts = [read_safetensors(whole / name / "text.safetensors") for name in ("sae", "sae-1")]
    assert texts[0]["train"].equal(texts[1]["train"])                  # one text for both
    assert run("--stage", "interpret", "--tag", "two", "--interpret-checks", "0", out=whole) == 0
    report = read_json(whole / "report-two" / "report.json")
    assert list(report["saes"]) == ["1", "2"] and {card["layer"] for card in report["features"]} <= {1, 2} and "layer 1, 2" in report["title"]
    assert {run["name"] for run in report["runs"]} >= {"coef", "coef-two"} and "--layer 1,2" in report["commands"][2]


def test_a_command_line_says_booleans_and_numbers_apart():
    config = {"layers": "[2]", "samples_per_prompt": 1, "gamma": 0.0, "lr": 1.0, "recompute": True, "gold": "", "model": "torch.x", "dtype": "torch.float16"}
    words = train.command_line(SimpleNamespace(out="runs/x", tag=""), "rlhf", config).split()
    pairs = dict(zip(words[4::2], words[5::2]))
    assert pairs == {"--out": "runs/x", "--rlhf-samples-per-prompt": "1", "--rlhf-gamma": "0.0", "--rlhf-lr": "1.0", "--rlhf-recompute": "yes",
                     "--gold": "''", "--model": "torch.x", "--dtype": "float16", "--layer": "2"}


def test_tables_keep_their_columns_where_a_run_lacks_a_figure(tmp_path):
    compare.write_tables(tmp_path / "t.md", [{"run": "a", "kl": 1.0}, {"run": "b", "gold": 2.0, "kl": 3.0}])
    assert (tmp_path / "t.md").read_text().splitlines() == ["| run | kl | gold |", "| --- | --- | --- |", "| a | 1 |  |", "| b | 3 | 2 |"]


def few_prompts(folder: Path) -> list[str]:
    """-> options for a quick evaluation."""
    (folder / "few.txt").write_text("The film was\nI saw this\nA story about\nHer best role\n")
    return ["--eval-prompts", str(folder / "few.txt"), "--gold", "", "--rlhf-iterations", "2"]


def within(cell: SimpleNamespace, stage: str, *options: str) -> None:
    """run_process without a process, for they take seconds to start."""
    assert train.main([*cell.argv, "--stage", stage, *options]) == 0


def test_who_stops_a_comparison_waits_for_its_run_to_save(tmp_path, monkeypatch):
    child = tmp_path / "child"
    child.write_text("#!/bin/sh\ntrap 'sleep 0.2; echo > saved; exit 143' TERM\necho > begun\nfor i in $(seq 200); do sleep 0.05; done\n")
    child.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.sys, "executable", str(child))

    def stop(*_):
        if not Path("begun").exists():
            return signal.alarm(1)
        raise KeyboardInterrupt
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(1)
    with pytest.raises(KeyboardInterrupt):
        train.run_process(SimpleNamespace(argv=[], out="out", tag=""), "rlhf")
    signal.signal(signal.SIGALRM, before)
    assert Path("saved").exists()


def test_compare_trains_what_is_missing_and_reads_off_gains(whole, capsys, monkeypatch):
    process, started = train.run_process, []
    monkeypatch.setattr(train, "run_process", lambda *cell: started.append(cell) or (process if len(started) == 1 else within)(*cell))
    options = [*few_prompts(whole), "--stage", "compare", "--compare-runs", "coef --rlhf-keep 9 --rlhf-keep-rollouts 1; steer --rlhf-lr 0.5", "--compare-seeds", "2",
               "--compare-kls", "0.001,50"]
    assert run(*options, out=whole) == 0
    table = capsys.readouterr().out
    assert "not reached" in table and "coef --rlhf-keep 9 --rlhf-keep-rollouts 1 minus" in table
    figures = read_json(whole / "compare" / "metrics.json")
    assert [row["run"].split()[0] for row in figures["runs"]] == ["coef", "steer"] and (whole / "compare" / "frontier.png").exists()
    runs = [read_json(whole / f"rlhf-steer-rlhf-lr-0-5-seed{seed}" / "metrics.json") for seed in (0, 1)]
    assert figures["runs"][1]["kl"] == pytest.approx((runs[0]["kl"] + runs[1]["kl"]) / 2) and runs[0]["kl"] != runs[1]["kl"]
    assert figures["runs"][0]["n_changed"] <= 9 and len(started) == 4
    steered = whole / "rlhf-steer-rlhf-lr-0-5-seed0" / "metrics.json"
    write_json(steered, runs[0] | {"kl": runs[0]["kl"] + 10})            # as if it had been trained again
    assert run(*options, "--resume", out=whole) == 0 and len(started) == 4
    assert read_json(whole / "compare" / "metrics.json")["runs"][1]["kl"] == pytest.approx(figures["runs"][1]["kl"] + 5)
    changed = [*options, "--resume", "--rlhf-samples-per-prompt", "1"]
    assert run(*changed, out=whole) == 2 and "another rlhf_samples_per_prompt" in capsys.readouterr().err
    shutil.rmtree(whole / "compare")
    assert run(*changed, out=whole) == 2 and "seed0 was begun with another samples_per_prompt" in capsys.readouterr().err


def test_compare_trains_the_missing_saes_alone(whole, tmp_path, monkeypatch):
    """Of the layer that is there, the SAE is another seed's."""
    shutil.copytree(whole / "sae", tmp_path / "sae")
    write_json(tmp_path / "sae" / "config.json", read_json(whole / "sae" / "config.json") | {"seed": "7"})
    monkeypatch.setattr(train, "run_process", within)
    assert run(*few_prompts(tmp_path), "--stage", "compare", "--layer", "1,2", "--compare-runs", "coef", "--compare-seeds", "1", out=tmp_path) == 0
    assert (tmp_path / "sae-1" / "metrics.json").exists()


def test_runs_that_would_share_a_folder_are_refused(tmp_path, capsys):
    assert run("--stage", "compare", "--compare-runs", "coef --rlhf-lr .2; coef --rlhf-lr 2", out=tmp_path) == 2
    assert "share a folder" in capsys.readouterr().err


def test_a_sweep_is_refused_before_its_first_cell(tmp_path, capsys):
    assert run("--stage", "sweep", "--sweep-objectives", "l1,topkk", out=tmp_path) == 2
    assert "topkk" in capsys.readouterr().err and not list(tmp_path.glob("sweep-*"))


def test_a_kl_that_many_draws_do_not_reach_is_not_reached():
    drawn = np.tile(np.linspace(0.0, 1.0, 201), (2, 1)).T
    drawn[:6, 0] = drawn[:5, 1] = np.nan                               # 6 and 5 of 201
    assert compare.intervals("at", (1.0, 2.0), np.array([0.5, 0.5]), drawn) == {"at 1": "not reached", "at 2": "0.50 [0.05, 0.98]"}


@pytest.mark.parametrize("policy", ["random", "random_rates"])
def test_random_dictionaries_of_several_layers_differ(whole, monkeypatch, policy):
    made, random_dictionary = [], train.sae.random_dictionary
    monkeypatch.setattr(train.sae, "random_dictionary", lambda *about, **how: made.append(random_dictionary(*about, **how)) or made[-1])
    assert run(*few_prompts(whole), "--stage", "rlhf", "--policy", policy, "--layer", "1,2", "--tag", "two", out=whole) == 0
    assert len(made) == 2 and not made[0].W_dec_FD.equal(made[1].W_dec_FD)
    assert [made[0].threshold_F is None, made[0].k > 0] == [policy == "random"] * 2


def test_a_gpu_is_made_the_current_one_and_without_bfloat16_given_float32(monkeypatch):
    current = []
    for able, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, able=able: able and not including_emulation)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch, "empty", lambda *shape, device: SimpleNamespace(device=torch.device(device.type, device.index or 0)))
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        args = SimpleNamespace(device="auto" if able else "cuda:1", dtype="auto")
        train.choose_device(args)
        assert args.device.type == "cuda" and args.dtype == dtype
    assert current == [torch.device("cuda", 0), torch.device("cuda", 1)]


def test_sweep_trains_each_cell_once(tmp_path, monkeypatch):
    sampled, sample_windows = [], lm.sample_windows
    monkeypatch.setattr(train, "run_process", within)
    monkeypatch.setattr(lm, "sample_windows", lambda *about: sampled.append(about) or sample_windows(*about))
    options = [*few_prompts(tmp_path), "--layer", "1", "--interpret-features", "2", "--interpret-checks", "0",
               "--stage", "sweep", "--sweep-objectives", "l1,topk", "--sweep-l0", "5", "--sweep-seeds", "1", "--sweep-kl", "0.001"]
    for name, content in (("metrics", {}), ("config", {"tokens": 1})):           # an SAE with other options beside it, which a sweep does not use
        write_json(tmp_path / "sae-1" / f"{name}.json", content)
    assert run(*options, out=tmp_path) == 0
    rows = read_json(tmp_path / "sweep" / "metrics.json")["cells"]
    assert [row["objective"] for row in rows] == ["l1", "topk"] and rows[1]["l0"] == pytest.approx(5, abs=0.5) and "gain at 0.001" in rows[0]
    texts = [read_safetensors(tmp_path / f"sweep-{name}-5-0" / "sae-1" / "text.safetensors")["train"] for name in ("l1", "topk")]
    assert texts[0].equal(texts[1]) and len(sampled) == 1
    assert rows[0]["gain"] == pytest.approx(float(rows[0]["gain at 0.001"].split()[0]), abs=0.005)
    report = tmp_path / "sweep-l1-5-0" / "report" / "metrics.json"          # so short a training gains nothing: as if it had
    write_json(report, read_json(report) | {"carriers": 7})
    stamps = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("sweep-*/*/metrics.json"))]
    (tmp_path / "sweep" / "metrics.json").unlink()
    assert run(*options, "--resume", out=tmp_path) == 0
    assert len(stamps) == 6 and stamps == [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("sweep-*/*/metrics.json"))]
    assert [row.get("carriers") for row in read_json(tmp_path / "sweep" / "metrics.json")["cells"]] == [7, None]
    monkeypatch.setattr(train, "gains_at_kls", lambda runs, kls: (np.array([0.5]), np.array([[np.nan], *[[0.5]] * 9])))      # many samples end before
    (tmp_path / "sweep" / "metrics.json").unlink()
    assert run(*options, "--resume", out=tmp_path) == 0
    assert all(row["gain"] is None and row["gain at 0.001"] == "not reached" for row in read_json(tmp_path / "sweep" / "metrics.json")["cells"])


def test_lm_and_reward_stages(tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"a {'good' if i % 2 else 'bad'} film, number {i}, that I saw", "label": i % 2}) + "\n"
                             for i in range(80)))
    corpora = ["--corpus", str(texts), "--eval-corpus", str(texts), "--out", str(tmp_path)]
    assert train.main(["--stage", "lm", *LM, "--lm-lr", "0.02", "--lm-warmup", "2", *corpora]) == 0
    lm, (model, tokenizer) = read_json(tmp_path / "lm" / "metrics.json"), (kind.from_pretrained(tmp_path / "lm" / "model") for kind in (Pythia, Tokenizer))
    assert lm["steps"] == 10 and lm["train_loss"] < 6                  # it learns: of 4,096 tokens, ln 4096 = 8.3 at the start
    stream = [token for row in texts.read_text().splitlines() for token in (*tokenizer.encode(json.loads(row)["text"]), tokenizer.end_of_text)]
    windows_BT = torch.tensor([[tokenizer.end_of_text, *stream[i:i + 15]] for i in range(0, len(stream) - 14, 15)])
    logp_BTV = torch.log_softmax(model.float()(windows_BT[:, :-1]), -1)
    assert lm["loss"] == pytest.approx(-logp_BTV.gather(-1, windows_BT[:, 1:, None]).mean().item(), rel=1e-4)
    assert train.main(["--stage", "reward", "--model", str(tmp_path / "lm" / "model"), "--reward-batch-size", "8", "--reward-max-tokens",
                       "16", "--reward-min-tokens", "8", *corpora]) == 0
    assert {"loss", "accuracy", "accuracy_32"} <= set(read_json(tmp_path / "reward" / "metrics.json"))


def test_preferences_in_the_hubs_format_to_a_report(tmp_path, whole):
    """Dialogues as in Anthropic's HH: a reward model learns from them, RLHF starts from their prompts, and the report shows them."""
    turns = [(f"\n\nHuman: Was film {i} good?\n\nAssistant:", " Yes, a great film, I loved it.", " No, it was terrible and boring.") for i in range(24)]
    prefs = tmp_path / "prefs.jsonl"
    prefs.write_text("".join(json.dumps({"chosen": prompt + good, "rejected": prompt + bad}) + "\n" for prompt, good, bad in turns))
    assert run("--stage", "reward", "--corpus", str(prefs), "--eval-corpus", str(prefs), "--reward-batch-size", "8", "--reward-epochs", "5",
               "--reward-max-tokens", "16", "--reward-min-tokens", "8", out=tmp_path) == 0       # long prompts lose their beginning, also held out
    assert read_json(tmp_path / "reward" / "metrics.json")["accuracy"] > 0.9
    shutil.copytree(whole / "sae", tmp_path / "sae")
    options = ["--reward", str(tmp_path / "reward" / "model"), "--gold", "", "--prompts", str(prefs), "--eval-prompts", str(prefs)]
    assert run("--stage", "rlhf", *options, out=tmp_path) == 0 and run("--stage", "interpret", *options, out=tmp_path) == 0
    assert "Human: Was film 3 good?" in (tmp_path / "report" / "index.html").read_text()


pretends = pytest.mark.skipif(not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="this PyTorch cannot pretend a device")


@pretends
@pytest.mark.parametrize("options", [["--layer", "1,2", "--edit", "scale+bias", "--rlhf-keep", "8", "--rlhf-keep-rollouts", "1"],
                                     ["--stage", "rlhf", "--policy", "lora"]])
def test_no_tensor_is_made_on_the_wrong_device(options, tmp_path):
    """The whole path on a pretended GPU; pretend_gpu.py changes PyTorch, so it has a process of its own."""
    small = [*SHORT, "--sae-tokens", "3000", "--gold", "", "--rlhf-iterations", "2", "--rlhf-eval-size", "4",
             "--rlhf-response-tokens", "4", "--interpret-features", "2", "--interpret-checks", "1", "--dtype", "float32"]
    done = subprocess.run([sys.executable, ROOT / "tests" / "pretend_gpu.py", *small, *options, "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pretends
def test_a_pretended_gpu_refuses_other_tensors():
    code = """
import torch, pretend_gpu
with pretend_gpu.PretendGPU():
    a, b = torch.ones(3, device="pretend:0"), torch.ones(3)
    assert (a + b.to(a.device)).cpu().tolist() == [2, 2, 2] and (a * b[0]).device.type == "pretend" and a[b.long()].device == a.device
    for mixed in (lambda: a + b, lambda: b[a.long()], lambda: torch.stack([a, b]), lambda: a.index_put_((a.long(),), b), lambda: b[0].add_(a[0])):
        try:
            mixed()
        except RuntimeError as error:
            assert "one device" in str(error)
        else:
            raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "tests")


@pretends
def test_memory_is_counted_as_tensors_come_and_go():
    code = """
import torch, memory, pretend_gpu
memory.count()
with memory.PretendGPU():
    a = torch.empty(1000, 1000, device="pretend:0", requires_grad=True)
    assert memory.COUNTER.now == 4_000_256                               # in blocks of 512 bytes
    b = (a @ a).tanh()[0]                                                # a view keeps all of the tanh; autograd needs no product
    assert (memory.COUNTER.now, memory.COUNTER.peak) == (2 * 4_000_256, 3 * 4_000_256)
    b.sum().backward()
    del b
    assert memory.COUNTER.now == 2 * 4_000_256 and a.grad.shape == a.shape
pretend_gpu.leave(0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "tests")


def broken_model(tmp_path: Path, **changes) -> Path:
    """A copy of the embedded model's folder with some files replaced by other bytes (None: removed)."""
    folder = tmp_path / "broken"
    shutil.copytree(ROOT / "assets" / "tiny", folder)
    for name, change in changes.items():
        path = folder / name.replace("_", ".")
        path.write_bytes(change(path.read_bytes())) if change else path.unlink()
    return folder


@pytest.mark.parametrize("options, told", [
    (["--stage", "sea"], "invalid choice: 'sea'"),
    (["--model", "no-such-model"], "'no-such-model' not found"),
    (["--model", "pythia-70b"], "HF_HUB_OFFLINE"),
    (["--polcy", "full"], "--policy"),
    (["--layer", "4"], "layers 0 to 3"),
    (["--layer", "-1"], "layers 0 to 3"),
    (["--layer", "1,x"], "--layer 1,x"),
    (["--sae-objective", "l0"], "choose from l1"),
    (["--sae-l0", "many"], "--sae-l0"),
    (["--reward", "no-such-model"], "not found"),
    (["--gold", "no-such-model"], "not found"),
    (["--reward", "tiny", "--policy", "full"], "head.weight"),           # which needs no SAE
    (["--reward", "avoid:no-such-file"], "no-such-file"),
    (["--reward", ""], "--reward is needed"),
    (["--reward", f"prefer:{ROOT / 'assets' / 'avoid.txt'}"], "'prefer' is no kind of function of texts; there is avoid"),
    (["--corpus", "caf\udce9.txt", "--stage", "sae"], "caf"),
    (["--prompts", "no-such-file"], "no-such-file"),
    (["--device", "abacus"], "--device abacus"),
    (["--stage", "lm"], "--corpus"),
    (["--stage", "interpret"], "--stage sae"),
    (["--corpus", "no-such-file.txt", "--stage", "sae"], "no-such-file.txt"),
    (["--stage", "lm", "--corpus", str(ROOT / "assets" / "prompts.txt"), "--eval-corpus", "no-such-file.txt"], "no-such-file.txt: no such file"),
    (["--stage", "compare", "--compare-runs", "coef --tag it's"], "--compare-runs"),
    (["--stage", "compare", "--compare-runs", "steer; coef --reward avoid:no-such-file"], "no-such-file"),
    (["--stage", "sweep", "--reward", "avoid:no-such-file"], "no-such-file"),
    (["--rlhf-episodes", "10", "--rlhf-minibatches", "4"], "--rlhf-episodes"),
    (["--rlhf-eval-size", "1", "--policy", "full"], "--eval-prompts"),
    (["--rlhf-lr", "nan"], "--rlhf-lr"),
    (["--rlhf-clip", "-1"], "--rlhf-clip must be positive"),
    (["--rlhf-keep", "-5"], "--rlhf-keep"),
    (["--policy", "steer", "--edit", "scale+bias"], "--edit scale+bias is for"),
    (["--policy", "full", "--rlhf-keep", "5"], "--rlhf-keep is for"),
    (["--seed", "18446744073709551616"], "--seed"),
    (["--lm-warmup", "0"], "--lm-warmup must be positive"),
    (["--lm-context", "1"], "--lm-context"),
    (["--compare-runs", ";"], "--compare-runs"),
    (["--compare-runs", "coef --rlhf-lr '0.1; full'"], "--compare-runs"),
    (["--sweep-objectives", ","], "--sweep-objectives"),
    (["--stage", "compare", "--compare-runs", "full; lora --rlhf-lora-targets qkv"], "--rlhf-lora-targets qkv"),
    (["--compare-kls", "0"], "--compare-kls"),
    (["--sweep-seeds", "0"], "--sweep-seeds"),
    (["--reward-weight-decay", "-1"], "--reward-weight-decay"),
    (["--stage", "reward", "--reward-max-tokens", "257"], "has only 256 positions"),
    (["--interpret-width", "-1"], "--interpret-contexts"),
    (["--stage", "sweep", "--layer", "1,2"], "give one --layer"),
])
def test_misuse_is_one_clear_line(options, told, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(*options, out=tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and told in error
    assert not [*(tmp_path / "out").glob("rlhf-*"), *(tmp_path / "out").glob("sweep-*")]
    if options[0] in ("--reward", "--prompts") and options[1] != "tiny":
        assert not (tmp_path / "out" / "sae").exists()           # told before the SAE is trained


@pytest.mark.parametrize("changes, told", [
    ({"model_safetensors": None}, "has neither model.safetensors"),
    ({"model_safetensors": lambda data: data[:-1000]}, "truncated"),
    ({"config_json": lambda data: data.replace(b'"hidden_size": 256', b'"hidden_size": 128')}, "shape"),
    ({"config_json": lambda data: b"{"}, "JSON"),
    ({"tokenizer_json": None}, "has no tokenizer.json"),
])
def test_broken_checkpoints_are_named(changes, told, tmp_path, capsys):
    assert run("--model", str(broken_model(tmp_path, **changes)), out=tmp_path / "out") == 2
    error = capsys.readouterr().err.strip()
    assert told in error and "broken" in error and "\n" not in error


def test_empty_corpus(tmp_path, capsys):
    for name, content in (("empty.txt", " \n"), ("empty.jsonl", "")):
        (tmp_path / name).write_text(content)
        assert run("--stage", "sae", "--corpus", str(tmp_path / name), out=tmp_path / "out") == 2
        assert "empty corpus" in capsys.readouterr().err
        assert not (tmp_path / "out" / "sae").exists()                 # nothing half-written: the mended command can be given again


# ------------------------------------------------------------------------------------------------- killed, stopped, gone wrong

def test_a_second_process_is_refused_while_the_first_lives(tmp_path, capsys):
    first = Run(tmp_path / "sae", {}, resume=False)
    assert run("--stage", "sae", "--resume", out=tmp_path) == 2 and "another process" in capsys.readouterr().err
    first.lock.close()                                                 # as the kernel does when a process ends: the file stays
    Run(tmp_path / "sae", {}, resume=True)


def test_the_log_goes_back_to_the_saved_state(tmp_path):
    run, log = Run(tmp_path, {}, resume=False), tmp_path / "metrics.jsonl"
    generator = torch.Generator().manual_seed(0)
    run.log(step=0, loss=1.5)
    assert run.restore(generator=generator) == 0 and not log.exists()  # killed before the first state: the line will come again
    for step in range(3):
        run.log(step=step, loss=0.5)
        run.checkpoint(step + 1, -1 if step < 2 else 1e9, generator=generator)
    saved = generator.get_state()
    torch.rand(3, generator=generator)
    log.write_text(log.read_text() + '{"step": 3, "lo')                # torn
    assert run.restore(generator=generator) == 2 and [row["step"] for row in run.rows()] == [0, 1]
    assert torch.equal(generator.get_state(), saved)
    (tmp_path / "other" / "metrics.jsonl").mkdir(parents=True)         # no line can be written there
    assert "metrics.jsonl: cannot be written" in complaint(Run(tmp_path / "other", {}, resume=False).log, step=0)
    log.unlink()                                                       # lost, as where the machine went
    assert run.restore(generator=generator) == 2 and [row["step"] for row in run.rows()] == [0, 1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_a_state_at_the_end_of_the_step(tmp_path, number):
    before = signal.getsignal(number)
    with Run(tmp_path, {}, resume=False) as run:
        with pytest.raises(KeyboardInterrupt) as stopped:              # nothing to save yet
            signal.raise_signal(number)
        assert stopped.value.args == (number,)
        run.restore()
        signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt) as stopped:
            run.checkpoint(1, 1e9)
        assert stopped.value.args == (number,) and run.restore() == 1
        run.stopped = 0
        signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):                         # asked twice
            signal.raise_signal(number)
    assert signal.getsignal(number) == before and signal.alarm(0) == 0


def test_text_found_leaves_the_random_numbers_of_text_made(whole, tmp_path):
    """A run that is killed behind the sampling of text, before its first state."""
    (tmp_path / "sae").mkdir()
    for name in ("config.json", "text.safetensors"):
        shutil.copy(whole / "sae" / name, tmp_path / "sae")
    assert run("--stage", "sae", "--resume", out=tmp_path) == 0
    assert (tmp_path / "sae" / "sae_weights.safetensors").read_bytes() == (whole / "sae" / "sae_weights.safetensors").read_bytes()


def test_a_corpus_that_changed_is_another_and_so_is_another_folder(tmp_path):
    short = ["--stage", "sae", "--corpus", str(tmp_path / "c.txt"), "--sae-tokens", "512"]
    for word, out in (("good", "a"), ("bad", "b")):
        (tmp_path / "c.txt").write_text(f"a {word} film " * 2000)
        assert run(*short, out=tmp_path / out) == 0
    texts = [read_safetensors(tmp_path / out / "sae" / "text.safetensors")["train"] for out in "ab"]
    assert not texts[0].equal(texts[1])
    assert run(*short, "--layer", "1", out=tmp_path / "a") == 0          # beside the old text
    assert read_safetensors(tmp_path / "a" / "sae-1" / "text.safetensors")["train"].equal(texts[1])
    assert run(*short, "--layer", "1", out=tmp_path / "b") == 0
    assert run(*short, "--resume", "--sae-checkpoint-seconds", "9", out=tmp_path / "b") == 0           # changes no result
    assert run(*short, "--resume", out=tmp_path / "a") == 2


def test_an_sae_that_is_loaded_needs_no_text_to_train_on(whole, tmp_path):
    assert run("--stage", "sae", "--sae-load", str(whole / "sae"), out=tmp_path) == 0
    text = read_safetensors(tmp_path / "sae" / "text.safetensors")
    assert len(text["train"]) == 0 and len(text["heldout"]) == 32


def test_a_stage_killed_in_its_evaluation_ends_as_it_would_have(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("a good film " * 200)
    options = ["--stage", "lm", *LM, "--corpus", str(tmp_path / "text.txt"), "--eval-corpus", str(tmp_path / "text.txt"), "--lm-checkpoint-seconds", "-1",
               "--resume", "--out"]
    assert train.main([*options, str(tmp_path / "a")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(lm, "evaluate_lm", lambda *_: signal.raise_signal(signal.SIGTERM) or signal.raise_signal(signal.SIGTERM))
        assert train.main([*options, str(tmp_path / "b")]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err.strip().endswith("stopped; --resume goes on from the last saved state")
    assert train.main([*options, str(tmp_path / "b")]) == 0
    a, b = (read_json(tmp_path / out / "lm" / "metrics.json") for out in "ab")
    assert a["train_loss"] == b["train_loss"] and not (tmp_path / "b" / "lm" / "state.pt").exists()


@pytest.mark.parametrize("poison, named", [(float("nan"), "lm, step 3: loss"), (float("inf"), "lm, step 3: loss"), (None, "lm, step 3: gradient")])
def test_nan_is_named_and_the_last_good_state_kept(tmp_path, monkeypatch, capsys, poison, named):
    (tmp_path / "text.txt").write_text("a good film " * 200)
    calls, honest = iter(range(100)), lm.next_token_loss

    def loss(model, tokens_BT):
        value = honest(model, tokens_BT)
        if next(calls) != 6:                         # two a step
            return value
        return value + (0 * model.embed_out.weight.sum()).sqrt() if poison is None else value * poison         # √0: no finite slope
    monkeypatch.setattr(lm, "next_token_loss", loss)
    assert train.main(["--stage", "lm", *LM, "--corpus", str(tmp_path / "text.txt"), "--lm-checkpoint-seconds", "-1", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {named} is NaN or infinite; the step was not applied")
    state = load_state(tmp_path / "lm" / "state.pt")
    assert state["step"] == 3 and all(value.isfinite().all() for value in state["model"].values())


def test_out_of_gpu_memory_names_the_options(tmp_path, monkeypatch, capsys):
    def stage(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")
    monkeypatch.setitem(train.STAGES, "rlhf", (stage, train.STAGES["rlhf"][1]))
    assert run("--stage", "rlhf", "--policy", "full", out=tmp_path) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: out of GPU memory (CUDA") and "--rlhf-micro-batch" in error and "\n" not in error
    assert not (tmp_path / "rlhf-full").exists()                       # the mended command can be given again


def test_corpora_that_are_too_short_or_no_text(tmp_path, capsys):
    for name, content, told in (("one.txt", b"a", "one window of 31 is the least"), ("latin.txt", b"caf\xe9", "UTF-8"),
                                ("latin.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "line 2"), ("torn.jsonl.gz", b"\x1f\x8b\x08" + bytes(40), "torn.jsonl.gz"),
                                ("number.jsonl", b'{"text": 1}', '"text" string')):
        (tmp_path / name).write_bytes(content)
        assert run("--stage", "sae", "--corpus", str(tmp_path / name), out=tmp_path / "out") == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and told in error and "\n" not in error, error
    (tmp_path / "prompts").write_text("a good film " * 300)
    assert run("--stage", "rlhf", "--policy", "full", "--prompts", str(tmp_path / "prompts"), out=tmp_path / "out") == 2
    assert "shorten them" in capsys.readouterr().err


def test_sae_of_another_model_layer_or_width(whole, tmp_path, capsys):
    assert run("--stage", "sae", "--layer", "1", "--sae-load", str(whole / "sae"), out=tmp_path / "out") == 2
    assert "this SAE was made for" in capsys.readouterr().err
    assert run("--stage", "rlhf", "--tag", "other", "--model", str(shutil.copytree(ROOT / "assets" / "tiny", tmp_path / "other")), out=whole) == 2
    assert "this SAE was made for" in capsys.readouterr().err
    other = shutil.copytree(ROOT / "assets" / "tiny", tmp_path / "elsewhere" / "other")          # another model of the same name
    shutil.copytree(whole / "sae", tmp_path / "named" / "sae")
    write_json(tmp_path / "named" / "sae" / "config.json", read_json(whole / "sae" / "config.json") | {"model": str(tmp_path / "other")})
    assert run("--stage", "rlhf", "--model", str(other), out=tmp_path / "named") == 2
    assert f"this SAE was made for model {tmp_path / 'other'}" in capsys.readouterr().err
    narrow = Pythia(PythiaConfig(4096, 64, 4, 2, 128)).initialize(torch.Generator().manual_seed(0))
    narrow.save_pretrained(tmp_path / "tiny")
    Tokenizer.from_pretrained("tiny").save_pretrained(tmp_path / "tiny")
    assert run("--stage", "rlhf", "--tag", "narrow", "--model", str(tmp_path / "tiny"), out=whole) == 2
    assert "width" in capsys.readouterr().err


def test_readme_links_point_at_what_they_name():
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", (ROOT / "README.md").read_text())
    assert len(links) > 15
    for name, file, line in links:
        text = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"(def|class) {name}\b|{name} =|    def {name}\b", text), f"{file}#L{line} is {text!r}, not {name}"


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "features active a token to aim at (topk, batchtopk: k); 0: leave l1_coef as it is (default: 31.0)" in told
    assert "share of each" not in told and "--rlhf-lam RLHF_LAM λ of GAE" in told and "falls to 0 over the last 30 % (April 2024: 20 %) (default: 0.002)" in told


def test_each_file_imports_only_from_further_down_the_readme_s_list():
    listed = re.search(r"Each imports only from files further down in this order: (.*)\.", (ROOT / "README.md").read_text())[1].split(", ")
    assert sorted(listed) == sorted(path.stem for path in ROOT.glob("*.py"))
    for place, name in enumerate(listed):
        imported = set(re.findall(r"^\s*(?:from|import) (\w+)", (ROOT / f"{name}.py").read_text(), re.MULTILINE)) & set(listed)
        assert imported <= set(listed[place + 1:]), f"{name}.py imports {imported}"


def test_the_readme_s_example_as_a_library_runs_as_written(capsys):
    example = (ROOT / "README.md").read_text().split("**As a library**")[1].split("\n\n")[1]
    names: dict = {}
    exec(textwrap.dedent(example), names)
    assert names["mlp_BTD"].shape == (*names["tokens_BT"].shape, 256)
    ablated_BTV = names["logits_BTV"]
    assert ablated_BTV.shape == (*names["tokens_BT"].shape, 4096) and not torch.equal(ablated_BTV, names["model"](names["tokens_BT"]))
    assert "This film is" in capsys.readouterr().out
