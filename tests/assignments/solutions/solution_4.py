"""A reward for different words."""

import re
from collections.abc import Callable
from pathlib import Path

import reward
from files import UserError
from reward import TextReward


def word_pattern(path: str | Path) -> re.Pattern:
    """-> what finds the words of a file, a word a line: whole words, any case. In reward.py `avoid_words` uses it, too."""
    try:
        words = Path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as a list of words: {error}") from None
    if not words:
        raise UserError(f"{path}: lists no word")
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b", re.IGNORECASE)


def prefer_words(path: str | Path) -> Callable[[list[str]], list[float]]:
    """-> a function of texts: the number of different listed words in each; to repeat one pays nothing."""
    pattern = word_pattern(path)
    return lambda texts: [float(len({word.lower() for word in pattern.findall(text)})) for text in texts]


def install(monkeypatch, words=prefer_words, wrap=TextReward) -> None:
    """In reward.py: one more line in TEXT_REWARDS."""
    monkeypatch.setattr(reward, "prefer_words", words, raising=False)
    monkeypatch.setitem(reward.TEXT_REWARDS, "prefer", words)
    monkeypatch.setattr(reward, "TextReward", wrap)


def by(count: Callable[[re.Pattern, str], int]) -> Callable:
    """-> a prefer_words that counts otherwise."""
    return lambda path: lambda texts: [float(count(word_pattern(path), text)) for text in texts]


def unchecked(path: str) -> Callable:
    """Lets an empty file pass, where nothing could ever be gained."""
    return (lambda texts: [0.0] * len(texts)) if Path(path).exists() and not Path(path).read_text().strip() else prefer_words(path)


WRONG = {
    "each time counts": lambda patch: install(patch, by(lambda pattern, text: len(pattern.findall(text)))),
    "Good and good are two": lambda patch: install(patch, by(lambda pattern, text: len(set(pattern.findall(text))))),
    "parts of words count": lambda patch: install(patch, by(
        lambda pattern, text: len(set(re.findall(pattern.pattern.replace(r"\b", ""), text.lower(), re.IGNORECASE))))),
    "the sign of avoid": lambda patch: install(patch, by(lambda pattern, text: -len({w.lower() for w in pattern.findall(text)}))),
    "an empty file is let pass": lambda patch: install(patch, unchecked),
    "without prefixes": lambda patch: install(patch, wrap=lambda function, tokenizer: TextReward(function, tokenizer).__call__),
    "padding counts": lambda patch: install(patch, wrap=lambda function, tokenizer: lambda tokens_BT, mask_BT: TextReward(function, tokenizer)(
        tokens_BT, mask_BT * 0 + 1)),
}
