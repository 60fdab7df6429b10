"""Conditional steering."""

import torch

import policies
from policies import Edit
from torch import Tensor, nn
from sae import SAE


class GatedSteer(Edit):
    """m' = m + f_i(m) v: one vector, added where feature i fires, as strongly as it does (compare Lee et al. 2024, arXiv:2409.05907).

    v = 0 at the start."""

    def __init__(self, sae: SAE, feature: int):
        super().__init__()
        self.sae, self.feature = sae.requires_grad_(False), feature
        self.vector_D = nn.Parameter(torch.zeros_like(sae.b_dec_D))

    def encode(self, mlp_BTD: Tensor, neurons_BTM: Tensor) -> Tensor:
        """-> f_i, (B, T, 1). All features are computed, for TopK's sake: whether one is active may depend on the others."""
        return self.sae.encode(mlp_BTD.to(self.sae.W_dec_FD.dtype))[..., self.feature, None]

    def change(self, gate_BT1: Tensor) -> Tensor:
        return gate_BT1 * self.vector_D


def install(monkeypatch, steer=GatedSteer) -> None:
    monkeypatch.setattr(policies, "GatedSteer", steer, raising=False)


class Everywhere(GatedSteer):
    def change(self, gate_BT1: Tensor) -> Tensor:
        return torch.ones_like(gate_BT1) * self.vector_D


class OnOrOff(GatedSteer):
    def encode(self, mlp_BTD: Tensor, neurons_BTM: Tensor) -> Tensor:
        return (super().encode(mlp_BTD, neurons_BTM) > 0).to(self.vector_D.dtype)


class NoReLU(GatedSteer):
    def encode(self, mlp_BTD: Tensor, neurons_BTM: Tensor) -> Tensor:
        return self.sae.pre(mlp_BTD.to(self.sae.W_dec_FD.dtype))[..., self.feature, None]


class CachedTooMuch(GatedSteer):
    """v is in what PPO keeps: it would go on with the vector of the rollout."""
    def encode(self, mlp_BTD: Tensor, neurons_BTM: Tensor) -> Tensor:
        return super().encode(mlp_BTD, neurons_BTM) * self.vector_D.detach()

    def change(self, change_BTD: Tensor) -> Tensor:
        return change_BTD + 0 * self.vector_D


class NoDtype(GatedSteer):
    def encode(self, mlp_BTD: Tensor, neurons_BTM: Tensor) -> Tensor:
        return self.sae.encode(mlp_BTD)[..., self.feature, None]


class TrainsTheSAE(GatedSteer):
    def __init__(self, sae: SAE, feature: int):
        super().__init__(sae, feature)
        self.sae.requires_grad_(True)


class NotZero(GatedSteer):
    def __init__(self, sae: SAE, feature: int):
        super().__init__(sae, feature)
        self.vector_D = nn.Parameter(sae.W_dec_FD[feature].detach().clone())


WRONG = {wrong.__name__: lambda patch, wrong=wrong: install(patch, wrong)
         for wrong in (Everywhere, OnOrOff, NoReLU, CachedTooMuch, NoDtype, TrainsTheSAE, NotZero)}
