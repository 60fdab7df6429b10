"""Make tests/golden: what the reference libraries say about small random models and varied texts. Run by hand, not by pytest.

Needs an environment of its own, with torch, tiktoken and (unlike the project) transformers, tokenizers and safetensors:

    python tests/make_golden.py --tokenizer 20B=FILE --tokenizer imdb-4096=FILE               makes everything anew
    python tests/make_golden.py --fuzz --tokenizer NAME=FILE [--corpus FILE]                  compares our Tokenizer with theirs
    python tests/make_golden.py --verify-saved FOLDER …                                       loads what our save_pretrained wrote
    python tests/make_golden.py --verify-cache                        loads offline what our download fetched, and the other way round
"""

import argparse
import copy
import gzip
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

import safetensors
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification, GPTNeoXModel

GOLDEN = Path(__file__).parent / "golden"
PROMPT, SHORTER, NEW, PAD = 9, (9, 6, 2), 12, 3      # tokens of the prompts, of their padded versions, of the continuation; id
MIN_MARGIN = 2e-3                                    # between the two best logits, so that greedy choices are not a coin's toss

# name -> (arguments of GPTNeoXConfig, dtype of the file, changes made to the saved folder)
PARALLEL, SEQUENTIAL = {"use_parallel_residual": True}, {"use_parallel_residual": False}
MODELS = {
    "parallel": (dict(hidden_size=32, heads=4, vocab_size=83, rotary_pct=0.25, **PARALLEL), "float32", ()),
    "sequential": (dict(hidden_size=24, heads=3, vocab_size=64, rotary_pct=0.5, **SEQUENTIAL), "float32", ()),
    "full-rotary": (dict(hidden_size=24, heads=2, vocab_size=50, rotary_pct=1.0, **PARALLEL), "float32", ()),
    "odd-sizes": (dict(hidden_size=30, heads=3, vocab_size=97, intermediate_size=50, num_hidden_layers=3, rotary_pct=0.25,
                       layer_norm_eps=1e-2, **PARALLEL), "float32", ()),
    "tied": (dict(hidden_size=24, heads=3, vocab_size=71, rotary_pct=0.25, tie_word_embeddings=True, **PARALLEL), "float32", ()),
    "half-legacy": (dict(hidden_size=32, heads=2, vocab_size=80, rotary_pct=0.5, **PARALLEL), "float16",
                    ("old config", "legacy buffers")),                       # as the published Pythia checkpoints
    "bfloat-tied": (dict(hidden_size=24, heads=2, vocab_size=61, rotary_pct=0.5, tie_word_embeddings=True, **SEQUENTIAL),
                    "bfloat16", ()),
    "sharded": (dict(hidden_size=30, heads=5, vocab_size=90, num_hidden_layers=3, rotary_pct=1.0, **SEQUENTIAL), "bfloat16",
                ("shards",)),
    "old-config": (dict(hidden_size=16, heads=2, vocab_size=75, rotary_pct=0.5, rotary_base=100.0, **PARALLEL), "float32",
                   ("old config",)),
    "legacy-buffers": (dict(hidden_size=16, heads=2, vocab_size=130, num_hidden_layers=3, rotary_pct=0.5, rotary_base=500.0,
                            **PARALLEL), "float32", ("legacy buffers",)),
}


# ------------------------------------------------------------------------------------------------------------------- models

def make_models() -> None:
    for first_seed, (name, (arguments, dtype, changes)) in enumerate(MODELS.items()):
        for seed in itertools.count(first_seed, step=100):
            folder = GOLDEN / name
            shutil.rmtree(folder, ignore_errors=True)
            made = make_model(folder, arguments, getattr(torch, dtype), changes, seed)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            for (key, parameter), theirs in zip(made.named_parameters(), model.parameters(), strict=True):
                assert torch.equal(parameter, theirs), key
            expected, margin = expected_outputs(model, seed)
            distinct = len(expected["greedy_BT"][:, PROMPT:].unique())
            if margin > MIN_MARGIN and distinct > 8:
                break
        assert torch.equal(made(expected["tokens_BT"]).logits, expected["logits_BTV"])       # the config survived too
        save_file(expected, GOLDEN / f"{name}.safetensors")
        for path in GOLDEN.rglob("*.safetensors"):
            path.chmod(0o644)
        print(f"{name:15} seed {seed:4}  logits' std {expected['logits_BTV'].std():.2f}  "
              f"{distinct} distinct continuation tokens  least margin {margin:.4f}")


