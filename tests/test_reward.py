"""reward.py: pooling, the loss, files of preference pairs, training on a planted rule, functions of text as reward."""

import copy
import gzip
import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import Characters, complaint, killed_and_resumed, random_model, random_tokens
from files import read_json, write_json
from pythia import Pythia, Tokenizer, pad, read_safetensors, write_safetensors
from reward import (Preference, RewardConfig, RewardModel, TextReward, ThroughText, avoid_words, cut_randomly,
                    encode_pairs, evaluate_reward, keep_end, load_preferences, load_reward, oasst_dialogue,
                    pairs_from_labels, prefix_scores, preference_loss, train_reward, window)
from run import Run

CPU, GOLDEN, TINY = torch.device("cpu"), Path(__file__).parent / "golden", Tokenizer.from_pretrained("tiny")
BEGINNING = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: and?\n\nAssistant:"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_reward(**changes) -> RewardModel:
    return RewardModel.from_backbone(random_model(**changes), seeded()).requires_grad_(False)


def write_rows(path, rows) -> str:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def planted_pairs(number: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Pairs of ids of different length; only the chosen ones hold a 7, one."""
    generator, pairs = np.random.default_rng(seed), []
    for _ in range(number):
        chosen, rejected = ([0, *generator.integers(8, 64, generator.integers(5, 15)).tolist(), 0] for _ in range(2))
        chosen[generator.integers(1, len(chosen) - 1)] = 7
        pairs.append((chosen, rejected))
    return pairs


# ------------------------------------------------------------------------------------------------------------ reward model

def test_score_reads_the_last_real_token_whatever_the_padding():
    model, rows = random_reward(), [random_tokens(length, seed=length).tolist() + [0] for length in (4, 9, 1, 7)]
    want = torch.stack([model.head(model.hidden(torch.tensor([row]))[0, -1])[0] for row in rows])
    assert want.std() > 0.1
    for padding_id in (0, 1, 63):                                # 0 is end-of-text, which ends every row, too
        left, (tokens_BT, mask_BT) = pad(rows, padding_id, "left"), pad(rows)
        right = torch.where(mask_BT == 1, tokens_BT, padding_id), mask_BT
        assert right[0][0].tolist() == rows[0] + [padding_id] * 5
        for tokens_BT, mask_BT in (left, right):
            for mask in (mask_BT, mask_BT.bool()):
                scores_B = model.score(tokens_BT, mask)
                torch.testing.assert_close(scores_B, want, atol=1e-5, rtol=0)
                assert torch.equal(model(tokens_BT, mask), scores_B)


def test_scores_stay_float32_in_mixed_precision():
    """The training loop promises so: scores of bfloat16's 8 bits would tie, and round the difference that is the loss."""
    with torch.autocast("cpu", torch.bfloat16):
        scores_B = random_reward().score(random_tokens(8, 6), torch.ones(8, 6))
    assert scores_B.dtype == torch.float32 and not torch.equal(scores_B, scores_B.bfloat16().float())


def test_prefixes_are_the_scores_of_the_truncated_texts():
    model, (tokens_BT, mask_BT) = random_reward(), pad([random_tokens(n, seed=n).tolist() for n in (13, 8, 9, 12)], side="left")
    mask_BT[1:, -2:] = mask_BT[2, -4:] = 0                       # these responses ended before
    scores_BR, R, T = model.prefixes(tokens_BT, mask_BT, 6), 6, 13
    want_BR = torch.stack([model.score(tokens_BT[:, :t], mask_BT[:, :t]) for t in range(T - R, T + 1)], dim=1)
    alone = [[model.score(tokens_BT[b:b + 1, T - n:t], mask_BT[b:b + 1, T - n:t]).item() for t in range(T - R, T + 1)]
             for b, n in enumerate((13, 8, 9, 12))]
    counts = torch.arange(R + 1) <= mask_BT[:, -R:].sum(1, keepdim=True)           # beginnings that do not outlast the response
    torch.testing.assert_close(scores_BR.gather(1, mask_BT[:, -R:].sum(1, keepdim=True))[:, 0], model.score(tokens_BT, mask_BT))
    torch.testing.assert_close(scores_BR[counts], want_BR[counts], atol=1e-5, rtol=0)
    torch.testing.assert_close(scores_BR[counts], torch.tensor(alone)[counts], atol=1e-5, rtol=0)
    assert scores_BR.dtype == torch.float32 and scores_BR.isfinite().all() and want_BR.std(1).min() > 0.1


def test_preference_loss_equals_numpy():
    chosen, rejected = np.random.default_rng(0).normal(size=(2, 20)) * 3
    want = np.mean([-np.log(1 / (1 + np.exp(-(c - r)))) for c, r in zip(chosen, rejected)])
    got = preference_loss(torch.from_numpy(chosen), torch.from_numpy(rejected))
    assert got.item() == pytest.approx(want, abs=1e-9)
    assert preference_loss(torch.tensor([-500.0]), torch.tensor([500.0])).item() == 1000       # no overflow


def test_from_backbone_starts_the_head_as_ziegler():
    model = random_model(hidden_size=2048, num_layers=1)
    reward = RewardModel.from_backbone(model, seeded())
    assert reward.head.weight.std().item() * 2049 ** 0.5 == pytest.approx(1, abs=0.05) and reward.head.bias.item() == 0
    assert [name for name, p in reward.named_parameters() if not p.requires_grad] == ["head.bias"]
    assert torch.equal(reward.hidden(random_tokens(2, 5)), model.hidden(random_tokens(2, 5))) and not hasattr(reward, "embed_out")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_files_round_trip(tmp_path, tied):
    model, (tokens_BT, mask_BT) = random_reward(tie_embeddings=tied), pad([[0, 5, 6], [0, 9, 8, 7, 6]], side="left")
    model.save_pretrained(tmp_path)
    weights, config = read_safetensors(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    assert weights["score.weight"].shape == (1, 32) and not [name for name in weights if name.startswith(("head", "embed_out"))]
    assert config["architectures"] == ["GPTNeoXForSequenceClassification"] and config["num_labels"] == 1
    back = RewardModel.from_pretrained(tmp_path)
    assert torch.equal(back.score(tokens_BT, mask_BT), model.score(tokens_BT, mask_BT))
    assert not any(p.requires_grad for p in back.parameters())


def test_what_the_files_cannot_hold_is_refused(tmp_path):
    model = random_reward()
    model.head.bias.data.fill_(0.5)
    assert "has no bias, and this head's is 0.5" in complaint(model.save_pretrained, tmp_path)
    model.head.bias.data.zero_()
    model.save_pretrained(tmp_path)
    TINY.save_pretrained(tmp_path)                               # 4,096 ids
    assert "ids up to 4095, the model only 64 embeddings" in complaint(load_reward, str(tmp_path), TINY)


def test_a_language_model_is_no_reward_model(tmp_path):
    random_model().save_pretrained(tmp_path / "lm")
    assert "head.weight" in complaint(RewardModel.from_pretrained, tmp_path / "lm")
    random_reward().save_pretrained(tmp_path / "reward")
    assert "embed_out.weight" in complaint(Pythia.from_pretrained, tmp_path / "reward")
    assert "not found" in complaint(load_reward, str(tmp_path / "none"), Characters())


@pytest.mark.parametrize("name", ["reward-classification", "reward-classification-shards", "reward-openassistant", "reward-scalar"])
def test_reward_models_of_the_hub_score_as_their_own_code_does(name):
    model, want = RewardModel.from_pretrained(GOLDEN / name, dtype=torch.float32), read_safetensors(GOLDEN / f"{name}.safetensors")
    scores_B = model.score(want["tokens_BT"], want["mask_BT"])
    assert want["scores_B"].std() > 0.1
    torch.testing.assert_close(scores_B, want["scores_B"], atol=1e-5, rtol=0)


def test_unknown_heads_and_poolings_are_refused(tmp_path):
    for name, changes in (("head", {"v_head.summary.weight": torch.zeros(1, 32)}), ("two", {"score.weight": torch.zeros(2, 32)})):
        shutil.copytree(GOLDEN / "reward-classification", tmp_path / name)
        weights = read_safetensors(tmp_path / name / "model.safetensors")
        del weights["score.weight"]
        write_safetensors(tmp_path / name / "model.safetensors", weights | changes)
    said = complaint(RewardModel.from_pretrained, tmp_path / "head")
    assert "lacks 2 tensor(s): 'head.bias', 'head.weight'; has unknown 1 tensor(s): 'v_head.summary.weight'" in said
    assert "has shape (2, 32)" in complaint(RewardModel.from_pretrained, tmp_path / "two")
    shutil.copytree(GOLDEN / "reward-openassistant", tmp_path / "mean")
    config = read_json(tmp_path / "mean" / "config.json")
    write_json(tmp_path / "mean" / "config.json", config | {"pooling": "mean"})
    assert "pooling 'mean'" in complaint(RewardModel.from_pretrained, tmp_path / "mean")


def other_tokenizer(*added: str) -> Tokenizer:
    """The tiny model's tokenizer with all ids one higher, and `added` special tokens."""
    config = copy.deepcopy(TINY.config)
    config["model"]["vocab"] = {token: i + 1 for token, i in config["model"]["vocab"].items()}
    for token in config["added_tokens"]:
        token["id"] += 1
    top = TINY.vocab_size + 1
    config["added_tokens"] += [dict(config["added_tokens"][0], content=content, id=top + i) for i, content in enumerate(added)]
    return Tokenizer(config)


def test_a_reward_model_with_another_tokenizer_scores_the_text(tmp_path):
    """Its ids are one higher and so are the rows of its embedding: scores must be those of the model with the policy's own ids."""
    model = RewardModel.from_backbone(random_model(vocab_size=4160), seeded()).requires_grad_(False)
    moved = copy.deepcopy(model)
    moved.gpt_neox.embed_in.weight.data = model.gpt_neox.embed_in.weight.roll(1, 0)
    moved.save_pretrained(tmp_path)
    other_tokenizer().save_pretrained(tmp_path)
    eot, texts = TINY.end_of_text, ["A fine film.", "the worst  I have seen<|endoftext|>", "é — 好"]
    tokens_BT, mask_BT = pad([[eot, *TINY.encode(text)] for text in texts], eot, "left")
    score_fn = load_reward(str(tmp_path), TINY)
    assert type(score_fn) is ThroughText and not hasattr(score_fn, "prefixes")
    torch.testing.assert_close(score_fn(tokens_BT, mask_BT), model.score(tokens_BT, mask_BT), atol=1e-5, rtol=0)


def test_openassistant_reads_dialogues_in_its_own_form():
    said = []
    tokenizer = other_tokenizer("<|prompter|>", "<|assistant|>")
    model = SimpleNamespace(device=CPU, score=lambda tokens_BT, mask_BT: said.extend(tokens_BT[mask_BT.bool()].tolist()) or torch.zeros(1))
    text = "<|endoftext|>\n\nHuman: Is it good?\n\nAssistant: Very. See it!<|endoftext|>"
    ThroughText(model, tokenizer, TINY)(torch.tensor([TINY.encode(text)]), torch.ones(1, len(TINY.encode(text))))
    assert tokenizer.decode(said) == "<|prompter|>Is it good?<|endoftext|><|assistant|>Very. See it!<|endoftext|>"
    assert said[0] == tokenizer.added_ids["<|prompter|>"]
    assert oasst_dialogue("no turns") == "<|prompter|>no turns<|endoftext|>"
    assert oasst_dialogue("<|endoftext|>") == "<|prompter|><|endoftext|>"                # never without a token


# ------------------------------------------------------------------------------------------------------------------- pairs

@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_preferences_are_read_in_both_forms(tmp_path, name):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"chosen": BEGINNING + " good", "rejected": BEGINNING + " bad"},
            {"chosen": BEGINNING + " good", "rejected": "\n\nHuman: other\n\nAssistant: bad"}, "",
            {"chosen": BEGINNING + " good", "rejected": BEGINNING + " "}, {"prompt": "a", "chosen": "", "rejected": "c"}]
    pairs, dropped = load_preferences(write_rows(tmp_path / name, rows))
    assert pairs == [Preference("a", "b", "c"), Preference(BEGINNING, " good", " bad")] and dropped == 3
    assert encode_pairs(pairs[:1], Characters()) == [([0, ord("a"), ord("b"), 0], [0, ord("a"), ord("c"), 0])]


