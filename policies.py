"""What RLHF learns: edits of an MLP's output (coefficients of SAE features, and controls), and the policies that train them or all weights.

Dimension key: B episodes   T tokens of prompt and response   R response tokens   D hidden size   M MLP neurons   F SAE features
               N rows (tokens, flattened)
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from files import UserError
from pythia import Pythia
from sae import SAE, active_product

# Coefficients of an SAE's features, or of random directions in their place: as many active a token, or each as often as a feature (see load_saes
# in train.py). --edit and --rlhf-keep are theirs.
FEATURES = ("coef", "random", "random_rates")
NEED_SAE = FEATURES                                  # policies for which SAEs are loaded
POLICIES = (*FEATURES, "neurons", "steer", "lora", "full")
LORA_TARGETS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")          # layers that may get an adapter
EDITS = ("scale", "scale+bias")


# ----------------------------------------------------------------------------------------------------------------- the edit

class Edit(nn.Module):
    """A change of one layer's MLP output, 0 at the start; its parameters are what RLHF learns. A kind of edit has

        encode(mlp_BTD, neurons_BTM) -> what the change needs to know of the tokens and does not depend on what is learned: a tensor, a named
            tuple of tensors, or None
        change(what encode gave) -> change_BTD, or what broadcasts to it, through which PPO's gradient reaches the parameters

    so that PPO can encode once a rollout. Parameters are named coef_…, bias_… or vector_…: learning rates and `ppo.keep_few` go by that.

    On a GPU both are captured in a CUDA graph while responses are sampled: there they may neither ask for a value (`.item()`) nor have shapes
    that depend on one, nor do anything else in Python that is to happen at every token.
    """

    def forward(self, mlp_BTD: Tensor, neurons_BTM: Tensor) -> Tensor:
        """-> change_BTD, which Pythia adds to the residual stream after its layer."""
        return self.change(self.encode(mlp_BTD, neurons_BTM)).to(mlp_BTD.dtype)


class FeatureScale(Edit):
    """m' = m + ((c − 1) ⊙ f(m)) W_dec: scale each SAE feature's output vector, pass the SAE's error through.

    With `bias`: m' = m + ((c − 1) ⊙ f(m) + b) W_dec, b an always-on push along each feature vector. coef_F = 1 and bias_F = 0
    at the start, where the change is exactly 0 and the policy is the reference. With `vector`: + v, one push for all, which `ppo.keep_few`
    turns into coefficients and biases of few features.
    """

    def __init__(self, sae: SAE, bias: bool = False, vector: bool = False):
        super().__init__()
        self.sae = sae.requires_grad_(False)
        self.coef_F = nn.Parameter(torch.ones_like(sae.b_enc_F))
        self.bias_F = nn.Parameter(torch.zeros_like(sae.b_enc_F)) if bias else None
        self.vector_D = nn.Parameter(torch.zeros_like(sae.b_dec_D)) if vector else None

    def encode(self, mlp_BTD: Tensor, neurons_BTM: Tensor) -> Tensor:
        """-> features_BTF."""
        return self.sae.encode(mlp_BTD.to(self.sae.W_dec_FD.dtype).contiguous())               # a slice of T would become B small products

    def change(self, features_BTF: Tensor) -> Tensor:
        """((c − 1) ⊙ f + b) W_dec + v -> change_BTD. Here PPO's gradient reaches c, by autograd: ∂loss/∂c_i = Σ over tokens of
        f_i · (d_i · ∂loss/∂change), d_i the feature's vector."""
        change_ND = active_product(features_BTF.flatten(0, 1), self.sae.W_dec_FD, self.coef_F - 1)
        if self.bias_F is not None:
            change_ND = change_ND + self.bias_F @ self.sae.W_dec_FD
        if self.vector_D is not None:
            change_ND = change_ND + self.vector_D
        return change_ND.view(*features_BTF.shape[:2], -1)

    def gradients(self, features_BTF: Tensor, gradient_BTD: Tensor) -> dict[str, Tensor]:
        """A gradient by the change -> that by coef_F, bias_F and vector_D, episode by episode, (B, …): for `ppo.keep_few` alone."""
        gradient_BTD = gradient_BTD.to(self.sae.W_dec_FD.dtype)
        along_BTF = gradient_BTD @ self.sae.W_dec_FD.T
        found = {"coef_F": (along_BTF * features_BTF).sum(1), "bias_F": along_BTF.sum(1), "vector_D": gradient_BTD.sum(1)}
        return {name: found[name] for name, _ in self.named_parameters(recurse=False)}