def make_model(folder: Path, arguments: dict, dtype: torch.dtype, changes: tuple, seed: int) -> GPTNeoXForCausalLM:
    """Save a random model, biases and layer norms random too, in the hub's layout; -> the same in float32."""
    arguments = dict(arguments)
    rope = {"rope_type": "default", "rope_theta": arguments.pop("rotary_base", 10_000.0),
            "partial_rotary_factor": arguments.pop("rotary_pct")}
    arguments = {"num_hidden_layers": 2, "intermediate_size": 2 * arguments["hidden_size"], "max_position_embeddings": 64,
                 "num_attention_heads": arguments.pop("heads"), "bos_token_id": 0, "eos_token_id": 0, **arguments}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(rope_parameters=rope, **arguments)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.25
            value = noise + 1 if "norm" in key and key.endswith("weight") else noise
            parameter.copy_(value.to(dtype))
    # A copy is saved: conversion would round the buffers, rotary frequencies too, as loading does not.
    copy.deepcopy(model).to(dtype).save_pretrained(folder, max_shard_size="12KB" if "shards" in changes else "5GB")
    if "legacy buffers" in changes:
        tensors = load_file(folder / "model.safetensors")
        dims = int(arguments["hidden_size"] // arguments["num_attention_heads"] * rope["partial_rotary_factor"])
        for layer in range(arguments["num_hidden_layers"]):
            prefix = f"gpt_neox.layers.{layer}.attention."
            tensors[prefix + "bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
            tensors[prefix + "masked_bias"] = torch.tensor(-1e9).to(dtype)
            tensors[prefix + "rotary_emb.inv_freq"] = (rope["rope_theta"] ** (-torch.arange(0, dims, 2) / dims)).half()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if "old config" in changes:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        rope = config.pop("rope_parameters")
        config |= {"rotary_pct": rope["partial_rotary_factor"], "rotary_emb_base": int(rope["rope_theta"]),
                   "torch_dtype": config.pop("dtype"), "transformers_version": "4.24.0"}
        path.write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")
    return model


@torch.no_grad()
def expected_outputs(model: GPTNeoXForCausalLM, seed: int) -> tuple[dict[str, torch.Tensor], float]:
    """-> tokens, masks, logits and greedy continuations, unpadded and padded on either side, and the least greedy margin."""
    def greedy(tokens_BT, mask_BT):
        return model.generate(tokens_BT, attention_mask=mask_BT, max_new_tokens=NEW, do_sample=False, eos_token_id=None,
                              pad_token_id=PAD)

    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(0, model.config.vocab_size, (len(SHORTER), PROMPT), generator=generator)
    column_T, length_B1 = torch.arange(PROMPT), torch.tensor(SHORTER)[:, None]
    left_mask_BT, right_mask_BT = (column_T >= PROMPT - length_B1).long(), (column_T < length_B1).long()
    left_BT, right_BT = tokens_BT.where(left_mask_BT == 1, PAD), tokens_BT.where(right_mask_BT == 1, PAD)
    ones_BT = torch.ones_like(tokens_BT)
    greedy_BT, left_greedy_BT = greedy(tokens_BT, ones_BT), greedy(left_BT, left_mask_BT)
    margin = 1.0
    for sequence_BT, mask_BT in ((greedy_BT, ones_BT), (left_greedy_BT, left_mask_BT)):
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(SHORTER), NEW)], dim=1)
        best_BR2 = model(sequence_BT, attention_mask=mask_BT).logits[:, PROMPT - 1:-1].topk(2)
        assert torch.equal(best_BR2.indices[..., 0], sequence_BT[:, PROMPT:])
        margin = min(margin, (best_BR2.values[..., 0] - best_BR2.values[..., 1]).min().item())
    return {
        "tokens_BT": tokens_BT, "logits_BTV": model(tokens_BT).logits, "greedy_BT": greedy_BT,
        "left_tokens_BT": left_BT, "left_mask_BT": left_mask_BT, "left_greedy_BT": left_greedy_BT,
        "left_logits_BTV": model(left_BT, attention_mask=left_mask_BT).logits,
        "right_tokens_BT": right_BT, "right_mask_BT": right_mask_BT,
        "right_logits_BTV": model(right_BT, attention_mask=right_mask_BT).logits,
    }, margin


