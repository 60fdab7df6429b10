"""Assignment 4: a reward that is a function of text. File: reward.py. About 15 lines.

`avoid:FILE` counts listed words, each time they come. Paid for words in the same way, a policy learns to say one of them over and over. So
`--reward prefer:FILE` shall pay for each listed word once:

    score = how many *different* listed words the text has        whole words, any case; FILE has a word a line

Write `prefer_words(path)`, which makes a function list[str] -> list[float], and give it a line in `TEXT_REWARDS`. A file that cannot be read, or
lists no word, is a UserError of one line that names the file, as with `avoid:`.

Hints: read `avoid_words`, and share with it what both need; `TextReward` does the rest (tokens to text, padding, a score for each beginning of the
response); a set counts different things; a word may stand in the list twice, in capitals, and may hold a hyphen or an apostrophe. To go on: train
with it, and look in the samples for how the policy earns its reward.
"""

import pytest
import torch

import reward
import train
from assignments import need
from conftest import Characters, complaint
from files import UserError

WORDS = "good\nGREAT\nwell-made\ndon't\nGood\n"
TEXTS = {                                                            # and what they are worth, counted by hand
    "": 0, "a film": 0, "a good film": 1, "good good good, so good": 1, "Good and great": 2, "GREAT; good. great!": 2,
    "goodness, ungood, greatest": 0, "well-made": 1, "well made": 0, "Don't! It is well-made, good,\ngreat": 4, "(good)": 1, "good\ngreat\n": 2}


def wanted() -> None:
    need(hasattr(reward, "prefer_words"), "reward.py has no function prefer_words yet")


def listed(folder, words: str = WORDS) -> str:
    (folder / "words.txt").write_text(words)
    return str(folder / "words.txt")


def rows(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """-> texts as tokens, an end-of-text token before each, padded on the left by letters that the mask hides."""
    T = max(map(len, texts)) + 1
    ids = [[0] + Characters().encode(text) for text in texts]
    tokens_BT = torch.tensor([(Characters().encode("good ") * T)[:T - len(row)] + row for row in ids])
    mask_BT = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in ids])
    return tokens_BT, mask_BT


def test_texts_get_what_was_counted_by_hand(tmp_path):
    wanted()
    got = reward.prefer_words(listed(tmp_path))(list(TEXTS))
    wrong = [f"{text!r}: {score}, not {want}" for (text, want), score in zip(TEXTS.items(), got, strict=True) if score != want]
    assert not wrong, f"with the list {WORDS.split()} — " + "; ".join(wrong)
    assert all(isinstance(score, float) for score in got), "scores must be floats"


def test_load_reward_knows_its_name(tmp_path):
    wanted()
    try:
        score_fn = reward.load_reward(f"prefer:{listed(tmp_path)}", Characters())
    except UserError as error:
        pytest.fail(f"load_reward took prefer:FILE for a model: {error}", pytrace=False)
    train.check_inputs(train.resolve(train.parse(["--reward", f"prefer:{listed(tmp_path)}"])))       # nor does the command line
    scores_B = score_fn(*rows(list(TEXTS)))
    assert scores_B.dtype == torch.float32 and scores_B.tolist() == list(TEXTS.values()), f"of tokens: {scores_B}; what the mask hides must not count"
    avoid = reward.load_reward(f"avoid:{listed(tmp_path)}", Characters())
    assert avoid(*rows(["good good, great"])).tolist() == [-3], "avoid:FILE must go on counting each time"


def test_beginnings_of_a_response_are_scored_too(tmp_path):
    """The critic asks for them: what is a response worth so far?"""
    wanted()
    score_fn = reward.load_reward(f"prefer:{listed(tmp_path)}", Characters())
    assert hasattr(score_fn, "prefixes"), "the score function has no `prefixes`, without which the critic learns much less: wrap yours in TextReward"
    scores_BP = score_fn.prefixes(*rows(["so good, good. great", "nothing of the kind."]), R=16)
    want = [[0] * 3 + [1] * 13 + [2], [0] * 17]
    assert scores_BP.tolist() == want, f"scores of the text without its last 16 characters, with one of them, …:\n{scores_BP}"


def test_bad_files_are_one_line_that_names_them(tmp_path):
    wanted()
    for path in (str(tmp_path / "none.txt"), listed(tmp_path, "\n \n")):
        assert path in complaint(reward.load_reward, f"prefer:{path}", Characters())