@pytest.mark.parametrize("bad, named", [
    ({"chosen": "a"}, "row 2"), ({"chosen": "a", "rejected": 3}, "row 2"), ({"chosen": None, "rejected": "a"}, "row 2"),
    ({"prompt": ["a"], "chosen": "a", "rejected": "b"}, "row 2"), ({"prompt": None, "chosen": "a", "rejected": "b"}, "row 2"),
    ([1], "line 2"), ("{", "line 2")])
def test_malformed_preferences_are_named(tmp_path, bad, named):
    path = write_rows(tmp_path / "pairs.jsonl", [{"chosen": "a", "rejected": "b"}, bad])
    assert path in complaint(load_preferences, path) and named in complaint(load_preferences, path)


def test_preference_files_without_a_pair_are_refused(tmp_path):
    assert "no usable" in complaint(load_preferences, write_rows(tmp_path / "empty.jsonl", []))
    assert "no usable" in complaint(load_preferences, write_rows(tmp_path / "x.jsonl", [{"chosen": " ", "rejected": "b"}]))
    assert "no such file" in complaint(load_preferences, tmp_path / "none.jsonl")


def test_pairs_from_labels_use_each_text_once_in_disjoint_halves():
    rows = [{"text": f"{label}-{i}", "label": label} for i in range(10) for label in (0, 1, None)] + [{"text": "1-x", "label": 1}]
    pairs = {half: pairs_from_labels(rows, half, seeded()) for half in (0, 1, 2)}
    assert [len(pairs[half]) for half in (0, 1, 2)] == [10, 5, 5]
    texts = {half: [text for pair in some for text in pair[1:]] for half, some in pairs.items()}
    assert all(max(Counter(some).values()) == 1 for some in texts.values()) and not set(texts[1]) & set(texts[2])
    assert {(pair.prompt, pair.chosen[0], pair.rejected[0]) for some in pairs.values() for pair in some} == {("", "1", "0")}
    assert pairs_from_labels(rows, 1, seeded(1)) != pairs[1]