@torch.no_grad()
def verify_saved(folder: Path) -> None:
    """Compare our logits of a saved checkpoint with those of transformers, which must find no key missing or unexpected."""
    from pythia import Pythia
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    problems = {kind: keys for kind, keys in info.items() if keys}
    own_dtype = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype
    tokens_BT = torch.randint(0, theirs.config.vocab_size, (4, 20), generator=torch.Generator().manual_seed(0))
    mask_BT = torch.ones_like(tokens_BT)
    mask_BT[1, :7] = mask_BT[2, -5:] = 0
    ours = Pythia.from_pretrained(folder, dtype=torch.float32)
    difference_BTV = ours(tokens_BT, mask_BT) - theirs.eval()(tokens_BT, attention_mask=mask_BT).logits
    print(f"{folder}: dtype {own_dtype}, greatest difference of logits {difference_BTV[mask_BT == 1].abs().max():.1e}, "
          f"loading problems: {problems or 'none'}")


# ------------------------------------------------------------------------------------------------------------ reward models

class OpenAssistantReward(torch.nn.Module):
    """OpenAssistant's GPTNeoXRewardModel with pooling "last", around transformers' backbone."""

    def __init__(self, config: GPTNeoXConfig):
        super().__init__()
        self.gpt_neox, self.out_proj = GPTNeoXModel(config), torch.nn.Linear(config.hidden_size, 1)

    def scores(self, tokens_BT, mask_BT):
        hidden_BTD = self.gpt_neox(tokens_BT, attention_mask=mask_BT).last_hidden_state
        return self.out_proj(hidden_BTD)[torch.arange(len(tokens_BT)), mask_BT.cumsum(1).argmax(1), 0]


class ScalarModel(torch.nn.Module):
    """The reward model of the TL;DR reproduction (Huang et al. 2024), whose config holds a bias to subtract."""
    BIAS = 0.75

    def __init__(self, config: GPTNeoXConfig):
        super().__init__()
        self.lm_backbone, self.scalar_head = GPTNeoXModel(config), torch.nn.Linear(config.hidden_size, 1)

    def scores(self, tokens_BT, mask_BT):
        hidden_BTD = self.lm_backbone(tokens_BT, attention_mask=mask_BT, output_hidden_states=True).hidden_states[-1]
        return (self.scalar_head(hidden_BTD) - self.BIAS)[torch.arange(len(tokens_BT)), mask_BT.sum(1) - 1, 0]


class SequenceClassification(GPTNeoXForSequenceClassification):
    def scores(self, tokens_BT, mask_BT):
        """One text at a time, unpadded: what transformers takes for the last real token has changed between versions."""
        return torch.cat([self(row[keep][None]).logits[0] for row, keep in zip(tokens_BT, mask_BT.bool())])


# name -> (class, vocabulary, dtype of the files, number of .bin shards (0: safetensors), changes to config.json)
REWARDS = {
    "reward-classification": (SequenceClassification, 83, "float32", 0, {}),
    "reward-classification-shards": (SequenceClassification, 83, "float32", 3, {}),
    "reward-openassistant": (OpenAssistantReward, 96, "float16", 2, {"model_type": "gpt_neox_reward_model", "pooling": "last",
                                                                     "architectures": ["GPTNeoXRewardModel"]}),
    "reward-scalar": (ScalarModel, 83, "float32", 1, None),
}


