"""Sparse autoencoders on one layer's MLP output: the model, its training, its evaluation, its files.

Dimension key: B batch   T tokens   N rows (tokens, flattened)   D hidden size   F SAE features   G some of them   V vocabulary
               X all active features of all rows   E the features and a constant

References:
    Bricken et al. 2023, "Towards Monosemanticity", transformer-circuits.pub/2023/monosemantic-features
    Anthropic, "Circuits Updates — April 2024", transformer-circuits.pub/2024/april-update (the input scaling)
    each sparsity objective names its own paper: see `OBJECTIVES`
"""

import copy
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from files import UserError, load_state, read_json, reading, write_json
from pythia import Pythia, capturing, read_safetensors, write_safetensors
from run import Run, check_finite, check_positive, multiplies_bfloat16


@dataclass(frozen=True)
class SAEConfig:
    """--stage sae. Steps, windows and warm-ups that the papers give in steps of a long run are shares of this run here."""

    num_features: int = 2048             # F; here 8 × the hidden size of tiny, as in the proposal: for another model say so anew
    objective: str = "l1"                # a name in OBJECTIVES
    l0: float = 31.0                     # features active a token to aim at (topk, batchtopk: k); 0: leave l1_coef as it is
    l1_coef: float = 1.0                 # weight of the penalty, beside squares summed over D, where E‖x‖² = D; with l0 > 0 only the first
    l0_path: float = 0.3                 # share of the steps over which the target itself comes down to l0, from the F/2 of the start
    l0_rate: float = 0.01                # largest change of log l1_coef a step
    tokens: int = 1_800_000              # rows trained on in all
    batch_size: int = 512                # rows a step
    lr: float = 2e-3                     # Adam; rises from 0 over the first 2 % of the steps, falls to 0 over the last 30 % (April 2024: 20 %)
    l1_warmup: float = 0.05              # share of the steps over which l1_coef rises from 0 (April 2024: 0.05)
    resample_at: tuple[float, ...] = (0.125, 0.25, 0.375, 0.5)     # at these shares of the steps (paper: at 25k, 50k, 75k, 100k)
    dead_window: float = 0.0625          # silent over this share of the steps is dead (paper: half of the time between two of them)
    refit: bool = True                   # at the end, solve for the decoder once more by least squares, against L1's shrinkage
    refit_rows: int = 65_536             # rows for that
    resample_rows: int = 8192            # inputs whose loss is looked at for new directions (paper: 819,200)
    buffer_rows: int = 262_144           # rows shuffled together, in the model's dtype
    text_batch: int = 512                # windows sampled at once; lower it to save memory (keys and values of all of them)
    text_tokens: int = 262_144           # tokens sampled from the model to train on, where there is no --corpus
    eval_tokens: int = 32_768            # held-out tokens for the final figures
    context: int = 128                   # tokens a window, or less where the model has less
    checkpoint_seconds: float = 120.0    # between resumable states
    load: str = ""                       # an SAE that is there already, ours or another library's (see read_sae): nothing is trained

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise UserError(f"--sae-objective {self.objective}: choose from {', '.join(OBJECTIVES)}")
        check_positive(self, "sae", "num_features", "batch_size", "tokens", "buffer_rows", "eval_tokens", "refit_rows", "resample_rows",
                       "text_batch", "text_tokens", "lr")
        if self.context < 2:
            raise UserError(f"--sae-context {self.context}: a window needs at least 2 tokens")
        if self.buffer_rows < 2 * self.batch_size:
            raise UserError(f"--sae-buffer-rows {self.buffer_rows} must hold at least two batches of {self.batch_size}")
        least = 0 if OBJECTIVES[self.objective].penalty else 1
        if not least <= self.l0 <= self.num_features:
            raise UserError(f"--sae-l0 {self.l0:g}: {self.objective} needs a number from {least} to {self.num_features} features")


# ------------------------------------------------------------------------------------------------------------------ the SAE

class SAE(nn.Module):
    """z = (x − b_dec) W_enc + b_enc,  f_i = z_i where z_i > θ_i, else 0,  x̂ = f W_dec + b_dec,  rows of W_dec of unit norm.

    θ = 0 is the ReLU of Bricken et al. 2023. threshold_F holds another θ ≥ 0 (BatchTopK, JumpReLU, Gated), and k > 0 keeps only the
    k largest features of each token (TopK). In all of them a token's features depend on nothing but that token.
    W_enc_DF, b_enc_F, W_dec_FD, b_dec_D, threshold_F; in files without the suffixes.
    """

    def __init__(self, d_in: int, num_features: int, generator: torch.Generator | None = None, k: int = 0):
        super().__init__()
        W_dec_FD = F.normalize(torch.randn(num_features, d_in, generator=generator), dim=-1)
        self.W_dec_FD = nn.Parameter(W_dec_FD)
        # The transpose to begin with (untied from then on), small enough that F/2 active features do not overshoot the input.
        self.W_enc_DF = nn.Parameter(W_dec_FD.T * (2 * d_in / num_features))
        self.b_enc_F = nn.Parameter(torch.zeros(num_features))
        self.b_dec_D = nn.Parameter(torch.zeros(d_in))
        self.register_parameter("threshold_F", None)
        self.k = k

    @property
    def num_features(self) -> int:
        return self.W_dec_FD.shape[0]

    def pre(self, x: Tensor) -> Tensor:
        """x (…, D) -> z (…, F), the pre-activations."""
        # b_dec folded into the bias: else autograd would compute a gradient of x, a sixth matrix product, only for b_dec.
        return F.linear(x, self.W_enc_DF.T, self.b_enc_F - self.b_dec_D @ self.W_enc_DF)

    def encode(self, x: Tensor) -> Tensor:
        """x (…, D) -> features (…, F), ≥ 0 and mostly 0."""
        features = self.pre(x).relu_()               # in place: the largest tensor of all
        if self.threshold_F is not None:
            features = features * (features > self.threshold_F)
        return keep_largest(features, self.k) if self.k else features

    def decode(self, features: Tensor) -> Tensor:
        """features (…, F) -> reconstruction (…, D)."""
        return features @ self.W_dec_FD + self.b_dec_D

    def forward(self, x: Tensor) -> Tensor:
        """x (…, D) -> reconstruction (…, D)."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def unscaled(self, scale: float) -> "SAE":
        """-> of this SAE, whose inputs are multiplied by `scale`, the same for inputs as the model makes them: biases, thresholds, and so
        features, are divided by the scale; decoder rows stay as they are."""
        sae = copy.deepcopy(self)
        for name, value in sae.named_parameters():
            if name.startswith(("b_", "threshold")):
                value /= scale
        return sae

    @torch.no_grad()
    def fold_gate(self, r_mag_F: Tensor, b_mag_F: Tensor) -> None:
        """Turn a Gated SAE (see `gated`), whose gate this is, into the same one without a gate, with thresholds: its gate is open,
        (x − b_dec) W + b_gate > 0, exactly where its magnitude z = e^r (x − b_dec) W + b_mag exceeds b_mag − e^r b_gate."""
        self.threshold_F = nn.Parameter(F.relu(b_mag_F - r_mag_F.exp() * self.b_enc_F))
        self.W_enc_DF *= r_mag_F.exp()
        self.b_enc_F.copy_(b_mag_F)

    @torch.no_grad()
    def rescale(self, norm_F: Tensor) -> None:
        """Divide decoder rows by norm_F, and multiply the features: x̂ stays as it is."""
        self.W_dec_FD /= norm_F[:, None]
        for value in (self.W_enc_DF, self.b_enc_F, self.threshold_F):
            if value is not None:
                value *= norm_F

    def save(self, folder: str | Path, *, model_name: str, layer: int, context: int) -> None:
        """Write sae_weights.safetensors and cfg.json, with the names that SAELens uses."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name.rpartition("_")[0]: value for name, value in self.state_dict().items()}
        write_safetensors(folder / "sae_weights.safetensors", weights)
        write_json(folder / "cfg.json", {
            "architecture": "topk" if self.k else "standard" if self.threshold_F is None else "jumprelu",
            "d_in": self.W_dec_FD.shape[1], "d_sae": self.num_features, "dtype": "float32",
            "model_name": model_name, "hook_name": f"blocks.{layer}.hook_mlp_out", "hook_layer": layer, "context_size": context,
            "activation_fn_str": "topk" if self.k else "relu", "activation_fn_kwargs": {"k": self.k} if self.k else {},
            "apply_b_dec_to_input": True, "normalize_activations": "none", "prepend_bos": True})


