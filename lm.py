"""A small language model from scratch (this is how assets/tiny was made), and the windows of text that it and the SAEs train on.

Dimension key: B windows   T tokens   V vocabulary
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from files import UserError, read_rows, reading
from pythia import Pythia, Tokenizer
from run import Run, check_finite, check_positive, mixed_precision


@dataclass(frozen=True)
class LMConfig:
    """--stage lm: train a small Pythia from scratch (this is how assets/tiny was made)."""

    tokenizer: str = "tiny"              # name or folder of a model whose tokenizer to use, or a tokenizer.json
    num_layers: int = 4                  # the defaults are assets/tiny
    hidden_size: int = 256               # a multiple of num_heads; the MLP is four times as wide
    num_heads: int = 8                   # of attention
    context: int = 256                   # tokens a window, the leading end-of-text token included
    tokens: int = 23_000_000             # trained on in all
    batch_size: int = 16                 # windows a step
    micro_batch: int = 8                 # windows a backward pass; logits of more fall out of the CPU's caches
    lr: float = 2e-3                     # peak; cosine to 0 (AdamW, betas 0.9 and 0.98)
    warmup: int = 200                    # steps
    weight_decay: float = 0.1            # on matrices
    checkpoint_seconds: float = 120.0    # between resumable states

    def __post_init__(self):
        check_positive(self, "lm", "num_layers", "hidden_size", "num_heads", "tokens", "batch_size", "micro_batch", "lr", "warmup")
        if self.context < 2 or self.weight_decay < 0:
            raise UserError("--lm-context needs 2 tokens or more, and --lm-weight-decay must not be negative")


# -------------------------------------------------------------------------------------------------------------------- text

def read_texts(path: str | Path) -> list[str]:
    """-> documents of a .txt (one), .jsonl or .jsonl.gz file ({"text": …}); UserError where there is no text at all."""
    path = Path(path)
    if path.suffix == ".txt":
        with reading(path, "not readable as UTF-8 text"):
            texts = [path.read_text(encoding="utf-8-sig")]
    else:
        texts = [row.get("text") for row in read_rows(path)]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f'{path}: every row needs a "text" string')
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError(f"{path}: an empty corpus: no text in it")
    return texts


def token_windows(texts: list[str], tokenizer: Tokenizer, context: int) -> Tensor:
    """-> tokens_BT: all documents in one stream, an end-of-text token after each, cut into windows that start with one too; what does not
    fill the last window is left out."""
    stream: list[int] = []
    for text in tqdm(texts, desc="tokenize", unit="doc", disable=len(texts) < 10_000):
        stream += tokenizer.encode(text)
        stream.append(tokenizer.end_of_text)
    T = context - 1
    if len(stream) < T:
        raise UserError(f"the corpus has {len(stream)} tokens; one window of {T} is the least")
    body_BT = torch.tensor(stream[:len(stream) // T * T], dtype=torch.int32).view(-1, T)
    return F.pad(body_BT, (1, 0), value=tokenizer.end_of_text)


def sample_windows(model: Pythia, tokenizer: Tokenizer, number: int, context: int, batch: int, generator: torch.Generator) -> Tensor:
    """-> tokens_BT sampled from the model, `batch` windows at once, each from an end-of-text token on."""
    chunks = []
    with tqdm(total=number * context, desc="sample text", unit="tok", unit_scale=True) as bar:
        for start in range(0, number, batch):
            prompt_BT = torch.full((min(batch, number - start), 1), tokenizer.end_of_text, device=model.device)
            chunks.append(model.generate(prompt_BT, context - 1, generator=generator).int().cpu())
            bar.update(chunks[-1].numel())
    return torch.cat(chunks)


# ---------------------------------------------------------------------------------------------------------------- training

def next_token_loss(model: Pythia, tokens_BT: Tensor) -> Tensor:
    """-> mean cross-entropy in nats a predicted token (all but each window's first)."""
    logits_BTV = model(tokens_BT[:, :-1])
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), tokens_BT[:, 1:].flatten())


def train_lm(model: Pythia, windows_BT: Tensor, cfg: LMConfig, run: Run, generator: torch.Generator) -> Pythia:
    """AdamW on next-token loss over windows of text in random order -> the model, trained in place."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=cfg.lr, betas=(0.9, 0.98), fused=True)
    steps = cfg.tokens // (cfg.batch_size * cfg.context)
    if not steps:
        raise UserError(f"--lm-tokens {cfg.tokens} do not fill one batch of {cfg.batch_size} windows of {cfg.context} tokens")
    epoch_orders = [torch.randperm(len(windows_BT), generator=generator) for _ in range(-(-steps * cfg.batch_size // len(windows_BT)))]
    order = torch.cat(epoch_orders)
    first = run.restore(model=model, optimizer=optimizer)
    bar = tqdm(range(first, steps), desc="lm", initial=first, total=steps)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min((step + 1) / cfg.warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
        batch_BT = windows_BT[order[step * cfg.batch_size:(step + 1) * cfg.batch_size]].long().to(model.device)
        loss = 0.0
        for micro_BT in batch_BT.split(cfg.micro_batch):
            with mixed_precision(model.device):      # the weights stay float32
                part = next_token_loss(model, micro_BT) * len(micro_BT) / len(batch_BT)
            part.backward()
            loss += part.item()
        check_finite(f"lm, step {step}", optimizer, loss=loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            run.log(step=step, loss=loss)
            bar.set_postfix(loss=f"{loss:.3f}")
        run.checkpoint(step + 1, cfg.checkpoint_seconds, model=model, optimizer=optimizer)
    return model


@torch.no_grad()
def evaluate_lm(folder: Path, corpus: str, context: int, device: torch.device) -> float:
    """-> mean loss over all predicted tokens of a held-out corpus, in float32, with the weights as they were saved."""
    model = Pythia.from_pretrained(folder, dtype=torch.float32, device=device)
    windows_BT = token_windows(read_texts(corpus), Tokenizer.from_pretrained(folder), context)
    losses = [next_token_loss(model, batch_BT.long().to(device)).double() * len(batch_BT)
              for batch_BT in tqdm(windows_BT.split(16), desc="evaluate")]
    return (sum(losses) / len(windows_BT)).item()