class NeuronScale(Edit):
    """A control: m' = m + ((c − 1) ⊙ n) W_out, one coefficient for each of the MLP's own neurons n; no dictionary was learned."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.W_out_DM = mlp.dense_4h_to_h.weight             # nn.Linear keeps it this way round
        self.coef_M = nn.Parameter(torch.ones(self.W_out_DM.shape[1], device=self.W_out_DM.device))

    def encode(self, mlp_BTD: Tensor, neurons_BTM: Tensor) -> Tensor:
        return neurons_BTM

    def change(self, neurons_BTM: Tensor) -> Tensor:
        return F.linear(((self.coef_M - 1) * neurons_BTM).to(self.W_out_DM.dtype), self.W_out_DM)


class Steer(Edit):
    """A control: m' = m + v, one vector added everywhere (activation addition; Turner et al. 2023, arXiv:2308.10248), v = 0 at the start."""

    def __init__(self, hidden_size: int, device: torch.device):
        super().__init__()
        self.vector_D = nn.Parameter(torch.zeros(hidden_size, device=device))

    def encode(self, mlp_BTD: Tensor, neurons_BTM: Tensor) -> None:
        return None

    def change(self, _: None) -> Tensor:
        return self.vector_D


# ----------------------------------------------------------------------------------------------------------------- policies

class Trunk(NamedTuple):
    """What of a rollout does not depend on what is learned, one row an episode (not the triple of Pythia.trunk, but what PPO makes of it);
    T without the last token, which predicts nothing."""
    ref_hidden_BRD: Tensor               # the reference's final hidden states at the positions that predict the response
    resid_BTD: Tensor | None = None      # after the lowest edited layer, without its edit
    features: Any = None                 # what that layer's edit has encoded: features_BTF, the MLP's neurons_BTM, …