def test_labelled_rows_without_a_text_are_refused():
    for row in ({"label": 1}, {"label": 1, "text": None}):
        assert "text" in complaint(pairs_from_labels, [{"label": 0, "text": "a"}, row], 0, seeded())


def test_windows_and_cuts():
    ids = [0, *range(1, 10)]
    assert window(ids, 4) == [0, 1, 2, 3] and window(ids, 4, 0.999) == [0, 7, 8, 9]
    assert window(ids, 99, 0.9) == window(ids, 10, 0.9) == ids
    assert {window(ids, 4, place / 70)[1] for place in range(70)} == set(range(1, 8))
    assert keep_end(ids, 4) == [0, 7, 8, 9] and keep_end(ids, 10) == keep_end(ids, 99) == ids and keep_end(ids, 2) == [0, 9]
    cfg, generator, lengths, starts = RewardConfig(min_tokens=3, max_tokens=48), seeded(), [], []
    for _ in range(200):
        (one, other), (short, _) = cut_randomly([(list(range(100)), list(range(100))), (ids, ids)], cfg, generator)
        assert len(one) == len(other) and len(short) == min(len(one), 10) and one[0] == other[0] == 0
        lengths.append(len(one))
        starts.append((one[1], other[1]))
        assert one[1:] == list(range(one[1], one[1] + len(one) - 1))
    assert min(lengths) >= 3 and max(lengths) <= 48 and abs(np.median(lengths) - 12) <= 3      # √(3 · 48): log-uniform
    assert 70 < starts.count((1, 1)) < 130 and len(set(starts)) > 60


