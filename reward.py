"""Reward: preference pairs, a reward model trained on them (Bradley–Terry), and functions of text that serve as one.

Dimension key: B batch   T tokens   R response tokens   D hidden size   N held-out pairs

References:
    Bradley & Terry 1952; Christiano et al. 2017, arXiv:1706.03741; Ziegler et al. 2019, arXiv:1909.08593 (the head's init)
"""

import functools
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from files import CheckpointFiles, UserError, located, read_rows, reading, write_json
from pythia import END_OF_TEXT, Pythia, PythiaConfig, Tokenizer, pad, write_safetensors
from run import Run, check_finite, check_positive, mixed_precision


ScoreFn = Callable[[Tensor, Tensor], Tensor]         # a reward: (tokens_BT, mask_BT) -> scores_B; may have .prefixes (see ppo.score)


@dataclass(frozen=True)
class RewardConfig:
    """--stage reward"""

    epochs: int = 3                      # passes over the pairs
    batch_size: int = 32                 # pairs a step
    max_tokens: int = 256                # longest text, the leading end-of-text token included
    min_tokens: int = 16                 # label pairs are cut to a random length from here to max_tokens
    half: int = 0                        # label pairs: 0 all, 1 or 2 that half of the labelled texts
    lr: float = 3e-4                     # linear warm-up towards it over the first 5 % of the steps, then linear to 0 from 0.95 of it
    weight_decay: float = 0.1            # AdamW
    checkpoint_seconds: float = 120.0    # between resumable states

    def __post_init__(self):
        if self.half not in (0, 1, 2):
            raise UserError(f"--reward-half {self.half}: choose 0 (all), 1 or 2")
        check_positive(self, "reward", "epochs", "batch_size", "lr")
        if self.weight_decay < 0:
            raise UserError("--reward-weight-decay must not be negative")
        if not 2 <= self.min_tokens <= self.max_tokens:
            raise UserError("--reward-min-tokens must lie between 2 and --reward-max-tokens")


# ------------------------------------------------------------------------------------------------------------------- pairs

class Preference(NamedTuple):
    """Two answers to one prompt, as text."""
    prompt: str
    chosen: str
    rejected: str


def load_preferences(path: str | Path) -> tuple[list[Preference], int]:
    """Read .jsonl or .jsonl.gz preference pairs -> (pairs, number of rows dropped).

    Rows are {"prompt", "chosen", "rejected"}, or {"chosen", "rejected"} as in Anthropic's HH: then the prompt is the text up to
    and including the last "\\n\\nAssistant:". Dropped are rows whose two prompts differ and rows with an empty answer.
    """
    rows, pairs = read_rows(path), []
    for number, row in enumerate(rows, start=1):
        prompt, chosen, rejected = row.get("prompt", ""), row.get("chosen"), row.get("rejected")
        if not all(isinstance(text, str) for text in (prompt, chosen, rejected)):
            raise UserError(f'{path}: row {number} needs the strings "chosen" and "rejected" (and may have "prompt")')
        other = prompt
        if "prompt" not in row:
            (prompt, chosen), (other, rejected) = split_dialogue(chosen), split_dialogue(rejected)
        if prompt == other and chosen.strip() and rejected.strip():
            pairs.append(Preference(prompt, chosen, rejected))
    if not pairs:
        raise UserError(f"{path}: no usable preference pair in {len(rows)} rows")
    return pairs, len(rows) - len(pairs)


def split_dialogue(text: str) -> tuple[str, str]:
    """-> (prompt, answer), cut after the last "\\n\\nAssistant:"."""
    prompt, mark, answer = text.rpartition("\n\nAssistant:")
    return prompt + mark, answer


def read_pairs(path: str, half: int, generator: torch.Generator) -> tuple[list[Preference], bool]:
    """-> preference pairs of a file of pairs, or of labelled texts, and whether it was the latter."""
    rows = read_rows(path)
    if rows and "label" in rows[0]:
        return pairs_from_labels(rows, half, generator), True
    pairs, dropped = load_preferences(path)
    if dropped:
        print(f"{path}: {dropped} rows dropped (prompts differ, or an answer is empty)")
    return pairs, False