@torch.no_grad()
def make_rewards() -> None:
    """Reward models in the layouts of their four kinds of repository, and their scores of right-padded texts."""
    for seed, (name, (kind, vocab_size, dtype, shards, changes)) in enumerate(REWARDS.items()):
        folder = GOLDEN / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        config = GPTNeoXConfig(vocab_size=vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                               max_position_embeddings=64, num_labels=1, pad_token_id=PAD, bos_token_id=0, eos_token_id=0,
                               rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25})
        model, generator = kind(config).eval(), torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.25
            parameter.copy_((noise + 1 if "norm" in key and key.endswith("weight") else noise).to(getattr(torch, dtype)))
        weights = {key: p.to(getattr(torch, dtype)) for key, p in model.named_parameters()}
        backbone = "lm_backbone" if kind is ScalarModel else "gpt_neox"
        weights[f"{backbone}.layers.0.attention.masked_bias"] = torch.tensor(-6e4).to(getattr(torch, dtype))
        save_reward(folder, weights, shards)
        written = config.to_dict()
        if kind is ScalarModel:
            written = {"architectures": ["ScalarModel"], "base_config": written, "base_model": "acme/neo", "bias": ScalarModel.BIAS,
                       "hidden_size": 32, "torch_dtype": "float32"}
        (folder / "config.json").write_text(json.dumps(written | (changes or {}), indent=2) + "\n")
        tokens_BT = torch.randint(4, vocab_size, (5, PROMPT), generator=generator)
        mask_BT = (torch.arange(PROMPT) < torch.tensor([9, 5, 1, 8, 3])[:, None]).long()
        expected = {"tokens_BT": tokens_BT.where(mask_BT == 1, PAD), "mask_BT": mask_BT, "scores_B": model.scores(tokens_BT, mask_BT)}
        save_file(expected, GOLDEN / f"{name}.safetensors")
        (GOLDEN / f"{name}.safetensors").chmod(0o644)
        print(f"{name:30} scores {[round(s, 3) for s in expected['scores_B'].tolist()]}")


def save_reward(folder: Path, weights: dict[str, torch.Tensor], shards: int) -> None:
    """Write one safetensors file, one .bin file, or .bin shards with their index."""
    if shards == 0:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)
    elif shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        names = list(weights)
        files = {name: f"pytorch_model-{1 + i * shards // len(names):05}-of-{shards:05}.bin" for i, name in enumerate(names)}
        for file in sorted(set(files.values())):
            torch.save({name: weights[name] for name in names if files[name] == file}, folder / file)
        index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": files}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2) + "\n")


# ----------------------------------------------------------------------------------------------------------------- the cache

def verify_cache() -> None:
    """Our download fetches a sharded checkpoint from a local server and transformers loads it offline; then huggingface_hub fetches and
    our loader reads offline. Each library in a process of its own, as it reads the environment when imported."""
    from test_hub import REPO, Hub
    hub = Hub()
    hub.add(GOLDEN / "sharded")
    hub.files["tokenizer.json"] = (GOLDEN.parents[1] / "assets/tiny/tokenizer.json").read_bytes()
    head = (f"import torch; REPO = {REPO!r}; FILES = {sorted(hub.files)!r}; torch.manual_seed(0); tokens = torch.randint(0, 90, (2, 7))\n"
            "def show(who, model, logits, ids): print(f'{who}: logits {logits.double().sum():.9f}, tokens {ids}')\n")
    ours = head + ("from pythia import Pythia, Tokenizer; m = Pythia.from_pretrained(REPO, dtype=torch.float32)\n"
                   "show('pythia.py   ', m, m(tokens), Tokenizer.from_pretrained(REPO).encode('it was a fine film'))")
    theirs = head + ("from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast as T\n"
                     "m = AutoModelForCausalLM.from_pretrained(REPO, dtype=torch.float32).eval()\n"
                     "show('transformers', m, m(tokens).logits.detach(), T.from_pretrained(REPO).encode('it was a fine film'))")
    fetch = head + "from huggingface_hub import hf_hub_download\nfor name in FILES: hf_hub_download(REPO, name)\n"
    for fetcher, reader, what in ((ours, theirs, "fetched by pythia.py, opened offline by transformers"),
                                  (fetch, ours, "fetched by huggingface_hub, opened offline by pythia.py")):
        with tempfile.TemporaryDirectory() as home:
            env = os.environ | {"HF_HOME": home, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server.server_port}",
                                "PYTHONPATH": str(GOLDEN.parents[1]), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
            print(f"{what}:", flush=True)
            subprocess.run([sys.executable, "-c", fetcher], env=env, check=True)
            requests = len(hub.take())
            subprocess.run([sys.executable, "-c", reader], env=env | {"HF_HUB_OFFLINE": "1"}, check=True)
            print(f"    {requests} requests to fetch, {len(hub.take())} to open")


# --------------------------------------------------------------------------------------------------------------- tokenizers