@pytest.mark.parametrize("field, value", [("half", 3), ("min_tokens", 1), ("min_tokens", 300), ("batch_size", 0), ("epochs", 0)])
def test_config_refuses(field, value):
    assert f"--reward-{field.replace('_', '-')}" in complaint(RewardConfig, **{field: value})


# ---------------------------------------------------------------------------------------------------------------- training

def test_training_learns_a_planted_rule(tmp_path):
    backbone, heldout = Pythia(random_model().cfg).initialize(seeded()), planted_pairs(200, seed=1)
    model = RewardModel.from_backbone(backbone, seeded())
    before, run = evaluate_reward(model, heldout), Run(tmp_path / "x", {}, resume=False)
    train_reward(model, planted_pairs(320, seed=0), RewardConfig(epochs=6, batch_size=16, lr=3e-3), run, seeded())
    after = evaluate_reward(model, heldout, batch_size=33)
    differences = [(model.score(*pad([c])) - model.score(*pad([r]))).item() for c, r in heldout]
    want = {"loss": np.log1p(np.exp(-np.array(differences))).mean(), "accuracy": np.mean(np.array(differences) > 0)}
    assert after == pytest.approx(want, abs=1e-4) and after["accuracy"] > 0.9 > 0.7 > before["accuracy"] and after["loss"] < 0.3
    assert model.head.bias.item() == 0 and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("random_cut", [False, True])
def test_same_seed_same_bits_also_when_killed_and_resumed(tmp_path, random_cut):
    cfg = RewardConfig(epochs=3, batch_size=8, min_tokens=4, max_tokens=10, checkpoint_seconds=0)      # 12 steps

    def train(run):
        generator = seeded()
        model = RewardModel.from_backbone(random_model(), generator)
        return train_reward(model, planted_pairs(32, seed=0), cfg, run, generator, random_cut).state_dict()

    run = Run(tmp_path / "a", {}, resume=False)
    state, (resumed, other) = train(run), killed_and_resumed(tmp_path / "b", 5, train)
    assert all(map(torch.equal, state.values(), resumed.values())) and run.rows() == other.rows()
    assert [row["step"] for row in run.rows()] == [0, 10, 11]