def keep_largest(pre: Tensor, k: int) -> Tensor:
    """pre (…, F) -> max(0, pre) with all but the k largest of each row at 0."""
    values, ids = pre.topk(min(k, pre.shape[-1]), dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter(-1, ids, values.relu())


def active_product(features_NF: Tensor, W_dec_FD: Tensor, scale_F: Tensor | None = None) -> Tensor:
    """(scale ⊙ features) W_dec -> (N, D), by work in proportion to the active features, forward and backward: some 30 of thousands a row.
    Features that are 0 get no gradient: the activations that made them 0 would stop it."""
    if capturing(features_NF):                       # a graph cannot wait to learn how many are active
        return (features_NF if scale_F is None else features_NF * scale_F) @ W_dec_FD
    row_X, id_X = features_NF.nonzero(as_tuple=True)
    count_N = torch.bincount(row_X, minlength=len(features_NF))
    start_N = count_N.cumsum(0) - count_N            # where each row's begin
    value_X = features_NF[row_X, id_X] if scale_F is None else features_NF[row_X, id_X] * scale_F.index_select(0, id_X)
    return F.embedding_bag(id_X, W_dec_FD, start_N, per_sample_weights=value_X, mode="sum")


# --------------------------------------------------------------------------------------------------------------- objectives
#
# One place for all of them:   L = mean_N ‖x − x̂‖² + l1_coef · mean_N penalty + mean_N extra
#
# Squares are *summed* over D, penalties *summed* over features, and both *averaged* over rows (the paper of 2023 averages the squares
# over D: its coefficient is 1/D of ours). Inputs are scaled so that E‖x‖² = D. To add an objective, write its penalty as a function
# of a `Pass`, `name(p) -> penalty_N`, and give it a line in OBJECTIVES, with `relu`: L0 target, refit and saving follow from that line, with
# `resample=True` resampling too, and `--sae-objective name` trains with it. Another *activation* must also be what `SAE.encode` does with the
# finished SAE; look where `relu`, `jumprelu`, `gated` and "topk" are asked for by name.

class Pass(NamedTuple):
    """One training step as an objective sees it."""
    sae: SAE
    x_ND: Tensor                         # inputs, scaled
    pre_NF: Tensor                       # z
    features_NF: Tensor                  # f
    error_ND: Tensor                     # x − x̂
    dead_F: Tensor                       # True: silent over the window


class Objective(NamedTuple):
    """A line of the table."""
    penalty: Callable[[Pass], Tensor] | None             # -> penalty_N; None: L0 is fixed by the activation
    activation: Callable[[SAE, Tensor, float], Tensor]   # (sae, pre_NF, l0 target) -> features_NF, in training
    extra: Callable[[Pass], Tensor] | None = None        # -> loss_N that l1_coef does not weigh
    vectors: dict[str, float] = {}                       # what it trains besides, F numbers each, and their first value
    unit_norm: bool = True                               # decoder rows are held at norm 1, else scale would escape the penalty
    resample: bool = False                               # dead features are given new directions (Bricken et al. 2023)


def relu(sae: SAE, pre_NF: Tensor, l0: float) -> Tensor:
    """f = max(0, z)."""
    return F.relu(pre_NF)


def l1(p: Pass) -> Tensor:
    """Σ f_i (Bricken et al. 2023). It shrinks what it keeps: an active feature pays for every bit of its height."""
    return p.features_NF.sum(-1)


def l1_decnorm(p: Pass) -> Tensor:
    """Σ f_i ‖d_i‖ (Anthropic, April 2024): decoder norms are free, and paid for; folded into the features at the end."""
    return p.features_NF @ p.sae.W_dec_FD.norm(dim=-1)


def log(p: Pass) -> Tensor:
    """Σ log(1 + (f_i/σ)²), σ = 0.1 (a classic of sparse coding: Olshausen and Field 1996). Large features pay hardly more than middling
    ones. Below σ it is a square, which shrinks all and puts nothing to 0: with σ = 1 the L0 target is met by features near 0."""
    return (p.features_NF / 0.1).square().log1p().sum(-1)


def sqrt(p: Pass) -> Tensor:
    """Σ √f_i (Riggs and Brinkmann 2024, "Improving SAEs by sqrt()-ing L1"); √(f + ε) − √ε with ε = 0.01, to bound the slope at 0."""
    return ((p.features_NF + 0.01).sqrt() - 0.1).sum(-1)


def tanh(p: Pass) -> Tensor:
    """Σ tanh f_i (Anthropic, February 2024, as (A/B) tanh(B f); here B = 1): near L0 for features above 1. Those active on more
    than a tenth of tokens were hard to interpret there."""
    return p.features_NF.tanh().sum(-1)


def hoyer(p: Pass) -> Tensor:
    """(Σ f_i)² / Σ f_i² (Hoyer 2004; Yang et al. 2020, "DeepHoyer"): k for k equal features, whatever their size. As size is free, encoder columns
    grow large; dead features are not resampled here, for fresh columns of that norm drowned all others."""
    return p.features_NF.sum(-1).square() / p.features_NF.square().sum(-1).clamp(min=1e-6)


def topk(sae: SAE, pre_NF: Tensor, l0: float) -> Tensor:
    """f = TopK(max(0, z)), the k largest of each row (Gao et al. 2024, "Scaling and evaluating sparse autoencoders")."""
    return keep_largest(pre_NF, sae.k)


def batchtopk(sae: SAE, pre_NF: Tensor, l0: float) -> Tensor:
    """The k·N largest max(0, z) of the whole batch (Bussmann et al. 2024, "BatchTopK"). No token may depend on its batch when the SAE is
    used: `SAE.encode` takes a threshold instead, the moving average of the smallest feature kept."""
    least = pre_NF.detach().flatten().topk(round(l0 * len(pre_NF)), sorted=False).values.min().clamp(min=0)
    with torch.no_grad():
        sae.threshold_F.lerp_(least, 0.01 if sae.threshold_F.any() else 1.0)
    return torch.where(pre_NF >= least, pre_NF, 0.0)


def auxk(p: Pass) -> Tensor:
    """‖e − ê‖² / 32 (Gao et al. 2024): the D/2 largest of the *dead* features learn to reconstruct what the others leave, e = x − x̂,
    held fixed. Features that no selection reaches would get no gradient otherwise."""
    error_ND = p.error_ND.detach()
    if p.dead_F.any():                               # else a gradient as large as z would be made, all 0
        error_ND = error_ND - keep_largest(p.pre_NF[:, p.dead_F], p.x_ND.shape[1] // 2) @ p.sae.W_dec_FD[p.dead_F]
    return error_ND.square().sum(-1) / 32


BANDWIDTH = 2.0          # ε of the straight-through estimators, where E‖x‖² = D


class Step(torch.autograd.Function):
    """H(z − θ), with a slope by θ that stands in for the true one, which is 0 almost everywhere: −(1/ε) 1[|z − θ| < ε/2]. None by z."""

    @staticmethod
    def forward(ctx: Any, pre_NF: Tensor, threshold_F: Tensor) -> Tensor:
        ctx.save_for_backward(pre_NF, threshold_F)
        return (pre_NF > threshold_F).to(pre_NF.dtype)

    @staticmethod
    def backward(ctx: Any, gradient_NF: Tensor) -> tuple[Tensor | None, Tensor]:
        pre_NF, threshold_F = ctx.saved_tensors
        near_NF = (pre_NF - threshold_F).abs() < BANDWIDTH / 2
        return None, (gradient_NF * near_NF).sum(0) / -BANDWIDTH


class JumpReLU(torch.autograd.Function):
    """z H(z − θ), with slopes H(z − θ) by z and −(θ/ε) 1[|z − θ| < ε/2] by θ."""

    @staticmethod
    def forward(ctx: Any, pre_NF: Tensor, threshold_F: Tensor) -> Tensor:
        ctx.save_for_backward(pre_NF, threshold_F)
        return torch.where(pre_NF > threshold_F, pre_NF, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient_NF: Tensor) -> tuple[Tensor, Tensor]:
        pre_NF, threshold_F = ctx.saved_tensors
        return gradient_NF * (pre_NF > threshold_F), threshold_F * Step.backward(ctx, gradient_NF)[1]


def jumprelu(sae: SAE, pre_NF: Tensor, l0: float) -> Tensor:
    """f = z H(z − θ) with straight-through slopes (Rajamanoharan et al. 2024, "Jumping Ahead"), θ learned, one a feature."""
    return JumpReLU.apply(pre_NF, sae.threshold_F)


def active(p: Pass) -> Tensor:
    """‖f‖₀ = Σ H(z_i − θ_i) (same paper)."""
    return Step.apply(p.pre_NF, p.sae.threshold_F).sum(-1)


def gated(sae: SAE, pre_NF: Tensor, l0: float) -> Tensor:
    """f = 1[π > 0] max(0, e^r (x − b_dec) W_enc + b_mag), π = (x − b_dec) W_enc + b_gate (Rajamanoharan et al. 2024, "Improving Dictionary
    Learning with Gated SAEs"): whether a feature is on, and how much, are two decisions. b_enc_F is b_gate until `SAE.fold_gate`."""
    return (pre_NF > 0) * F.relu(sae.r_mag_F.exp() * (pre_NF - sae.b_enc_F) + sae.b_mag_F)


def gate_l1(p: Pass) -> Tensor:
    """Σ max(0, π_i) (same paper): only the gate is penalized, so that the features need not shrink."""
    return F.relu(p.pre_NF).sum(-1)


def gate_error(p: Pass) -> Tensor:
    """‖x − x̂(max(0, π))‖², the decoder held fixed (same paper): it trains the gate, and holds π at the size that the penalty counts."""
    return (p.x_ND - F.relu(p.pre_NF) @ p.sae.W_dec_FD.detach() - p.sae.b_dec_D.detach()).square().sum(-1)


OBJECTIVES = {
    "l1": Objective(l1, relu, resample=True),
    "l1_decnorm": Objective(l1_decnorm, relu, unit_norm=False),
    "log": Objective(log, relu, resample=True),
    "sqrt": Objective(sqrt, relu, resample=True),
    "tanh": Objective(tanh, relu, resample=True),
    "hoyer": Objective(hoyer, relu),
    "topk": Objective(None, topk, extra=auxk),
    "batchtopk": Objective(None, batchtopk, extra=auxk, vectors={"threshold_F": 0.0}),
    "jumprelu": Objective(active, jumprelu, vectors={"threshold_F": 0.1}),
    "gated": Objective(gate_l1, gated, extra=gate_error, vectors={"r_mag_F": 0.0, "b_mag_F": 0.0}),
}


# ------------------------------------------------------------------------------------------------------------- activations

class ActivationBuffer:
    """Rows of one layer's MLP output, shuffled over many windows of text; the first token of each window is left out.

    Half of the rows are drawn, then replaced by new ones and all are shuffled again (Bricken et al. 2023). Where the buffer can
    hold the whole text, its rows are computed once and only reshuffled.
    """

    def __init__(self, model: Pythia, layer: int, tokens_BT: Tensor, cfg: SAEConfig, generator: torch.Generator):
        self.model, self.layer, self.tokens_BT, self.generator = model, layer, tokens_BT, generator
        self.order_B = torch.randperm(len(tokens_BT), generator=generator)
        self.next_window = 0
        rows_of_text = tokens_BT.shape[0] * (tokens_BT.shape[1] - 1)
        self.holds_all = rows_of_text <= cfg.buffer_rows
        self.rows_ND = self.compute(min(rows_of_text, cfg.buffer_rows))
        self.shuffle()

    def compute(self, rows: int) -> Tensor:
        """-> `rows` rows of the next windows, which come in a new order each time the text has been through."""
        chunks, missing = [], rows
        while missing > 0:
            if self.next_window == len(self.order_B):
                self.order_B, self.next_window = torch.randperm(len(self.order_B), generator=self.generator), 0
            chosen_B = self.order_B[self.next_window:self.next_window + -(-missing // (self.tokens_BT.shape[1] - 1))]
            chunks.append(mlp_rows(self.model, self.layer, self.tokens_BT[chosen_B])[:missing])
            self.next_window += len(chosen_B)
            missing -= len(chunks[-1])
        return torch.cat(chunks)

    def shuffle(self) -> None:
        self.shuffled_N = torch.randperm(len(self.rows_ND), generator=self.generator)
        self.drawn = 0

    def draw(self, rows: int) -> Tensor:
        """-> the next `rows` rows, (rows, D), or all of the buffer where it has fewer."""
        limit = len(self.rows_ND) if self.holds_all else len(self.rows_ND) // 2
        if self.drawn + rows > limit:
            if self.drawn and not self.holds_all:
                self.rows_ND[self.shuffled_N[:self.drawn]] = self.compute(self.drawn)
            self.shuffle()
        chosen_N = self.shuffled_N[self.drawn:self.drawn + rows]
        self.drawn += rows
        return self.rows_ND[chosen_N.to(self.rows_ND.device)]

    def state_dict(self) -> dict:
        """All that a resumed run needs, with the generator, to draw the very same rows."""
        return {name: getattr(self, name) for name in ("rows_ND", "order_B", "next_window", "shuffled_N", "drawn")}

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value.to(self.rows_ND.device) if name == "rows_ND" else value)


@torch.no_grad()
def mlp_rows(model: Pythia, layer: int, tokens_BT: Tensor) -> Tensor:
    """-> MLP outputs of all tokens but each window's first (end-of-text, whose activations are unlike all others), (N, D)."""
    return torch.cat([model.mlp_output(batch_BT.long().to(model.device), layer)[:, 1:].flatten(0, 1) for batch_BT in tokens_BT.split(16)])


# ----------------------------------------------------------------------------------------------------------------- training

class SAETrainer:
    """One SAE in training, on inputs scaled by one number so that E‖x‖² = D, with the loss that stands above `OBJECTIVES`, the
    decoder-norm constraint, a controller on l1_coef that reaches the L0 target, and resampling of dead features."""

    def __init__(self, sae: SAE, scale: float, cfg: SAEConfig, generator: torch.Generator):
        self.sae, self.scale, self.cfg, self.generator = sae, scale, cfg, generator
        self.objective = OBJECTIVES[cfg.objective]
        for name, value in self.objective.vectors.items():
            setattr(sae, name, nn.Parameter(torch.full_like(sae.b_enc_F, value)))
        self.steps = max(1, cfg.tokens // cfg.batch_size)
        # Adam moves each number by about lr. The D numbers of an encoder column together move z by about √D lr, a bias or threshold by lr
        # alone. Where these have to answer a penalty they get √D lr as well, else L0 lags l1_coef by a thousand steps, and the controller
        # overshoots.
        fast = {"b_enc_F", "b_mag_F", "threshold_F"} if self.objective.penalty else set()
        self.optimizer = torch.optim.Adam([{"params": [p for name, p in sae.named_parameters() if (name in fast) == is_fast], "times": times}
                                           for is_fast, times in ((False, 1.0), (True, math.sqrt(len(sae.b_dec_D))))], lr=cfg.lr, fused=True)
        self.l1_coef = cfg.l1_coef
        self.mean_l0 = None                          # moving average of the last ten steps or so
        self.silent_F = torch.zeros(sae.num_features, dtype=torch.long, device=sae.W_dec_FD.device)     # steps since a feature fired

    def step(self, step: int, x_ND: Tensor) -> dict:
        """One update on unscaled rows -> the figures to log."""
        cfg, sae, objective, done = self.cfg, self.sae, self.objective, step / self.steps
        x_ND = x_ND.float() * self.scale             # scaled from here on
        for group in self.optimizer.param_groups:
            group["lr"] = group["times"] * cfg.lr * min(1.0, (step + 1) / max(1, 0.02 * self.steps), (1 - done) / 0.3)
        l1_coef = self.l1_coef * min(1.0, done / max(cfg.l1_warmup, 1e-9))
        # On a GPU matrix products are in bfloat16; parameters and loss stay float32.
        precision = torch.autocast(x_ND.device.type, torch.bfloat16, enabled=x_ND.is_cuda and multiplies_bfloat16(x_ND.device))
        with precision:
            pre_NF = sae.pre(x_ND).float()
            features_NF = objective.activation(sae, pre_NF, cfg.l0)
            reconstruction_ND = active_product(features_NF, sae.W_dec_FD) + sae.b_dec_D if self.few_active() else sae.decode(features_NF)
        p = Pass(sae, x_ND, pre_NF, features_NF, x_ND - reconstruction_ND.float(), self.dead_F())
        mse = p.error_ND.square().sum(-1).mean()
        loss = mse + l1_coef * objective.penalty(p).mean() if objective.penalty else mse
        if objective.extra:
            with precision:
                loss = loss + objective.extra(p).mean()
        self.optimizer.zero_grad()
        loss.backward()
        if objective.unit_norm:
            remove_radial_gradient(sae)
        check_finite(f"sae, step {step}", self.optimizer, activation=x_ND, loss=loss)
        self.optimizer.step()
        if objective.unit_norm:
            normalize_decoder(sae)
        if sae.threshold_F is not None:
            sae.threshold_F.data.clamp_(min=0)
        fired_NF = features_NF.detach() > 0
        self.silent_F = torch.where(fired_NF.any(0), 0, self.silent_F + 1)
        l0 = fired_NF.sum().item() / len(x_ND)
        self.control(l0, done)
        return {"loss": loss.item(), "fvu": (mse / x_ND.var(0, correction=0).sum()).item(), "l0": l0, "l1_coef": l1_coef,
                "dead": self.dead_F().float().mean().item()}

    @torch.no_grad()
    def export(self, x_ND: Tensor) -> SAE:
        """-> the SAE in the model's own units, frozen, as RLHF uses it; its decoder refitted on unscaled rows where L1 and its like
        have shrunk the features."""
        sae = self.sae.unscaled(self.scale).requires_grad_(False)
        if self.objective.activation is gated:
            sae.fold_gate(sae.r_mag_F, sae.b_mag_F)
            del sae.r_mag_F, sae.b_mag_F
        if not self.objective.unit_norm:
            sae.rescale(sae.W_dec_FD.norm(dim=-1))
        if self.cfg.refit and self.objective.activation is relu:
            refit_decoder(sae, x_ND)
        return sae.requires_grad_(False)

    def few_active(self) -> bool:
        """-> whether so few features are active that `active_product` beats a matrix product (on a CPU, below 1/32, as measured).
        jumprelu's thresholds learn from features that are 0."""
        return (self.mean_l0 is not None and self.mean_l0 < self.sae.num_features / 32 and self.objective.activation is not jumprelu
                and not self.sae.W_dec_FD.is_cuda)

    def control(self, l0: float, done: float) -> None:
        """Move log l1_coef in proportion to log(L0 / target), clipped to ±1 (an integral controller). The target falls to the stated one
        geometrically, over a share of the run: features that are pressed to it at once die before they have learned a direction."""
        self.mean_l0 = l0 if self.mean_l0 is None else 0.9 * self.mean_l0 + 0.1 * l0
        if self.objective.penalty and self.cfg.l0 and done >= self.cfg.l1_warmup:
            start, left = self.sae.num_features / 2, max(0.0, 1 - done / max(self.cfg.l0_path, 1e-9))
            error = math.log(max(self.mean_l0, 1e-3) / self.cfg.l0) - left * math.log(start / self.cfg.l0)
            self.l1_coef *= math.exp(self.cfg.l0_rate * max(-1.0, min(1.0, error)))

    def dead_F(self) -> Tensor:
        """-> True for features that were silent over the stated window."""
        return self.silent_F >= max(1, int(self.cfg.dead_window * self.steps))

    def resample_due(self, step: int) -> bool:
        return self.objective.resample and step in {int(moment * self.steps) for moment in self.cfg.resample_at}

    def resample(self, x_ND: Tensor) -> int:
        """Give the dead features new directions, found among unscaled rows -> how many there were."""
        dead_F = self.dead_F()
        resample_dead(self.sae, self.optimizer, dead_F, x_ND.float() * self.scale, self.generator)
        self.silent_F[dead_F] = 0
        return int(dead_F.sum())

    def state_dict(self) -> dict:
        return {"sae": self.sae.state_dict(), "optimizer": self.optimizer.state_dict(), "scale": self.scale, "l1_coef": self.l1_coef,
                "mean_l0": self.mean_l0, "silent_F": self.silent_F}

    def load_state_dict(self, state: dict) -> None:
        self.sae.load_state_dict(state["sae"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scale, self.l1_coef, self.mean_l0 = state["scale"], state["l1_coef"], state["mean_l0"]
        self.silent_F = state["silent_F"].to(self.silent_F.device)


def remove_radial_gradient(sae: SAE) -> None:
    """Take from each decoder row's gradient the part along the row: the norm is fixed, Adam's moments should not see it."""
    row_FD, gradient_FD = sae.W_dec_FD.detach(), sae.W_dec_FD.grad
    gradient_FD -= (gradient_FD * row_FD).sum(-1, keepdim=True) * row_FD


@torch.no_grad()
def normalize_decoder(sae: SAE) -> None:
    """Bring each decoder row back to norm 1, after the step: before it, the step itself would change the norm again."""
    sae.W_dec_FD /= sae.W_dec_FD.norm(dim=-1, keepdim=True)


@torch.no_grad()
def resample_dead(sae: SAE, optimizer: torch.optim.Adam, dead_F: Tensor, x_ND: Tensor, generator: torch.Generator) -> None:
    """Neuron resampling of Bricken et al. 2023: point dead features at inputs that the SAE reconstructs badly.

    For each, an input is drawn with probability ∝ (its loss)². The decoder row becomes that input minus b_dec at norm 1, the encoder
    column the same direction at the mean norm of the alive columns, the bias 0, and Adam's moments of exactly these entries 0. All other
    entries keep every bit. The paper gives the columns 0.2 × that norm: the penalty then silenced 9 of 24 resampled features again before
    they had learned a direction, at the full norm none (planted rows, 8 killed in each of 3 runs).
    """
    num_dead = int(dead_F.sum())
    if not num_dead:
        return
    loss_N = torch.cat([(chunk - sae(chunk)).square().sum(-1) for chunk in x_ND.split(4096)])
    # Without replacement as long as the inputs last, so that no two features are born equal.
    drawn_G = torch.multinomial(loss_N.square().cpu(), num_dead, replacement=num_dead > len(loss_N), generator=generator)
    direction_GD = F.normalize(x_ND[drawn_G.to(x_ND.device)] - sae.b_dec_D, dim=-1)           # G: the dead features
    alive_norm = sae.W_enc_DF[:, ~dead_F].norm(dim=0).mean() if num_dead < len(dead_F) else 1.0
    sae.W_dec_FD[dead_F] = direction_GD
    sae.W_enc_DF[:, dead_F] = alive_norm * direction_GD.T
    sae.b_enc_F[dead_F] = 0
    for parameter, entries in ((sae.W_dec_FD, dead_F), (sae.W_enc_DF, (slice(None), dead_F)), (sae.b_enc_F, dead_F)):
        for moment in ("exp_avg", "exp_avg_sq"):
            if parameter in optimizer.state:
                optimizer.state[parameter][moment][entries] = 0


@torch.no_grad()
def refit_decoder(sae: SAE, x_ND: Tensor, ridge: float = 1e-3) -> None:
    """Undo the shrinkage of L1: with the features as they are, solve for the decoder and b_dec that reconstruct x_ND best.

    L1 teaches the encoder which features are active, and makes them too small. Least squares puts the size right (compare Wright and
    Sharkey 2024, who fine-tune): which features fire stays the same, and so does L0; rows keep norm 1, their scale goes into the encoder.
    """
    rows = len(x_ND)
    old_ED = torch.cat([sae.W_dec_FD, sae.b_dec_D[None]])                             # E: the features, and a constant whose vector is b_dec
    gram_EE, moment_ED = old_ED.new_zeros(len(old_ED), len(old_ED)), torch.zeros_like(old_ED)
    for chunk_ND in x_ND.split(8192):
        features_NE = F.pad(sae.encode(chunk_ND.float()), (0, 1), value=1.0)
        gram_EE.addmm_(features_NE.T, features_NE, alpha=1 / rows)                    # in place: with 32,768 features it is 4 GiB
        moment_ED.addmm_(features_NE.T, chunk_ND.float(), alpha=1 / rows)
    # The ridge pulls towards the old decoder, so that a feature that hardly fires stays as it is.
    penalty = ridge * gram_EE.diagonal().mean()
    gram_EE.diagonal().add_(penalty)
    W_dec_FD, b_dec_1D = torch.linalg.solve(gram_EE, moment_ED + penalty * old_ED).split([sae.num_features, 1])
    sae.b_enc_F += (b_dec_1D[0] - sae.b_dec_D) @ sae.W_enc_DF                         # the encoder sees what it saw before
    sae.b_dec_D.copy_(b_dec_1D[0])
    sae.W_dec_FD.copy_(W_dec_FD)
    sae.rescale(W_dec_FD.norm(dim=-1))


def train_sae(buffer: ActivationBuffer, cfg: SAEConfig, run: Run, generator: torch.Generator) -> SAE:
    """Train an SAE on the rows that a buffer draws -> the SAE in the rows' own units. `run` keeps the log and the resumable state."""
    d_in, device = buffer.rows_ND.shape[1], buffer.rows_ND.device
    scale = math.sqrt(d_in / buffer.rows_ND.float().square().sum(-1).mean().item())         # April 2024: E‖x‖² = D
    sae = SAE(d_in, cfg.num_features, generator, k=round(cfg.l0) if cfg.objective == "topk" else 0).to(device)
    with torch.no_grad():
        sae.b_dec_D.copy_(buffer.rows_ND.float().mean(0) * scale)            # the mean, where the paper has the geometric median
    trainer = SAETrainer(sae, scale, cfg, generator)
    parts = {"trainer": trainer, "buffer": buffer, "generator": generator}
    first, begun = run.restore(**parts), time.monotonic()
    bar = tqdm(range(first, trainer.steps), desc="sae", initial=first, total=trainer.steps, unit="tok", unit_scale=cfg.batch_size)
    for step in bar:
        figures = trainer.step(step, buffer.draw(cfg.batch_size))
        if due := trainer.resample_due(step):
            figures["resampled"] = trainer.resample(buffer.draw(min(cfg.resample_rows, len(buffer.rows_ND) // 2)))
        if step % 20 == 0 or step == trainer.steps - 1 or due:
            run.log(step=step, **figures)
            bar.set_postfix(fvu=f"{figures['fvu']:.3f}", l0=f"{figures['l0']:.1f}", dead=f"{figures['dead']:.3f}")
        run.checkpoint(step + 1, cfg.checkpoint_seconds, **parts)
    run.tokens_per_second = (trainer.steps - first) * cfg.batch_size / (time.monotonic() - begun)      # of this process, where resumed
    return trainer.export(buffer.rows_ND[buffer.shuffled_N[:cfg.refit_rows].to(device)])


# --------------------------------------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def evaluate_sae(model: Pythia, layer: int, sae: SAE, tokens_BT: Tensor) -> dict:
    """Figures on held-out windows of text; the first token of each window is no row and is never replaced (what is predicted there counts in ce_*).

    mse            mean over rows of ‖x − x̂‖², summed over D
    fvu            Σ ‖x − x̂‖² / Σ ‖x − x̄‖², fraction of variance unexplained; x̄ is one mean over all rows
    l0, l1         mean number of active features, and mean Σ f_i ‖d_i‖, a row
    shrinkage      mean of ‖x̂‖ / ‖x‖; 1: none
    dead_fraction  share of features silent on all `rows` rows, the window
    rare_fraction  share active on fewer than 1e-5 of them (of fewer than 100,000 rows: silent);  dense_fraction: on more than 1 %
    density        features by firing rate: 0, then up to 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1
    ce_*           mean next-token cross-entropy in nats: as the model is; with x̂, 0 or the mean in place of the MLP's output
    ce_recovered   (ce_zero − ce_sae) / (ce_zero − ce_base);  ce_recovered_mean: the same against mean-ablation
    """
    x_ND, norm_F = mlp_rows(model, layer, tokens_BT).float(), sae.W_dec_FD.norm(dim=-1)
    rows, mean_D = len(x_ND), x_ND.mean(0, dtype=torch.float64)
    fired_F, variance, error, l1, shrinkage = torch.zeros_like(norm_F, dtype=torch.float64), 0.0, 0.0, 0.0, 0.0
    for chunk_ND in x_ND.split(2048):
        features_NF = sae.encode(chunk_ND)
        guess_ND = sae.decode(features_NF)
        fired_F += (features_NF > 0).sum(0)
        variance += (chunk_ND - mean_D).square().sum().item()
        error += (chunk_ND - guess_ND).double().square().sum().item()
        l1 += (features_NF @ norm_F).double().sum().item()
        shrinkage += (guess_ND.norm(dim=-1) / chunk_ND.norm(dim=-1)).double().sum().item()
    rate_F = fired_F / rows
    decade_F = torch.bucketize(rate_F, torch.tensor([0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1], device=rate_F.device, dtype=rate_F.dtype))
    figures = {"mse": error / rows, "fvu": error / variance, "l0": rate_F.sum().item(), "l1": l1 / rows, "shrinkage": shrinkage / rows,
               "dead_fraction": (fired_F == 0).double().mean().item(), "rare_fraction": (rate_F < 1e-5).double().mean().item(),
               "dense_fraction": (rate_F > 0.01).double().mean().item(), "density": torch.bincount(decade_F, minlength=7).tolist(), "rows": rows}
    spliced = {"base": None, "sae": sae, "zero": torch.zeros_like, "mean": lambda mlp_BTD: mean_D.to(mlp_BTD.dtype).expand_as(mlp_BTD)}
    ce = {name: spliced_loss(model, layer, tokens_BT, replace) for name, replace in spliced.items()}
    return figures | {f"ce_{name}": value for name, value in ce.items()} | {
        "ce_recovered": (ce["zero"] - ce["sae"]) / (ce["zero"] - ce["base"]),
        "ce_recovered_mean": (ce["mean"] - ce["sae"]) / (ce["mean"] - ce["base"])}


def spliced_loss(model: Pythia, layer: int, tokens_BT: Tensor, replace: Callable[[Tensor], Tensor] | None) -> float:
    """-> mean next-token loss with replace(mlp_BTD) in place of the MLP's output at `layer`, first tokens excepted."""
    def edit(mlp_BTD: Tensor, neurons_BTM: Tensor) -> Tensor:
        change_BTD = replace(mlp_BTD.float()).to(mlp_BTD.dtype) - mlp_BTD
        change_BTD[:, 0] = 0
        return change_BTD

    total = 0.0
    for batch_BT in tokens_BT.split(16):
        batch_BT = batch_BT.long().to(model.device)
        logits_BTV = model(batch_BT, edits={layer: edit} if replace else None)[:, :-1]
        total += F.cross_entropy(logits_BTV.float().flatten(0, 1), batch_BT[:, 1:].flatten(), reduction="sum").item()
    return total / (len(tokens_BT) * (tokens_BT.shape[1] - 1))


@torch.no_grad()
def random_dictionary(like: SAE, generator: torch.Generator, x_ND: Tensor | None = None, l0: float = 0) -> SAE:
    """-> a control: as many random unit vectors as `like` has features; f_i is the projection of x − b_dec on vector i, where it is active. With
    l0, those are a token's round(l0) largest, at least one; with rows x_ND, float32, those above a threshold for each i, at least 0, set so
    that f_i is active on as many of these rows as `like`'s feature i, to within a row."""
    sae = SAE(*like.W_enc_DF.shape, generator, k=max(1, round(l0)) if x_ND is None else 0).to(like.W_dec_FD.device)
    sae.W_enc_DF.copy_(sae.W_dec_FD.T)
    sae.b_dec_D.copy_(like.b_dec_D)
    if x_ND is not None:
        active_F = torch.stack([(like.encode(chunk_ND) > 0).sum(0) for chunk_ND in x_ND.split(4096)]).sum(0)
        sae.threshold_F = nn.Parameter(torch.cat([
            ((x_ND - sae.b_dec_D) @ rows_GD.T).sort(0, descending=True).values.gather(0, active_G.clamp(max=len(x_ND) - 1)[None])[0]
            for rows_GD, active_G in zip(sae.W_dec_FD.split(1024), active_F.split(1024))]).clamp(min=0))       # G: of 1,024 features
    return sae.requires_grad_(False)


def mmcs(rows_FD: Tensor, others_GD: Tensor) -> float:
    """-> mean over the first dictionary's vectors of the largest cosine with any of the second's (mean max cosine similarity; Sharkey
    et al. 2022): 1 where each is found again, be it in another order. Not symmetric."""
    return (F.normalize(rows_FD, dim=-1) @ F.normalize(others_GD, dim=-1).T).max(1).values.mean().item()


# ------------------------------------------------------------------------------------------ loading, ours and other libraries'

def load_sae(path: str | Path, *, model: Pythia, model_name: str, layer: int, tokens_BT: Tensor | None = None) -> SAE:
    """Load what `SAE.save` or another library wrote (see `read_sae`), frozen.

    UserError where it was made for another model, layer, width, or site than the MLP's output; and, where windows of text are given, if it
    explains no variance of this layer's MLP output (looking at 16 of them): a file need not state its site.
    """
    file, description, tensors = read_sae(Path(path))
    with reading(file, f"with {description.name} no SAE of a known kind"):
        sae = assemble(file, description, tensors, model, model_name, layer)
    sae = sae.requires_grad_(False).to(model.device)
    if tokens_BT is not None and not (fvu := evaluate_sae(model, layer, sae, tokens_BT[:16])["fvu"]) < 1:
        raise UserError(f"{path}: wrong layer, site or scale: on the MLP output of layer {layer} it leaves {fvu:.3g} of the variance "
                        f"unexplained, and no SAE at all leaves 1")
    return sae


def assemble(file: Path, description: Path, tensors: dict[str, Tensor], model: Pythia, model_name: str, layer: int) -> SAE:
    """-> the SAE of what `read_sae` found, for this layer of this model."""
    cfg = read_json(description)
    k, subtracts = sae_options(file, cfg, tensors)
    if k is not None and not (type(k) is int and k > 0):
        raise ValueError(f"k is {k!r}")
    found = {RENAMED.get(name, name): value.T if name.endswith("coder.weight") else value for name, value in tensors.items()}
    d_in, num_features = found["W_enc"].shape
    about, width = cfg | cfg.get("metadata", {}) | cfg.get("trainer", {}), model.cfg.hidden_size
    site = stated_site(file, about)
    made_for, made_layer = str(about.get("model_name") or about.get("lm_name") or model_name), stated_layer(about, site, layer)
    if made_for.split("/")[-1] != model_name.split("/")[-1] or (made_layer, d_in) != (layer, width):
        raise UserError(f"{file}: this SAE was made for model {made_for}, layer {made_layer}, width {d_in}; "
                        f"here are model {model_name}, layer {layer}, width {width}: train another (--out)")
    if site and ("mlp" not in site or "mlp_in" in site):
        raise UserError(f"{file}: this SAE was made for {site}, but RLHF edits the MLP's output: take one of that (hook_mlp_out)")
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    wanted = {"W_enc": (d_in, num_features), "W_dec": (num_features, d_in), "b_dec": (d_in,)} | dict.fromkeys(
        ("b_enc", "threshold", "r_mag", "b_mag"), (num_features,))
    if any(wanted.get(name) != shape for name, shape in shapes.items()) or not {"W_dec", "b_enc", "b_dec"} <= set(shapes):
        raise ValueError(f"tensors are {shapes}, but of {wanted} the first four or more are wanted")
    sae = SAE(d_in, num_features, k=k or 0).requires_grad_(False)
    for name, suffix in (("W_enc", "DF"), ("W_dec", "FD"), ("b_enc", "F"), ("b_dec", "D")):
        sae.get_parameter(f"{name}_{suffix}").copy_(found[name])
    if "r_mag" in found:
        sae.fold_gate(found["r_mag"].float(), found["b_mag"].float())
    elif "threshold" in found:
        sae.threshold_F = nn.Parameter(found["threshold"].float().clamp(min=0))
    if not subtracts:                                # after the gate is folded, which gives b_enc its final value
        sae.b_enc_F += sae.b_dec_D @ sae.W_enc_DF
    if cfg.get("rescale_acts_by_decoder_norm"):
        sae.rescale(sae.W_dec_FD.norm(dim=-1))
    return sae


# Names in other libraries' files, where nn.Linear keeps its matrix the other way round, too.
RENAMED = {"encoder.weight": "W_enc", "decoder.weight": "W_dec", "encoder.bias": "b_enc", "bias": "b_dec", "decoder.bias": "b_dec",
           "decoder_bias": "b_dec", "gate_bias": "b_enc", "b_gate": "b_enc", "mag_bias": "b_mag"}


def read_sae(path: Path) -> tuple[Path, Path, dict[str, Tensor]]:
    """-> the file of the weights, the file that describes them, and the tensors as named there, for four kinds of files:

    SAELens (and ours)   a folder with sae_weights.safetensors, cfg.json
    sparsify             a folder with sae.safetensors, cfg.json
    dictionary_learning  a folder with ae.pt, config.json
    1L-Sparse-Autoencoder, naomi-laker/sparse-autoencoder    NAME.pt (the path to give), NAME_cfg.json beside it
    """
    kinds = {"sae_weights.safetensors": "cfg.json", "sae.safetensors": "cfg.json", "ae.pt": "config.json"}
    file = path if path.suffix == ".pt" else next((path / name for name in kinds if (path / name).exists()), None)
    if file is None:
        raise UserError(f"{path}: no such file as {', '.join(kinds)} in this folder: not an SAE of a known kind")
    tensors = load_state(file) if file.suffix == ".pt" else read_safetensors(file)
    if not isinstance(tensors, dict):
        raise UserError(f"{file}: holds no tensors by name: not an SAE of a known kind")
    return file, file.with_name(kinds.get(file.name, f"{file.stem}_cfg.json")), tensors.get("ae", tensors)     # "ae": in backups


def sae_options(file: Path, cfg: dict, tensors: dict[str, Tensor]) -> tuple[int | None, bool]:
    """-> k (None: no TopK; to be checked), and whether b_dec is taken from the input; `tensors` loses what is not one of the SAE's."""
    if file.name == "sae_weights.safetensors":
        if (cfg["d_in"], cfg["d_sae"]) != tuple(tensors["W_enc"].shape):
            raise ValueError(f"d_in {cfg['d_in']} and d_sae {cfg['d_sae']}, but W_enc is {tuple(tensors['W_enc'].shape)} there")
        if cfg.get("normalize_activations") not in (None, False, "none"):
            raise ValueError(f"normalize_activations {cfg['normalize_activations']!r}: fold it into the weights first")
        if (activation := cfg.get("activation_fn_str", "relu")) not in ("relu", "topk"):
            raise ValueError(f"activation_fn_str {activation!r} is not known here")
        k = (cfg.get("k") or cfg["activation_fn_kwargs"]["k"] or 0) if "topk" in (cfg.get("architecture"), cfg.get("activation_fn_str")) else None
        return k, cfg.get("apply_b_dec_to_input", True)
    if file.name == "sae.safetensors":
        if cfg.get("signed") or cfg.get("activation", "topk") != "topk":
            raise ValueError("only TopK of positive features is known here")
        return cfg["k"] or 0, not cfg.get("transcode")
    if file.name == "ae.pt":
        dict_class, k = cfg["trainer"]["dict_class"], tensors.pop("k", None)
        if dict_class == "AutoEncoderTopK":
            tensors.pop("threshold")                     # for another way to encode, which is not that class's default
            return int(k), True
        if "threshold" in tensors:
            width = len(tensors["encoder.bias" if "encoder.bias" in tensors else "b_enc"])
            tensors["threshold"] = tensors["threshold"].expand(width)                    # BatchTopK has one for all
        return None, dict_class != "JumpReluAutoEncoder" and "decoder.bias" not in tensors
    return None, True


def stated_site(file: Path, about: dict) -> str:
    """-> where in a model the description says that inputs were taken, or the folder's name (sparsify: layers.3.mlp); '' where neither does."""
    folder = file.parent.name if file.name == "sae.safetensors" and "layers." in file.parent.name else ""
    return str(next(filter(None, map(about.get, ("hook_name", "hook_point", "act_name", "submodule_name"))), folder))


def stated_layer(about: dict, site: str, otherwise: int) -> int:
    """-> the layer that the description or the site states; `otherwise` where neither does."""
    for key in ("hook_layer", "layer", "layers"):
        if about.get(key) is not None:
            return int(about[key][0] if isinstance(about[key], list) else about[key])
    number = re.search(r"(?:blocks|layers)\.(\d+)", site)
    return int(number[1]) if number else otherwise