class Policy:
    """What RLHF trains. Each kind of policy has

        model, edits                the Pythia that samples, and its edits (None without)
        reference                   the Pythia that it must stay near
        default_lr                  Adam's step, unless --rlhf-lr says another
        trainable() -> {name: p}    the learned numbers; start(name): what they were before anything was learned
        observe(tokens_BT, mask_BT, R, recorded) -> Trunk        what of a rollout does not depend on them
        hidden(tokens_BT, mask_BT, R, trunk) -> hidden_BRD       the policy's final hidden states at the positions that predict the response
    """

    def state_dict(self) -> dict[str, Tensor]:
        """-> the learned numbers by name, as views; `load_state_dict` copies such into them."""
        return {name: p.detach() for name, p in self.trainable().items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, p in self.trainable().items():
            p.copy_(state[name])

    @contextmanager
    def holding(self, numbers: dict[str, Tensor]) -> Iterator[None]:
        """Within it, the learned numbers are these."""
        before = {name: p.clone() for name, p in self.state_dict().items()}
        try:
            self.load_state_dict(numbers)
            yield
        finally:
            self.load_state_dict(before)

    def part_way(self, share: float) -> dict[str, Tensor]:
        """-> the learned numbers moved by only a share of the way that they have gone: start + share · (now − start), exactly `now` for 1."""
        return {name: torch.lerp(self.start(name), p, share) for name, p in self.state_dict().items()}

    def n_changed(self) -> int:
        """-> how many of the learned numbers are not exactly what they were."""
        return sum(int((p != self.start(name)).sum()) for name, p in self.state_dict().items())

    def learning_rates(self, lr: float, learns: dict[str, Tensor]) -> list[tuple[list[nn.Parameter], float]]:
        """-> parameters, and Adam's step for them; `learns` masks those of which only some learn.

        Adam moves each number by about lr a step. A coefficient acts only where its feature fires; a bias or a vector acts on every token, and
        their moves add up. To keep a step's push near lr with --edit scale+bias, a vector's numbers take lr/√D, and each of n biases
        lr/√(n + 2n²/πD), for that is the expected length of Σ ±d_i where one gradient chooses the signs. Coefficients beside them take lr/4:
        at lr, the noise of thousands of them would cost as much KL as all biases.
        """
        lr, D, found = lr or self.default_lr, self.model.cfg.hidden_size, []
        biased = any(".bias_" in name for name in self.trainable())
        for name, p in self.trainable().items():
            n = max(1, int(learns[name].sum()) if name in learns else p.numel())
            divisors = {"bias_F": math.sqrt(n + 2 / math.pi * n ** 2 / D), "vector_D": math.sqrt(D), "coef_F": 4.0} if biased else {}
            found.append(([p], lr / divisors.get(name.rpartition(".")[2], 1.0)))
        return found


class EditPolicy(Policy):
    """The frozen model with a learned edit at one layer or several. The reference is the same model without the edits.

    Nothing below the lowest edited layer depends on what is learned, nor do that layer's own attention, MLP and features. So a
    rollout's residual stream r = x + attn + mlp and features there are computed once (`observe`), and `hidden` runs only
    r + change and the layers above. Features of higher edited layers do depend on it and are computed anew, with gradient.
    """

    def __init__(self, model: Pythia, edits: dict[int, Edit], default_lr: float = 0.6):
        self.model = self.reference = model
        self.default_lr = default_lr
        self.edits = edits
        self.lowest = min(edits)
        self.initial = {name: p.detach().clone() for name, p in self.trainable().items()}

    def start(self, name: str) -> Tensor:
        return self.initial[name]

    def trainable(self) -> dict[str, nn.Parameter]:
        return {f"{layer}.{name}": p for layer, edit in self.edits.items() for name, p in edit.named_parameters() if p.requires_grad}

    def observe(self, tokens_BT: Tensor, mask_BT: Tensor, R: int, recorded: Sequence[Tensor] = ()) -> Trunk:
        """-> what of these episodes no learned number can change: computed once a rollout, whatever is updated later. The layers up to the
        lowest edited one have been run already where the episodes were sampled: `recorded` is what came of it."""
        resid_BTD, mlp_BTD, neurons_BTM = recorded or self.model.trunk(tokens_BT[:, :-1], self.lowest, mask_BT[:, :-1])
        ref_hidden_BRD = self.model.hidden_from(resid_BTD, self.lowest, mask_BT[:, :-1], last=R)
        return Trunk(ref_hidden_BRD, resid_BTD, self.edits[self.lowest].encode(mlp_BTD, neurons_BTM))

    def hidden(self, tokens_BT: Tensor, mask_BT: Tensor, R: int, trunk: Trunk) -> Tensor:
        edited_BTD = trunk.resid_BTD + self.edits[self.lowest].change(trunk.features).to(trunk.resid_BTD.dtype)
        return self.model.hidden_from(edited_BTD, self.lowest, mask_BT[:, :-1], self.edits, last=R)


class WeightPolicy(Policy):
    """Every weight of a copy of the model is trainable; the reference is the model. Nothing can be cached but the reference."""

    default_lr = 5e-5

    def __init__(self, model: Pythia):
        self.reference = model
        self.model = copy.deepcopy(model).requires_grad_(True)
        self.edits = None

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def observe(self, tokens_BT: Tensor, mask_BT: Tensor, R: int, recorded: Sequence[Tensor] = ()) -> Trunk:
        return Trunk(self.reference.hidden(tokens_BT[:, :-1], mask_BT[:, :-1], last=R))

    def hidden(self, tokens_BT: Tensor, mask_BT: Tensor, R: int, trunk: Trunk) -> Tensor:
        return self.model.hidden(tokens_BT[:, :-1], mask_BT[:, :-1], last=R)

    def start(self, name: str) -> Tensor:
        return self.reference.get_parameter(name)


class LoRA(nn.Module):
    """W x + b + (x A) B with W, b frozen: an update of low rank (Hu et al. 2021, arXiv:2106.09685, with α = rank). B is 0 at the start."""

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator):
        super().__init__()
        self.linear = linear
        D_in, D_out, device = linear.in_features, linear.out_features, linear.weight.device
        self.A_DK = nn.Parameter(torch.randn(D_in, rank, generator=generator).to(device) / D_in ** 0.5)         # K: rank
        self.B_KD = nn.Parameter(torch.zeros(rank, D_out, device=device))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """In float32, as the adapters are: in bfloat16 their small steps would be lost."""
        return self.linear(x_BTD) + (x_BTD.float() @ self.A_DK @ self.B_KD).to(x_BTD.dtype)