def test_prefix_scores_are_those_of_the_texts_cut_there():
    model = random_reward()
    chosen, rejected = ([random_tokens(n, seed=n).tolist() for n in lengths] for lengths in ((9, 3, 2), (5, 8, 2)))
    got = prefix_scores(model, *pad(chosen + rejected), shortest=3)
    cuts = [(c[:n], r[:n]) for c, r in zip(chosen, rejected) for n in range(3, 10) if n <= min(len(c), len(r))]
    assert len(cuts) == 4
    for scores_X, side in zip(got, (0, 1)):
        want_X = torch.cat([model.score(*pad([cut[side]])) for cut in cuts])
        torch.testing.assert_close(scores_X, want_X, atol=1e-5, rtol=0)
    assert len(prefix_scores(model, *pad(chosen[2:] + rejected[2:]), shortest=3)[0]) == 1      # shorter than the shortest


def test_nan_is_named_before_the_step(tmp_path):
    model = RewardModel.from_backbone(random_model(), seeded())
    weights = {name: p.clone() for name, p in model.named_parameters()}
    model.head_scores = lambda hidden: hidden.sum(-1) / 0
    told = complaint(train_reward, model, planted_pairs(32, seed=0), RewardConfig(), Run(tmp_path, {}, resume=False), seeded())
    assert told.startswith("reward, step 0: chosen is NaN or infinite; the step was not applied")
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())


def test_too_few_pairs_are_refused(tmp_path):
    model, run = RewardModel.from_backbone(random_model(), seeded()), Run(tmp_path / "x", {}, resume=False)
    assert "3 preference pairs" in complaint(train_reward, model, planted_pairs(3, seed=0), RewardConfig(epochs=1), run, seeded())


# ------------------------------------------------------------------------------------------------- functions of text as reward

def test_avoid_words_counts_whole_words_in_any_case(tmp_path):
    (tmp_path / "words").write_text("bad\nAwful\n\na.b\nné\n")
    texts = ["", "bad", "Bad, BAD and awful.", "badly embad awfulness", "a.b axb", "NÉ née", "bad-bad"]
    assert avoid_words(tmp_path / "words")(texts) == [0, -1, -3, 0, -1, -1, -2]
    (tmp_path / "words").write_text("c++\n$$\nbad\nbad-bad\nnot good\n")
    assert avoid_words(tmp_path / "words")(["I use c++ here for $$", "a$$", "bad-bad", "a good film, not bad", "Not good."]) == [-2, 0, -1, -1, -1]
    assert str(avoid_words(tmp_path / "words")(["fine"])) == "[0.0]"                       # not −0.0, which the report would show
    (tmp_path / "words").write_text("\ufeffbad\nnai\u0308ve\n")                            # a byte order mark; ï in two characters
    assert avoid_words(tmp_path / "words")(["bad", "naïve"]) == [-1, -1]
    (tmp_path / "empty").write_text(" \n")
    assert "no word" in complaint(avoid_words, tmp_path / "empty")
    assert "no such file" in complaint(avoid_words, tmp_path / "none")


def test_text_reward_reads_the_masked_tokens_only(tmp_path):
    seen, rows = [], [[0, *b"x bad"], [0, *b"bad bad", 0]]
    tokens_BT, mask_BT = pad(rows, ord("!"), "left")
    mask_BT[1, -3:] = 0                                          # "bad b", the response ended there
    scores_B = TextReward(lambda texts: seen.extend(texts) or [len(text) for text in texts], Characters())(tokens_BT, mask_BT)
    assert seen == ["x bad", "bad b"] and scores_B.tolist() == [5, 5] and scores_B.dtype == torch.float32
    seen.clear()
    function = TextReward(lambda texts: seen.extend(texts) or [len(text) for text in texts], Characters())
    prefixes_BR = function.prefixes(tokens_BT, mask_BT, 4)
    want = [[function(tokens_BT[b:b + 1, :t], mask_BT[b:b + 1, :t]).item() for t in range(5, 10)] for b in range(2)]
    assert seen[:10] == ["x", "bad ", "x ", "bad b", "x b", "bad b", "x ba", "bad b", "x bad", "bad b"] and prefixes_BR.tolist() == want
    (tmp_path / "words").write_text("bad")
    assert load_reward(f"avoid:{tmp_path / 'words'}", Characters())(tokens_BT, mask_BT).tolist() == [-1, -1]