def pairs_from_labels(rows: list[dict], half: int, generator: torch.Generator) -> list[Preference]:
    """-> a positive text (label 1) preferred to a negative one (label 0), at random, each text once at most.

    half 1 and 2 are disjoint halves of the labelled rows (alternate ones of each label), 0 is all of them.
    """
    texts = [[row.get("text") for row in rows if row.get("label") == label] for label in (1, 0)]
    if not all(texts) or not all(isinstance(text, str) for text in texts[0] + texts[1]):
        raise UserError('labelled texts need rows {"text": …, "label": 1} and {"text": …, "label": 0}, some of each')
    if half:
        texts = [kept[half - 1::2] for kept in texts]
    positive, negative = ([kept[i] for i in torch.randperm(len(kept), generator=generator).tolist()] for kept in texts)
    return [Preference("", chosen, rejected) for chosen, rejected in zip(positive, negative)]


def encode_pairs(pairs: list[Preference], tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """-> ids of (prompt + chosen, prompt + rejected), each between two end-of-text tokens, as documents lie in the LM's data."""
    eot = tokenizer.end_of_text
    return [tuple([eot, *tokenizer.encode(pair.prompt + answer), eot] for answer in (pair.chosen, pair.rejected))
            for pair in tqdm(pairs, desc="tokenize", disable=len(pairs) < 2000)]


# ------------------------------------------------------------------------------------------------------------ reward model

class RewardModel(Pythia):
    """A Pythia whose unembedding is replaced by a scalar head: score = w · h_last + b, h_last the final hidden state at the last
    real token. Its files are those of GPTNeoXForSequenceClassification with one label (`gpt_neox.*`, `score.weight`)."""

    def __init__(self, cfg: PythiaConfig):
        super().__init__(cfg)
        del self.embed_out
        self.head = nn.Linear(cfg.hidden_size, 1)

    def score(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """-> scores_B in float32. The last real token is found from the mask, not from a padding id: where padding and
        end-of-text share an id, looking for the id finds the wrong place."""
        last_B = mask_BT.shape[1] - 1 - mask_BT.flip(1).long().argmax(1)
        hidden_BTD = self.hidden(tokens_BT, mask_BT)
        return self.head_scores(hidden_BTD[torch.arange(len(last_B), device=self.device), last_B])

    forward = score

    def head_scores(self, hidden: Tensor) -> Tensor:
        """hidden (…, D) -> scores (…). By hand and in float32: under autocast a Linear would round scores to bfloat16, too coarse for
        their differences."""
        return (hidden.float() * self.head.weight.float()[0]).sum(-1) + self.head.bias.float()

    def prefixes(self, tokens_BT: Tensor, mask_BT: Tensor, R: int) -> Tensor:
        """-> scores of the text without the last R tokens, with one of them, … with all, (B, R + 1), from one pass: causal attention
        makes each position's hidden state that of the text up to it. Entries after a response's end mean nothing."""
        return self.head_scores(self.hidden(tokens_BT, mask_BT, last=R + 1))

    @classmethod
    def from_backbone(cls, model: Pythia, generator: torch.Generator) -> "RewardModel":
        """A trainable reward model that *shares* a language model's weights, and will change them; head ~ N(0, 1/(D + 1)) (Ziegler et al. 2019),
        bias 0."""
        with torch.device("meta"):
            reward = cls(model.cfg)
        reward.gpt_neox, reward.head = model.gpt_neox, nn.Linear(model.cfg.hidden_size, 1, device=model.device).requires_grad_(False)
        std = 1 / math.sqrt(model.cfg.hidden_size + 1)
        reward.head.weight.copy_(torch.randn(1, model.cfg.hidden_size, generator=generator) * std)
        reward.head.bias.zero_()
        reward.requires_grad_(True)
        reward.head.bias.requires_grad_(False)       # preferences see differences of scores only
        return reward

    @staticmethod
    def read_config(config: dict, source: object) -> dict:
        """-> the GPT-NeoX config.json within that of the reward models that `rename` knows."""
        with reading(source, "missing or malformed field"):
            if config.get("pooling", "last") != "last":
                raise UserError(f"{source}: pooling {config['pooling']!r} is not supported, only 'last'")
            if "base_config" in config:              # ScalarModel: subtracts `bias` from its head's score
                return config["base_config"] | {"bias": float(config.get("bias", 0.0))}
            return config | {"model_type": "gpt_neox"} if config.get("model_type") == "gpt_neox_reward_model" else config

    @staticmethod
    def rename(tensors: Iterator[tuple[str, Tensor]], config: dict) -> Iterator[tuple[str, Tensor]]:
        """-> our names for those of three families, told apart by their keys: transformers' GPTNeoXForSequenceClassification (`score.weight`,
        no bias), OpenAssistant's GPTNeoXRewardModel (`out_proj.*`) and the ScalarModel of the TL;DR reproduction (`lm_backbone.*`,
        `scalar_head.*`, config.bias; Huang et al. 2024, arXiv:2403.17031)."""
        for name, tensor in tensors:
            module, _, kind = name.rpartition(".")
            if name == "score.weight":
                yield "head.bias", tensor.new_zeros(1)
            elif module == "scalar_head" and kind == "bias":
                tensor = tensor - config.get("bias", 0.0)
            if module in ("score", "out_proj", "scalar_head"):
                name = f"head.{kind}"
            yield re.sub("^lm_backbone", "gpt_neox", name), tensor

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors of a GPTNeoXForSequenceClassification."""
        if self.head.bias.any():
            raise UserError(f"{folder}: a GPTNeoXForSequenceClassification has no bias, and this head's is {self.head.bias.item():.3g}")
        weights = self.state_dict()
        weights["score.weight"] = weights.pop("head.weight")
        del weights["head.bias"]
        write_safetensors(Path(folder) / "model.safetensors", weights)
        write_json(Path(folder) / "config.json", self.cfg.to_json(self.dtype) | {
            "architectures": ["GPTNeoXForSequenceClassification"], "num_labels": 1, "pad_token_id": 1,
            "id2label": {"0": "score"}, "label2id": {"score": 0}})


def preference_loss(chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    """−log σ(score of the chosen − score of the rejected), mean over pairs, of texts or their beginnings (Bradley & Terry 1952)."""
    return -F.logsigmoid(chosen_B - rejected_B).mean()


def train_reward(model: RewardModel, pairs: list[tuple[list[int], list[int]]], cfg: RewardConfig, run: Run, generator: torch.Generator,
                 random_cut: bool = False) -> RewardModel:
    """Train on pairs of ids (see `encode_pairs`) in place -> the model.

    random_cut: cut all texts of a batch to one random length (log-uniform, min_tokens to max_tokens), half of the time at a
    random place, and prefer every beginning of the one to the same length of the other, so that the model is at home on short
    texts and length is no cue. Else: long texts lose their beginning.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay, betas=(0.9, 0.98), fused=True)
    steps = cfg.epochs * len(pairs) // cfg.batch_size
    if not steps:
        raise UserError(f"{len(pairs)} preference pairs do not fill one batch of {cfg.batch_size} (--reward-batch-size)")
    order = torch.cat([torch.randperm(len(pairs), generator=generator) for _ in range(cfg.epochs)]).tolist()
    first = run.restore(model=model, optimizer=optimizer, generator=generator)
    bar = tqdm(range(first, steps), desc="reward", initial=first, total=steps)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min((step + 1) / (0.05 * steps + 1), 1 - step / steps)
        batch = [pairs[i] for i in order[step * cfg.batch_size:(step + 1) * cfg.batch_size]]
        batch = cut_randomly(batch, cfg, generator) if random_cut else [tuple(keep_end(ids, cfg.max_tokens) for ids in pair) for pair in batch]
        tokens_BT, mask_BT = pad([pair[0] for pair in batch] + [pair[1] for pair in batch], device=model.device)
        with mixed_precision(model.device):        # weights, scores and loss stay float32
            chosen, rejected = (prefix_scores(model, tokens_BT, mask_BT, cfg.min_tokens) if random_cut
                                else model.score(tokens_BT, mask_BT).chunk(2))
        loss = preference_loss(chosen, rejected)
        loss.backward()
        check_finite(f"reward, step {step}", optimizer, chosen=chosen, rejected=rejected, loss=loss)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            accuracy = (chosen > rejected).float().mean().item()
            run.log(step=step, loss=loss.item(), accuracy=accuracy)
            bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{accuracy:.2f}")
        run.checkpoint(step + 1, cfg.checkpoint_seconds, model=model, optimizer=optimizer, generator=generator)
    return model.requires_grad_(False)


def prefix_scores(model: RewardModel, tokens_BT: Tensor, mask_BT: Tensor, shortest: int) -> tuple[Tensor, Tensor]:
    """-> scores of all beginnings, from `shortest` tokens on (less where no pair has so many), that the chosen (first half of the batch) and
    the rejected text of a pair both have, as two long vectors. One pass gives them all: causal attention makes each position's score that of
    the text up to it."""
    chosen_BT, rejected_BT = model.head_scores(model.hidden(tokens_BT, mask_BT)).chunk(2)
    both_BT = torch.stack(mask_BT.bool().chunk(2)).all(0)
    both_BT[:, :min(shortest, int(both_BT.sum(1).max())) - 1] = False
    return chosen_BT[both_BT], rejected_BT[both_BT]


def cut_randomly(batch: list, cfg: RewardConfig, generator: torch.Generator) -> list:
    """-> the batch's texts, all cut to one random length; half of the time from their beginnings, else from a random place."""
    u, from_start = torch.rand(2, generator=generator).tolist()
    length = round(cfg.min_tokens * (cfg.max_tokens / cfg.min_tokens) ** u)
    return [tuple(window(ids, length, 0.0 if from_start < 0.5 else torch.rand(1, generator=generator).item()) for ids in pair)
            for pair in batch]


def window(ids: list[int], length: int, place: float = 0.0) -> list[int]:
    """-> the leading end-of-text token and `length` − 1 tokens of the text after it, from the first (`place` 0) or a later one, up to the
    last from which there are as many (`place` towards 1)."""
    start = 1 + int(place * max(1, len(ids) - length + 1))
    return ids[:1] + ids[start:start + length - 1]


def keep_end(ids: list[int], length: int) -> list[int]:
    """-> at most `length` ids, the first one and the last ones: a long prompt loses its beginning, then the answer its own."""
    return ids[:1] + ids[1:][-(length - 1):]


@torch.no_grad()
def evaluate_reward(model: RewardModel, pairs: list[tuple[list[int], list[int]]], batch_size: int = 64) -> dict:
    """-> mean loss and accuracy (share of pairs whose chosen text scores higher) on held-out pairs of ids."""
    batches = [zip(*pairs[i:i + batch_size]) for i in range(0, len(pairs), batch_size)]
    scores = [[model.score(*pad(texts, device=model.device)) for texts in batch] for batch in batches]
    chosen_N, rejected_N = (torch.cat(side) for side in zip(*scores))
    return {"loss": preference_loss(chosen_N, rejected_N).item(), "accuracy": (chosen_N > rejected_N).float().mean().item()}


# ------------------------------------------------------------------------------------------------- functions of text as reward

class TextReward:
    """Make a function of texts, list[str] -> list of numbers, into a score_fn(tokens_BT, mask_BT) -> scores_B. A text is prompt and response, or
    (`prefixes`) prompt and the response's beginning."""

    def __init__(self, function: Callable[[list[str]], list[float]], tokenizer: Tokenizer):
        self.function, self.tokenizer = function, tokenizer

    def prefixes(self, tokens_BT: Tensor, mask_BT: Tensor, R: int) -> Tensor:
        """-> scores of the text without the last R tokens, with one of them, … with all, (B, R + 1)."""
        T = tokens_BT.shape[1]
        return torch.stack([self(tokens_BT[:, :t], mask_BT[:, :t]) for t in range(T - R, T + 1)], dim=1)

    def __call__(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        texts = [self.tokenizer.decode([i for i in row[keep].tolist() if i != self.tokenizer.end_of_text])
                 for row, keep in zip(tokens_BT.cpu(), mask_BT.bool().cpu())]
        return torch.tensor(self.function(texts), dtype=torch.float32, device=tokens_BT.device)


def avoid_words(path: str | Path) -> Callable[[list[str]], list[float]]:
    """-> a function of texts: minus the number of listed words in each (whole words, any case; none in two at once, the longest first). The
    file has a word or phrase a line."""
    with reading(path, "not readable as a list of words"):
        text = unicodedata.normalize("NFC", Path(path).read_text(encoding="utf-8-sig"))
    words = sorted(filter(None, map(str.strip, text.splitlines())), key=len, reverse=True)
    if not words:
        raise UserError(f"{path}: lists no word")
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)
    return lambda texts: [float(-len(pattern.findall(unicodedata.normalize("NFC", text)))) for text in texts]


TEXT_REWARDS = {"avoid": avoid_words}                # KIND -> what makes a function of texts of FILE, for `--reward KIND:FILE`


def text_reward(name: str) -> tuple[Callable[[], Callable] | None, str]:
    """-> of KIND:FILE what makes the function of texts, and FILE; of a model's name None, and the name."""
    kind, colon, path = name.partition(":")
    return (functools.partial(TEXT_REWARDS[kind], located(path)), path) if colon and kind in TEXT_REWARDS else (None, name)


class ThroughText:
    """A reward model whose tokenizer differs from the policy's: ids are decoded to text, special tokens written out, and encoded anew.

    With OpenAssistant's tokenizer (which has a `<|prompter|>` token) a dialogue in Anthropic's form is put in its own:
    "\\n\\nHuman: Q\\n\\nAssistant: A" becomes "<|prompter|>Q<|endoftext|><|assistant|>A<|endoftext|>".
    """

    def __init__(self, model: RewardModel, tokenizer: Tokenizer, policy_tokenizer: Tokenizer):
        self.model, self.tokenizer, self.policy_tokenizer = model, tokenizer, policy_tokenizer

    def __call__(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        texts = [self.policy_tokenizer.decode(row[keep]) for row, keep in zip(tokens_BT.cpu(), mask_BT.bool().cpu())]
        if "<|prompter|>" in self.tokenizer.added_ids:
            texts = map(oasst_dialogue, texts)
        return self.model.score(*pad([self.tokenizer.encode(text) for text in texts], device=self.model.device)).to(tokens_BT.device)


def oasst_dialogue(text: str) -> str:
    """-> a dialogue of "\\n\\nHuman:" and "\\n\\nAssistant:" turns in OpenAssistant's form; text before the first turn is the prompter's."""
    speakers = {"Human": "<|prompter|>", "Assistant": "<|assistant|>"}
    first, *turns = re.split(r"\n\n(Human|Assistant):", text.replace(END_OF_TEXT, ""))
    turns = (["Human", first] if first.strip() or not turns else []) + turns
    return "".join(f"{speakers[who]}{said.strip()}{END_OF_TEXT}" for who, said in zip(turns[::2], turns[1::2]))


def check_reward(name: str) -> None:
    """UserError where `load_reward` would find nothing, before anything is loaded."""
    make, _ = text_reward(name)
    if make:
        make()
    elif ":" in name and not os.path.exists(name):
        raise UserError(f"{name}: {name.partition(':')[0]!r} is no kind of function of texts; there is {', '.join(TEXT_REWARDS)} (:FILE)")
    else:
        CheckpointFiles(name).need("config.json")


def load_reward(name: str, tokenizer: Tokenizer, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> ScoreFn:
    """-> the score_fn of `--reward`: a reward model's folder or name, or KIND:FILE of `TEXT_REWARDS`. `tokenizer` is the policy's."""
    make, _ = text_reward(name)
    if make:
        return TextReward(make(), tokenizer)
    model, own = RewardModel.from_pretrained(name, dtype=dtype, device=device), Tokenizer.from_pretrained(name)
    own.check_fits(model, name)
    same = own.config["model"]["vocab"] == tokenizer.config["model"]["vocab"] and own.added_ids == tokenizer.added_ids
    return model if same else ThroughText(model, own, tokenizer)