TEXTS = [
    "", " ", "a", "\n", "\t", "é", "0",
    "I watched this with my sister last night, and we couldn't stop laughing — it's that good.",
    "Terrible. The acting's wooden, the plot doesn't hold, they've cut the only scene we'd have liked & I'll never rewatch it!!!",
    "THE BEST FILM OF 1997?! I'D SAY SO; WE'LL SEE WHAT THEY'RE MAKING NEXT (10/10)…",
    "it'S odd: 'tis, rock'n'roll, o'clock, ''quoted'', don''t, can't've, I’m with a curly apostrophe",
    "<br /><br />A must-see.<br /><br />8.5/10 from me, $12,345.67 well spent, 3½ stars, 50%… ²³ ⅷ Ⅻ 1st 2nd ٣٤٥ १२३",
    "def solve(n: int) -> list[int]:\n    \"\"\"Primes below n.\"\"\"\n    sieve = [True] * n\n    for i in range(2, n):\n"
    "        if sieve[i]:\n            for j in range(i * i, n, i):\n                sieve[j] = False\n"
    "    return [i for i in range(2, n) if sieve[i]]\n",
    "class A:\n\tdef f(self):\n\t\treturn {**self.x, 'a_b': 1e-5, \"c\": 0xFF}  # tab\t\n\n\n\nif __name__ == '__main__':\n\tA()",
    "one\r\ntwo\r\n\r\nthree\rfour\n\r\nfive \r\n six\t\r\n",
    "この映画は本当に素晴らしかったです。また見たい!", "这部电影太无聊了，我睡着了。", "정말 재미있는 영화였어요", "ห้องสมุด ไม่ไกล", "العربية: فيلم رائع ١٠/١٠",
    "Привет, мир! Ёлка. Το καλύτερο έργο. שלום עולם",
    "नमस्ते दुनिया, क्या हाल है?", "Tiếng Việt: rất hay; Ærøskøbing; straße; İstanbul; ǆ",
    "👩\u200d👩\u200d👧\u200d👦 and 🏳️\u200d🌈 👍🏽👍🏿 🇫🇷🇯🇵 ☺️☺︎ 1️⃣", "🙂🙂🙂 so good 😂😂", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛 𐍈 𠜎𠜱",
    "cafe\u0301 nai\u0308ve A\u030angstro\u0308m n\u0303 \u212b \u2126",
    "\u1e9b\u0323 q\u0307\u0323 \u0344 \uac00\u11a8 \u1100\u1161\u11a8",
    "a\u0300\u0301\u0302\u0303 Zalgo: h\u0335e\u0336l\u0337p \u0301alone at  \u0301 start",
    "fi\ufb01 ½ ™ ㎏ Å\u2460 \uff21\uff42\uff43 \u2f8f",
    "nbsp\u00a0\u00a0x\u2003em\u2009thin\u3000ideographic\u1680ogham\u205f\u202fn\u2028line\u2029para\u0085nel\u000bvt\u000cff",
    "zero\u200bwidth\ufeffbom\u2060joiner\u180emongolian\u00adsoft \u200e\u200f \x00\x01\x1c\x1d\x1e\x1f\x7f end",
    "<|endoftext|>", "one<|endoftext|>two <|endoftext|> three<|padding|><|padding|>four",
    "<|endoftext|><|endoftext|>\n<|padding|>", "<|endoftext|", "<<|endoftext|>>", "<|endoftext |> < |padding|> <|PADDING|>",
    "<|endoftext|> <|endoftext|>  <|endoftext|>   x",
    "e<|endoftext|>\u0301 and <|endoftext|>\u0338!", "it's<|endoftext|>'s", "   <|padding|>   ",
    "supercalifragilisticexpialidocious antidisestablishmentarianism " + "ha" * 40 + " " + "z" * 33,
    "https://www.example.org/watch?v=dQw4w9WgXcQ&t=1m30s, me@example.com, C:\\Temp\\x.txt, ../../etc",
    "-----=====_____*****#####.....!!!!!?????~~~~~ ({[<\"'`^°§´|\\/+-%&$€£¥@",
    "\\n \\t {{}} ''' \"\"\" $x^2 + \\frac{1}{2}$ <p class=\"a\">",
    "x\n \n  \n   \ny \t \t z\t  \t\n ", " \n", "\n ", "  \n  \n  x", "   ",
    "trailing spaces   ", "\u3000 \u3000  x", "1  2   3    4",
]
AROUND = [("", ""), ("", "x"), ("x", ""), ("a", "b"), ("a.", "\n"), ("\n", "if"), ("\t", "1"), ("é", "\u0301")]
TEXTS += [f"{before}{' ' * n}{after}" for n, (before, after) in zip(range(1, 61), itertools.cycle(AROUND))]