class LoRAPolicy(WeightPolicy):
    """Adapters on the linear layers named by `targets`; the reference is the same weights without them."""

    default_lr = 1e-3

    def __init__(self, model: Pythia, rank: int, targets: tuple[str, ...], generator: torch.Generator):
        self.reference, self.edits = model, None
        self.model = copy.deepcopy(model, memo={id(p): p for p in model.parameters()})      # other modules, the very same weights
        for part in [part for block in self.model.gpt_neox.layers for part in (block.attention, block.mlp)]:
            for name in sorted(set(targets) & dict(part.named_children()).keys()):
                setattr(part, name, LoRA(getattr(part, name), rank, generator))

    def start(self, name: str) -> Tensor:
        """0 for B; A, which changes nothing without B, counts as never moved."""
        now = self.trainable()[name].detach()
        return torch.zeros_like(now) if name.endswith("B_KD") else now


def check_policy(name: str, edit: str, cfg: Any) -> None:
    """UserError where there is no such policy, or it has no such edit. `cfg`: a ppo.PPOConfig."""
    for option, value, valid in (("--policy", name, POLICIES), ("--edit", edit, EDITS)):
        if value not in valid:
            raise UserError(f"{option} {value}: choose from {', '.join(valid)}")
    if name not in FEATURES and (cfg.keep or edit != "scale"):
        option = "--rlhf-keep" if cfg.keep else f"--edit {edit}"
        raise UserError(f"{option} is for coefficients of features: --policy {', '.join(FEATURES)}, not {name}")


def make_policy(name: str, model: Pythia, layers: list[int], saes: dict[int, SAE], cfg: Any, edit: str = "scale", seed: int = 0) -> Policy:
    """-> the policy of `--policy`, on `layers`; `saes` holds each one's SAE (`coef`) or the random dictionary in its place."""
    check_policy(name, edit, cfg)
    bias = edit == "scale+bias"
    if name == "full":
        if model.dtype == torch.float16:
            raise UserError("--policy full in float16: squares of small gradients are 0 there, so Adam's steps become hundreds of times too large; "
                            "take --dtype float32 or bfloat16")
        if model.dtype.itemsize < 4:
            print(f"--policy full trains {model.dtype} weights here, in which small steps are rounded away: take --dtype float32 where memory allows")
        return WeightPolicy(model)
    if name == "lora":
        return LoRAPolicy(model, cfg.lora_rank, cfg.lora_targets, torch.Generator().manual_seed(seed))
    if name == "neurons":
        return EditPolicy(model, {layer: NeuronScale(model.gpt_neox.layers[layer].mlp) for layer in layers})
    if name == "steer":
        return EditPolicy(model, {layer: Steer(model.cfg.hidden_size, model.device) for layer in layers}, default_lr=0.04)
    if name in FEATURES:
        return EditPolicy(model, {layer: FeatureScale(saes[layer], bias, vector=bias and cfg.keep > 0) for layer in layers})
    raise NotImplementedError(f"--policy {name} is in POLICIES, but make_policy does not know it")