def make_tokenizer_goldens(files: dict[str, Path]) -> None:
    for name, path in files.items():
        theirs = tokenizers.Tokenizer.from_file(str(path))
        rows = [{"text": text, "ids": theirs.encode(text, add_special_tokens=False).ids} for text in TEXTS]
        with open(GOLDEN / f"tokenizer-{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        print(f"tokenizer {name}: {len(rows)} texts")


ASSIGNED = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]


def random_text(rng: random.Random) -> str:
    """A string of random pieces: words, runs of white space, special tokens, marks, any character of the planes in use."""
    pieces = (
        lambda: rng.choice(TEXTS),
        lambda: " " * rng.choice((1, 1, 1, 2, 3, 4, 8, rng.randint(1, 80))),
        lambda: rng.choice(("\n", "\t", "\r\n", "\xa0", "\u3000", "\u2028", "\x85", "\x0b", "\u200b")) * rng.randint(1, 3),
        lambda: rng.choice(("<|endoftext|>", "<|padding|>", "<|", "|>")),
        lambda: rng.choice(("'s", "'t", "'ll", "'ve", "'re", "'d", "'m", "'S", "'", "’s")),
        lambda: "".join(rng.choices("abcdefghijklmnopqrstuvwxyzABC", k=rng.randint(1, 12))),
        lambda: "".join(rng.choices("0123456789.,%$", k=rng.randint(1, 6))),
        lambda: "".join(chr(rng.randint(0x300, 0x345)) for _ in range(rng.randint(1, 3))),
        lambda: "".join(chr(rng.randint(0x20, 0x17f)) for _ in range(rng.randint(1, 6))),
        lambda: "".join(rng.choice(ASSIGNED) for _ in range(rng.randint(1, 4))),
    )
    return "".join(rng.choice(pieces)() for _ in range(rng.randint(1, 25)))


def fuzz(files: dict[str, Path], corpus: Path | None, count: int) -> None:
    from pythia import Tokenizer
    rng = random.Random(0)
    texts = {"random strings": [random_text(rng) for _ in range(count)]}
    if corpus:
        with gzip.open(corpus, "rt", encoding="utf-8") as file:
            texts["texts of the corpus"] = [json.loads(line)["text"] for line in itertools.islice(file, count)]
    for name, path in files.items():
        theirs, ours = tokenizers.Tokenizer.from_file(str(path)), Tokenizer.from_pretrained(path)
        for kind, group in texts.items():
            ids_of = {text: theirs.encode(text, add_special_tokens=False).ids for text in group}
            wrong = [text for text, ids in ids_of.items() if ours.encode(text) != ids]
            undecoded = [text for text, ids in ids_of.items()
                         if ours.decode(ids) != theirs.decode(ids, skip_special_tokens=False)]
            print(f"{name}: {len(group)} {kind}, {sum(map(len, group))} characters: {len(wrong)} encoded otherwise than by "
                  f"tokenizers, {len(undecoded)} decoded otherwise", *map(ascii, wrong[:3] + undecoded[:3]), sep="\n    ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", metavar="NAME=FILE", action="append", default=[], help="a name and a tokenizer.json")
    parser.add_argument("--fuzz", action="store_true", help="compare our Tokenizer with the tokenizers library, write nothing")
    parser.add_argument("--corpus", metavar="FILE", type=Path, help=".jsonl.gz with texts for --fuzz")
    parser.add_argument("--count", type=int, default=2000, help="texts of each kind for --fuzz")
    parser.add_argument("--verify-saved", metavar="FOLDER", type=Path, nargs="+", help="compare logits of our saved checkpoints")
    parser.add_argument("--verify-cache", action="store_true", help="share a cache of downloads with transformers")
    options = parser.parse_args()
    files = {name: Path(path) for name, path in (pair.split("=", 1) for pair in options.tokenizer)}
    sys.path.insert(0, str(Path(__file__).parents[1]))                       # for pythia
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, tokenizers {tokenizers.__version__}, "
          f"safetensors {safetensors.__version__}")
    if options.fuzz:
        fuzz(files, options.corpus, options.count)
    elif options.verify_saved:
        for folder in options.verify_saved:
            verify_saved(folder)
    elif options.verify_cache:
        verify_cache()
    else:
        make_models()
        make_rewards()
        make_tokenizer_goldens(files)


if __name__ == "__main__":
    main()
