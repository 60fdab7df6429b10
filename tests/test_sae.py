"""sae.py against its formulas in numpy, and on autoencoders whose figures are known without measuring."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import NoRun, PlantedRows
from conftest import CONFIG, complaint, killed_and_resumed, random_model, random_tokens
from files import read_json, write_json
from pythia import read_safetensors, write_safetensors
from run import Run
from sae import (BANDWIDTH, OBJECTIVES, SAE, ActivationBuffer, Pass, SAEConfig, SAETrainer, active, auxk, evaluate_sae, gate_error,
                 jumprelu, load_sae, mlp_rows, mmcs, normalize_decoder, random_dictionary, read_sae, refit_decoder, remove_radial_gradient, resample_dead,
                 train_sae)

D, F, LAYER = CONFIG.hidden_size, 80, 2


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_sae(d_in: int = D, num_features: int = F, bias: float = -4.0) -> SAE:
    """An SAE whose parameters are all random, its features active now and then."""
    sae = SAE(d_in, num_features, seeded(1))
    with torch.no_grad():
        sae.W_enc_DF += 0.1 * torch.randn(d_in, num_features, generator=seeded(2))
        sae.b_enc_F += bias + torch.randn(num_features, generator=seeded(3))
        sae.b_dec_D += torch.randn(d_in, generator=seeded(4))
    return sae


def numpy_sae(sae: SAE, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """-> features and reconstruction, by the docstring's formula in float64."""
    W_enc, b_enc, W_dec, b_dec = (p.detach().double().numpy() for p in (sae.W_enc_DF, sae.b_enc_F, sae.W_dec_FD, sae.b_dec_D))
    features = np.maximum(0, (x.double().numpy() - b_dec) @ W_enc + b_enc)
    return features, features @ W_dec + b_dec


def trained_a_little(sae: SAE, steps: int = 3, **changes) -> tuple[SAETrainer, torch.Tensor]:
    """-> the trainer after some steps on random rows, so that Adam's moments are filled; and such rows."""
    cfg = SAEConfig(**{"batch_size": 64, "tokens": 6400, "l1_warmup": 0.1, **changes})
    trainer, x_ND = SAETrainer(sae, 0.5, cfg, seeded()), 4 * torch.randn(64, D, generator=seeded(5))
    for step in range(steps):
        trainer.step(step, x_ND)
    return trainer, x_ND


# ------------------------------------------------------------------------------------------------------- the SAE, its files

def test_encode_and_decode_equal_numpy():
    sae, x_BTD = random_sae(), 4 * torch.randn(3, 7, D, generator=seeded())
    features, reconstruction = numpy_sae(sae, x_BTD)
    assert 0.01 < (features > 0).mean() < 0.5
    np.testing.assert_allclose(sae.encode(x_BTD).detach(), features, atol=1e-4)
    np.testing.assert_allclose(sae(x_BTD).detach(), reconstruction, atol=1e-4)
    assert torch.equal(sae(x_BTD), sae.decode(sae.encode(x_BTD)))


def test_unscaled_gives_the_same_in_the_models_units():
    sae, x_ND = random_sae(), torch.randn(50, D, generator=seeded())
    plain = sae.unscaled(4.0)
    torch.testing.assert_close(plain.encode(x_ND), sae.encode(4.0 * x_ND) / 4.0, atol=1e-5, rtol=0)
    torch.testing.assert_close(plain(x_ND), sae(4.0 * x_ND) / 4.0, atol=1e-5, rtol=0)
    torch.testing.assert_close(plain.W_dec_FD.norm(dim=-1), torch.ones(F))
    assert sae.encode(4.0 * x_ND).count_nonzero() > 0


def test_files_round_trip_and_misuse_is_explained(tmp_path):
    sae, model = random_sae(), random_model()
    sae.save(tmp_path, model_name="tiny", layer=2, context=64)
    back = load_sae(tmp_path, model=model, model_name="tiny", layer=2)
    assert all(map(torch.equal, sae.state_dict().values(), back.state_dict().values()))
    assert not any(p.requires_grad for p in back.parameters())
    path, narrow = tmp_path / "sae_weights.safetensors", random_model(hidden_size=16, num_heads=2)
    weights, cfg = read_safetensors(path), json.loads((tmp_path / "cfg.json").read_text())
    assert set(weights) == {"W_enc", "b_enc", "W_dec", "b_dec"} and cfg["hook_name"] == "blocks.2.hook_mlp_out"
    assert "layer 2" in complaint(load_sae, tmp_path, model=model, model_name="tiny", layer=1)
    assert "model tiny" in complaint(load_sae, tmp_path, model=model, model_name="other", layer=2)
    assert "width 32" in complaint(load_sae, tmp_path, model=narrow, model_name="tiny", layer=2)
    assert "no such file" in complaint(load_sae, tmp_path / "none", model=model, model_name="tiny", layer=2)
    for broken in (weights | {"b_enc": weights["b_enc"][1:].clone()}, weights | {"W_dec": weights["W_enc"]},
                   {"W_enc": weights["W_enc"]}, weights | {"extra": weights["b_dec"]}):
        write_safetensors(path, broken)
        assert path.name in complaint(load_sae, tmp_path, model=model, model_name="tiny", layer=2)
    for broken in ({key: value for key, value in cfg.items() if key != "d_sae"}, [cfg]):
        write_json(tmp_path / "cfg.json", broken)
        assert "cfg.json" in complaint(load_sae, tmp_path, model=model, model_name="tiny", layer=2)


# ---------------------------------------------------------------------------------------------- other people's dictionaries

GOLDEN = Path(__file__).parent / "golden" / "sae"
PLACE = {"model_name": "EleutherAI/pythia-test", "layer": 1}


def small_model():
    """A model as wide as the golden SAEs."""
    return random_model(hidden_size=8, num_heads=2, intermediate_size=16)


@pytest.mark.parametrize("folder", sorted(path.parent.relative_to(GOLDEN) for path in GOLDEN.rglob("golden.safetensors")), ids=str)
def test_other_libraries_files_encode_as_those_libraries_do(folder):
    golden, model = read_safetensors(GOLDEN / folder / "golden.safetensors"), small_model()
    sae = load_sae(GOLDEN / folder, model=model, **PLACE)
    assert 0 < golden["features"].count_nonzero() < golden["features"].numel()
    torch.testing.assert_close(sae.encode(golden["x"]), golden["features"], atol=1e-5, rtol=0)
    torch.testing.assert_close(sae(golden["x"]), golden["reconstruction"], atol=1e-5, rtol=0)
    assert "layer 1" in complaint(load_sae, GOLDEN / folder, model=model, model_name=PLACE["model_name"], layer=2)
    if "sparsify" not in str(folder):                            # whose files do not name the model
        assert "pythia-test" in complaint(load_sae, GOLDEN / folder, model=model, model_name="EleutherAI/pythia-70m", layer=1)
    assert "width 8" in complaint(load_sae, GOLDEN / folder, model=random_model(), **PLACE)


@pytest.mark.parametrize("folder, key, site", [
    ("saelens-Standard", "hook_name", "blocks.1.hook_resid_post"), ("saelens-Standard", "hook_name", "blocks.1.hook_mlp_in"),
    ("dictionary_learning-AutoEncoder", "submodule_name", "resid_post_layer_1"), ("sparsify/layers.1.mlp", "", "layers.1"),
    ("saelens-Standard", "activation_fn_str", "tanh-relu")])
def test_saes_of_another_site_or_activation_are_refused(folder, key, site, tmp_path):
    copied = shutil.copytree(GOLDEN / folder, tmp_path / (site if not key else "sae"))
    path = next(copied.glob("c*f*g.json"))           # cfg.json, config.json
    cfg = read_json(path)
    for part in (cfg, cfg.get("metadata", {}), cfg.get("trainer", {})):
        part[key] = site
    write_json(path, cfg)
    assert site in complaint(load_sae, copied, model=small_model(), **PLACE)


def test_a_gated_sae_that_does_not_subtract_b_dec(tmp_path):
    """SAELens's formula, by hand: its own files in golden/ all subtract."""
    folder = shutil.copytree(GOLDEN / "saelens-Gated", tmp_path / "sae")
    write_json(folder / "cfg.json", read_json(folder / "cfg.json") | {"apply_b_dec_to_input": False})
    found, x_ND = read_safetensors(folder / "sae_weights.safetensors"), read_safetensors(folder / "golden.safetensors")["x"]
    gate_NF = x_ND @ found["W_enc"] + found["b_gate"] > 0
    wanted_NF = gate_NF * torch.relu(x_ND @ (found["W_enc"] * found["r_mag"].exp()) + found["b_mag"])
    assert 0 < wanted_NF.count_nonzero() < wanted_NF.numel()
    torch.testing.assert_close(load_sae(folder, model=small_model(), **PLACE).encode(x_ND), wanted_NF, atol=1e-5, rtol=0)


def test_single_pt_files_load(tmp_path):
    """1L-Sparse-Autoencoder's and naomi-laker's: NAME.pt and NAME_cfg.json."""
    sae, x_ND = random_sae(8, 24, bias=-1.0), torch.randn(20, 8, generator=seeded())
    weights = {name.rpartition("_")[0]: value.detach() for name, value in sae.named_parameters()}
    torch.save(weights, tmp_path / "5.pt")
    for cfg in ({"layer": 1, "act_name": "blocks.1.hook_mlp_out", "dict_size": 24}, {"model_name": "pythia-test", "layers": [1]}):
        write_json(tmp_path / "5_cfg.json", cfg)
        back = load_sae(tmp_path / "5.pt", model=small_model(), **PLACE)
        assert torch.equal(back.encode(x_ND), sae.encode(x_ND)) and torch.equal(back(x_ND), sae(x_ND))
        assert "layer 1" in complaint(load_sae, tmp_path / "5.pt", model=small_model(), model_name="pythia-test", layer=2)
    torch.save({"W_enc": weights["W_enc"]}, tmp_path / "5.pt")
    assert "5.pt" in complaint(load_sae, tmp_path / "5.pt", model=small_model(), **PLACE)
    for broken in ({**weights, "W_enc": [1.0]}, {**weights, "r_mag": torch.ones(24), "threshold": torch.ones(24)},
                   {name: value[..., :0] if name != "W_dec" else value[:0] for name, value in weights.items()}):
        torch.save(broken, tmp_path / "5.pt")
        assert "5.pt" in complaint(load_sae, tmp_path / "5.pt", model=small_model(), **PLACE)
    write_json(tmp_path / "5_cfg.json", {"layers": []})
    assert "5_cfg.json" in complaint(load_sae, tmp_path / "5.pt", model=small_model(), **PLACE)
    (tmp_path / "5_cfg.json").unlink()
    assert "5_cfg.json" in complaint(load_sae, tmp_path / "5.pt", model=small_model(), **PLACE)
    assert complaint(load_sae, tmp_path / "6.pt", model=small_model(), **PLACE).endswith("6.pt: no such file")


def test_what_cannot_be_loaded_faithfully_is_refused(tmp_path):
    sae, weights = random_sae(8, 24), tmp_path / "sae_weights.safetensors"
    sae.save(tmp_path, model_name="pythia-test", layer=1, context=64)
    cfg, tensors = json.loads((tmp_path / "cfg.json").read_text()), read_safetensors(weights)
    write_json(tmp_path / "cfg.json", cfg | {"normalize_activations": "layer_norm"})
    assert "layer_norm" in complaint(load_sae, tmp_path, model=small_model(), **PLACE)
    weights.unlink()
    write_safetensors(tmp_path / "sae.safetensors", {"encoder.weight": tensors["W_enc"].T.contiguous(), "encoder.bias": tensors["b_enc"],
                                                     "W_dec": tensors["W_dec"], "b_dec": tensors["b_dec"]})
    for changes, word in (({"k": 4, "signed": True}, "TopK"), ({"k": 4, "activation": "groupmax"}, "TopK"), ({}, "'k'"),
                          *(({"k": k}, "k is ") for k in ("4", 4.0, -1, True, 0, None))):
        write_json(tmp_path / "cfg.json", changes)
        assert word in complaint(load_sae, tmp_path, model=small_model(), **PLACE)
    write_json(tmp_path / "cfg.json", {"k": 4})
    assert load_sae(tmp_path, model=small_model(), **PLACE).k == 4


def test_sae_of_another_site_is_refused_by_its_fvu(tmp_path):
    model, tokens_BT = small_model(), random_tokens(8, 16)
    sae = SAE(8, 16)
    sae.W_dec_FD.data[:] = torch.cat([torch.eye(8), -torch.eye(8)])
    sae.W_enc_DF.data[:] = 0.9 * sae.W_dec_FD.T
    sae.save(tmp_path, model_name="pythia-test", layer=1, context=64)
    load_sae(tmp_path, model=model, tokens_BT=tokens_BT, **PLACE)
    for broken in (-1.0, 3.0, float("nan")):
        sae.W_enc_DF.data[:] = broken * sae.W_dec_FD.T
        sae.save(tmp_path, model_name="pythia-test", layer=1, context=64)
        assert "wrong layer, site or scale" in complaint(load_sae, tmp_path, model=model, tokens_BT=tokens_BT, **PLACE)


# ----------------------------------------------------------------------------------------------------------- training, in parts

def test_decoder_rows_keep_their_norm_and_adam_sees_no_radial_gradient():
    sae = random_sae()
    row_FD, gradient_FD = sae.W_dec_FD.detach().clone(), torch.randn(F, D, generator=seeded())
    sae.W_dec_FD.grad = gradient_FD.clone()
    remove_radial_gradient(sae)
    torch.testing.assert_close((sae.W_dec_FD.grad * row_FD).sum(-1), torch.zeros(F), atol=1e-5, rtol=0)
    removed_FD = gradient_FD - sae.W_dec_FD.grad
    torch.testing.assert_close(removed_FD, (removed_FD * row_FD).sum(-1, keepdim=True) * row_FD, atol=1e-5, rtol=0)
    sae.W_dec_FD.data *= 3
    normalize_decoder(sae)
    torch.testing.assert_close(sae.W_dec_FD.detach(), row_FD)
    trainer, _ = trained_a_little(sae, steps=1)
    moment_FD = trainer.optimizer.state[sae.W_dec_FD]["exp_avg"]
    assert moment_FD.abs().max() > 1e-3 and (moment_FD * row_FD).sum(-1).abs().max() < 1e-5
    assert not torch.equal(sae.W_dec_FD, row_FD)
    torch.testing.assert_close(sae.W_dec_FD.norm(dim=-1), torch.ones(F))


def test_step_reports_the_loss_of_its_docstring():
    sae = random_sae()
    trainer, x_ND = trained_a_little(sae, steps=0, l1_coef=2.0, l0=0)        # 100 steps; l1_coef rises over the first 10
    for step, l1_coef in ((0, 0.0), (5, 1.0), (50, 2.0)):
        features, reconstruction = numpy_sae(sae, x_ND * 0.5)
        error = ((x_ND.numpy() * 0.5 - reconstruction) ** 2).sum(-1).mean()
        want = {"loss": error + l1_coef * features.sum(-1).mean(), "fvu": error / (x_ND.numpy() * 0.5).var(0).sum(),
                "l0": (features > 0).sum(-1).mean(), "l1_coef": l1_coef}
        figures = trainer.step(step, x_ND)
        assert {key: figures[key] for key in want} == pytest.approx(want, rel=1e-4)
    assert trainer.l1_coef == 2.0                                # no target: it stays


def test_controller_moves_l1_coef_towards_the_l0_target():
    for l0, direction in ((60.0, 1), (31.0, 1), (30.0, 0), (29.0, -1), (2.0, -1)):
        trainer, _ = trained_a_little(random_sae(), steps=0, l0=30.0, l0_rate=0.02)
        trainer.control(l0, done=0.05)
        assert trainer.l1_coef == 1.0                            # not yet: l1_coef is still in its warm-up
        for _ in range(5):
            trainer.control(l0, done=0.5)
        assert np.sign(trainer.l1_coef - 1) == direction and abs(np.log(trainer.l1_coef)) <= 5 * 0.02 + 1e-9
    for l0, direction in ((20.1, 1), (20.0, 0), (19.9, -1)):     # half way from F/2 = 40 to 10, geometrically
        trainer, _ = trained_a_little(random_sae(), steps=0, l0=10.0, l0_path=0.4)
        trainer.control(l0, done=0.2)
        assert np.sign(round(np.log(trainer.l1_coef), 9)) == direction


def test_dead_means_silent_over_the_window():
    sae = random_sae()
    sae.b_enc_F.data[:7] = -1e4
    trainer, _ = trained_a_little(sae, steps=5, dead_window=0.06)              # 6 of 100 steps
    assert not trainer.dead_F().any()
    trainer, _ = trained_a_little(sae, steps=6, dead_window=0.06)
    assert trainer.dead_F()[:7].all() and not trainer.dead_F().all()
    resumed, _ = trained_a_little(random_sae(), steps=1, dead_window=0.06)
    resumed.load_state_dict(trainer.state_dict())
    assert torch.equal(resumed.silent_F, trainer.silent_F)
    dead = int(trainer.dead_F().sum())
    assert trainer.resample(torch.randn(200, D)) == dead and not trainer.dead_F().any()


def test_resampling_changes_exactly_the_dead_features():
    sae = random_sae()
    trainer, x_ND = trained_a_little(sae)
    optimizer, dead_F = trainer.optimizer, torch.zeros(F, dtype=torch.bool)

    def everything() -> dict[str, torch.Tensor]:
        """-> copies of all weights (" 0") and moments (" 1", " 2"), features first."""
        tensors = {f"{name} {i}": tensor for name, p in sae.named_parameters()
                   for i, tensor in enumerate((p.detach(), optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]))}
        return {name: (tensor.T if name.startswith("W_enc") else tensor).clone() for name, tensor in tensors.items()}

    before = everything()
    resample_dead(sae, optimizer, dead_F, x_ND, seeded())
    assert all(map(torch.equal, before.values(), everything().values()))       # none was dead
    dead_F[[3, 17, 60]] = True
    resample_dead(sae, optimizer, dead_F, x_ND, seeded())
    after = everything()
    for name, value in after.items():
        kept = slice(None) if name.startswith("b_dec") else ~dead_F
        assert torch.equal(value[kept], before[name][kept])
        if name[-1] in "12" and not name.startswith("b_dec"):
            assert value[dead_F].eq(0).all() and (before[name] != 0).any()
    row_GD, column_GD = after["W_dec_FD 0"][dead_F], after["W_enc_DF 0"][dead_F]
    cosine_GN = torch.nn.functional.normalize(x_ND - sae.b_dec_D.detach(), dim=-1) @ row_GD.T
    torch.testing.assert_close(cosine_GN.max(0).values, torch.ones(3), atol=1e-5, rtol=0)
    assert len(set(cosine_GN.argmax(0).tolist())) == 3           # three inputs, no two features alike
    norm = before["W_enc_DF 0"][~dead_F].norm(dim=-1).mean()
    torch.testing.assert_close(column_GD, norm * row_GD)
    torch.testing.assert_close(row_GD.norm(dim=-1), torch.ones(3))
    assert after["b_enc_F 0"][dead_F].eq(0).all()


def test_resampling_draws_in_proportion_to_the_squared_loss():
    sae, dead_F, generator = SAE(2, 3), torch.tensor([True, False, False]), seeded()
    sae.W_dec_FD.data[:] = torch.tensor([0.0, 1.0])
    sae.b_enc_F.data[:] = -1e4                                   # so that the loss of x is ‖x‖²
    optimizer = torch.optim.Adam(sae.parameters())

    def drawn(*x) -> bool:
        """Was the first row chosen, not the second?"""
        resample_dead(sae, optimizer, dead_F, torch.tensor(x), generator)
        sae.b_enc_F.data[0] = -1e4
        return sae.W_dec_FD[0, 0].item() == 1.0

    assert all(drawn([100.0, 0.0], [0.0, 1.0]) for _ in range(20))
    share = sum(drawn([2 ** 0.5, 0.0], [0.0, 1.0]) for _ in range(600)) / 600
    assert abs(share - 0.8) < 0.06                               # losses 2 and 1: 4 of 5 (3 standard errors: 0.05)


# --------------------------------------------------------------------------------------------------------------- objectives

def objective_trainer(name: str, **changes) -> tuple[SAETrainer, torch.Tensor]:
    """-> a trainer whose every parameter is random, 10 features of each token wanted, 7 of them dead; and rows."""
    sae = random_sae()
    sae.k = 10 if name == "topk" else 0
    trainer, x_ND = trained_a_little(sae, steps=0, **{"objective": name, "l0": 10.0, "l1_coef": 0.7, **changes})
    for vector in OBJECTIVES[name].vectors:
        sae.get_parameter(vector).data += 0.5 * torch.rand(F, generator=seeded(6))
    if not OBJECTIVES[name].unit_norm:
        sae.W_dec_FD.data *= 0.5 + torch.rand(F, 1, generator=seeded(7))
    trainer.silent_F[:7] = 1000
    return trainer, x_ND


def numpy_loss(trainer: SAETrainer, x_ND: torch.Tensor) -> tuple[float, np.ndarray]:
    """-> loss and features of the trainer's objective on scaled rows, each formula written out once more, in float64."""
    p = {name: value.detach().double().numpy() for name, value in trainer.sae.named_parameters()}
    x, k = x_ND.double().numpy(), 10
    z = (x - p["b_dec_D"]) @ p["W_enc_DF"] + p["b_enc_F"]
    f, norm, dead, extra = np.maximum(z, 0), np.linalg.norm(p["W_dec_FD"], axis=1), trainer.dead_F().numpy(), 0.0
    name = trainer.cfg.objective
    if name == "topk":
        f = np.where(f >= np.sort(f, axis=1)[:, -k, None], f, 0)
    if name == "batchtopk":
        f = np.where(f >= np.sort(f.flatten())[-k * len(f)], f, 0)
    if name == "jumprelu":
        f = np.where(z > p["threshold_F"], z, 0)
    if name == "gated":
        inner = (x - p["b_dec_D"]) @ p["W_enc_DF"]
        f = np.where(z > 0, np.maximum(0, np.exp(p["r_mag_F"]) * inner + p["b_mag_F"]), 0)
        extra = ((x - np.maximum(z, 0) @ p["W_dec_FD"] - p["b_dec_D"]) ** 2).sum(1)
    e = x - f @ p["W_dec_FD"] - p["b_dec_D"]
    if name in ("topk", "batchtopk"):
        g = np.maximum(z, 0) * dead
        g = np.where(g >= np.sort(g, axis=1)[:, -D // 2, None], g, 0)
        extra = ((e - g @ p["W_dec_FD"]) ** 2).sum(1) / 32
    with np.errstate(invalid="ignore"):
        formulas = {"topk": 0.0, "batchtopk": 0.0, "l1": f.sum(1), "l1_decnorm": (f * norm).sum(1), "log": np.log(1 + 100 * f ** 2).sum(1),
                    "tanh": np.tanh(f).sum(1), "sqrt": (np.sqrt(f + 0.01) - 0.1).sum(1), "hoyer": np.nan_to_num(f.sum(1) ** 2 / (f ** 2).sum(1)),
                    "jumprelu": (f > 0).sum(1), "gated": np.maximum(z, 0).sum(1)}
    if name not in formulas:
        pytest.skip(f"{name}: write its formula into numpy_loss to have it checked")
    return np.mean((e ** 2).sum(1) + 0.7 * formulas[name] + extra), f


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_equals_its_formula_in_numpy_and_reaches_every_parameter(name):
    trainer, x_ND = objective_trainer(name)
    loss, features = numpy_loss(trainer, 0.5 * x_ND)
    before = {key: value.detach().clone() for key, value in trainer.sae.named_parameters()}
    figures = trainer.step(50, x_ND)
    assert figures["loss"] == pytest.approx(loss, rel=1e-4) and figures["l0"] == pytest.approx((features > 0).sum(1).mean(), rel=1e-3)
    for key, value in trainer.sae.named_parameters():
        assert value.isfinite().all() and not torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", OBJECTIVES)
def test_work_for_the_active_features_alone_gives_the_same_gradients(name):
    gradients = []
    for sparse in (True, False):
        trainer, x_ND = objective_trainer(name)
        trainer.mean_l0 = F / 40 if sparse else F / 4
        assert trainer.few_active() == (sparse and name != "jumprelu")
        trainer.step(50, x_ND)
        gradients.append({key: value.grad for key, value in trainer.sae.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) >= 4
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-4, atol=1e-5 * gradient.abs().max().item(), msg=key)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_finished_sae_encodes_as_in_training_and_round_trips(name, tmp_path):
    """In the model's units, rows of norm 1, a file that loads; batchtopk by its threshold: no token depends on its batch."""
    trainer, x_ND = objective_trainer(name, refit=False)
    sae, scaled_ND = trainer.export(x_ND), 0.5 * x_ND
    trained = OBJECTIVES[name].activation(trainer.sae, trainer.sae.pre(scaled_ND), 10.0).detach()
    if name == "batchtopk":
        trained = (pre := trainer.sae.pre(scaled_ND).relu().detach()) * (pre > 0.5 * sae.threshold_F)
    if name == "l1_decnorm":
        trained = trained * trainer.sae.W_dec_FD.norm(dim=-1)
    assert (trained > 0).any() and (trained > 0).float().mean() < 0.5
    torch.testing.assert_close(sae.encode(x_ND), trained / 0.5, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sae.W_dec_FD.norm(dim=-1), torch.ones(F))
    torch.testing.assert_close(sae.encode(x_ND[5:6]), sae.encode(x_ND)[5:6], atol=1e-5, rtol=0)
    sae.save(tmp_path, model_name="tiny", layer=2, context=64)
    back = load_sae(tmp_path, model=random_model(), model_name="tiny", layer=2)
    assert torch.equal(back.encode(x_ND), sae.encode(x_ND)) and torch.equal(back(x_ND), sae(x_ND))
    kind = {"topk": "topk", "batchtopk": "jumprelu", "jumprelu": "jumprelu", "gated": "jumprelu"}.get(name, "standard")
    assert json.loads((tmp_path / "cfg.json").read_text())["architecture"] == kind


def test_a_pickle_without_names_is_told(tmp_path):
    torch.save([1, 2], tmp_path / "ae.pt")
    assert "no tensors by name" in complaint(read_sae, tmp_path)


def test_penalties_bear_rows_without_features():
    for name, objective in OBJECTIVES.items():
        if name not in ("jumprelu", "gated") and objective.penalty:
            features_NF = torch.tensor([[0.0, 0.0], [1.0, 0.0]], requires_grad=True)
            penalty_N = objective.penalty(Pass(SAE(3, 2), None, None, features_NF, None, None))
            penalty_N.sum().backward()
            assert features_NF.grad.isfinite().all() and abs(penalty_N[0]) < 1e-6 and penalty_N[1] >= 0.5, name


def test_scale_cannot_escape_a_penalty():
    """Features halved and decoder rows doubled: the penalty of an objective that frees the rows stays; the others hold them at norm 1."""
    trainer, x_ND = objective_trainer("l1_decnorm")
    before, _ = numpy_loss(trainer, x_ND)
    trainer.sae.rescale(torch.full((F,), 0.5))
    assert numpy_loss(trainer, x_ND)[0] == pytest.approx(before)
    for name in OBJECTIVES:
        trainer, x_ND = objective_trainer(name)
        trainer.step(50, x_ND)
        norm_F = trainer.sae.W_dec_FD.detach().norm(dim=-1)
        assert torch.allclose(norm_F, torch.ones(F)) == (name != "l1_decnorm")


def test_batchtopk_keeps_the_largest_of_the_batch_and_nothing_negative():
    sae, z_NF = SAE(4, 6), torch.randn(8, 6, generator=seeded())
    sae.threshold_F = torch.nn.Parameter(torch.zeros(6))
    largest = z_NF.flatten().sort(descending=True).values
    assert torch.equal(OBJECTIVES["batchtopk"].activation(sae, z_NF, 1.5), torch.where(z_NF >= largest[11], z_NF, 0.0))          # 12 of 48
    assert torch.equal(OBJECTIVES["batchtopk"].activation(sae, z_NF, 6.0), z_NF.relu())


def test_straight_through_gradients_equal_the_papers():
    """Of Σ w f + v ‖f‖₀, by θ and by z; and as a mean over many z they are the slopes of smooth expectations."""
    sae, generator = SAE(4, 3), seeded()
    sae.threshold_F = torch.nn.Parameter(torch.tensor([0.5, 1.0, 2.0]))
    z_NF, w_NF = 6 * torch.rand(50, 3, generator=generator) - 2, torch.randn(50, 3, generator=generator)
    z_NF.requires_grad_()
    features_NF = jumprelu(sae, z_NF, 0)
    ((w_NF * features_NF).sum() + 0.3 * active(Pass(sae, None, z_NF, features_NF, None, None)).sum()).backward()
    z, w, theta = z_NF.detach().numpy(), w_NF.numpy(), np.array([0.5, 1.0, 2.0])
    window = np.abs(z - theta) < BANDWIDTH / 2
    np.testing.assert_allclose(sae.threshold_F.grad, (-(w * theta + 0.3) / BANDWIDTH * window).sum(0), rtol=1e-4)
    np.testing.assert_allclose(z_NF.grad, w * (z > theta), rtol=1e-5)
    assert window.any(0).all() and not window.all()
    sae.threshold_F.grad = None
    grid_NF = torch.linspace(-1, 4, 50_001)[:, None].expand(-1, 3)                      # z uniform: density 1/5
    (jumprelu(sae, grid_NF, 0).sum(-1) + active(Pass(sae, None, grid_NF, None, None, None))).mean().backward()

    def expectation(theta):
        """E f + E ‖f‖₀ of one feature."""
        return (16 - theta ** 2) / 10 + (4 - theta) / 5

    np.testing.assert_allclose(sae.threshold_F.grad, (expectation(theta + 1e-4) - expectation(theta - 1e-4)) / 2e-4, rtol=1e-2)


def test_what_extra_losses_hold_fixed():
    """AuxK teaches dead features only, Gated's second reconstruction leaves the decoder alone."""
    for name, function in (("topk", auxk), ("gated", gate_error)):
        trainer, x_ND = objective_trainer(name)
        sae, dead_F = trainer.sae, trainer.dead_F()
        pre_NF = sae.pre(x_ND)
        features_NF = OBJECTIVES[name].activation(sae, pre_NF, 10.0)
        p = Pass(sae, x_ND, pre_NF, features_NF, x_ND - sae.decode(features_NF), dead_F)
        function(p).mean().backward()
        assert (sae.W_enc_DF.grad != 0).any()
        if name == "gated":
            assert sae.W_dec_FD.grad is None
        else:
            for gradient_F in (sae.W_dec_FD.grad.abs().sum(1), sae.W_enc_DF.grad.abs().sum(0)):
                assert gradient_F[dead_F].max() > 0 and gradient_F[~dead_F].eq(0).all()
            assert auxk(p._replace(dead_F=torch.zeros(F, dtype=torch.bool))).sub(p.error_ND.square().sum(-1) / 32).abs().max() < 1e-4


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_reaches_its_l0_target(name):
    generator = seeded()
    rows = PlantedRows(4096, generator, directions=48, d_in=24, active=3)
    cfg = SAEConfig(num_features=48, objective=name, l0=4.0, tokens=64 * 700, batch_size=64, lr=5e-3, resample_rows=512,
                    **({"l0_rate": 0.01, "l1_coef": 0.1} if name == "jumprelu" else {"l0_rate": 0.02}))
    sae = train_sae(rows, cfg, run := NoRun(), generator)
    l0, x_ND = (sae.encode(rows.rows_ND) > 0).sum().item() / 4096, rows.rows_ND
    steered = len({line["l1_coef"] for line in run.lines if line["step"] > 100}) > 1
    assert steered == (OBJECTIVES[name].penalty is not None)
    assert l0 == pytest.approx(4.0, rel=0.2) and (x_ND - sae(x_ND)).square().sum() < 0.5 * (x_ND - x_ND.mean(0)).square().sum()


@pytest.mark.parametrize("name", ["l1", "topk"])
def test_planted_features_are_found(name):
    generator = seeded()
    rows = PlantedRows(16_384, generator, directions=32, d_in=32, active=2)
    cfg = SAEConfig(num_features=32, objective=name, l0=2.0, tokens=128 * 800, batch_size=128, lr=1e-2, resample_rows=1024)
    sae = train_sae(rows, cfg, NoRun(), generator)
    assert mmcs(rows.directions_GD, sae.W_dec_FD) > 0.9
    assert (sae.encode(rows.rows_ND) > 0).any(0).float().mean() > 0.95


@pytest.mark.parametrize("resample", [True, False])
def test_resampling_revives_features_made_dead_on_purpose(resample):
    generator = seeded()
    rows = PlantedRows(16_384, generator, directions=32, d_in=32, active=2)
    cfg = SAEConfig(num_features=32, l0=2.0, tokens=128 * 800, batch_size=128, lr=5e-3, resample_at=(0.5, 0.7), dead_window=0.1)
    trainer, dead = SAETrainer(SAE(32, 32, generator), 4.0, cfg, generator), []
    for step in range(800):
        trainer.step(step, rows.draw(128))
        if step == 300:
            trainer.sae.b_enc_F.data[:8] = -1e4                  # silent from now on, whatever the optimizer does
        if trainer.resample_due(step) and resample:
            dead.append(trainer.resample(rows.draw(1024)))
    sae = trainer.export(rows.rows_ND)
    alive_F, found = (sae.encode(rows.rows_ND) > 0).any(0), mmcs(rows.directions_GD, sae.W_dec_FD)
    assert alive_F[8:].all() and alive_F[:8].all() == alive_F[:8].any() == resample
    assert dead == [8, 0] and found > 0.9 if resample else found < 0.9, (dead, found)


def test_biases_keep_up_with_the_penalty():
    """A step of a bias or threshold is √D times a weight's, where a penalty presses on them; TopK's is not: its features would die."""
    for name, objective in OBJECTIVES.items():
        trainer, x_ND = objective_trainer(name)
        before = {key: value.detach().clone() for key, value in trainer.sae.named_parameters()}
        trainer.step(50, x_ND)                                   # Adam's first step is of size lr
        moved = {key: (value.detach() - before[key]).abs().max().item() for key, value in trainer.sae.named_parameters()}
        for key in {"b_enc_F", "b_mag_F", "threshold_F"} & set(moved) - ({"threshold_F"} if name == "batchtopk" else set()):
            assert moved[key] / moved["W_enc_DF"] == pytest.approx(D ** 0.5 if objective.penalty else 1, rel=0.05), (name, key)


@pytest.mark.parametrize("name", ["l1", "batchtopk", "gated"])
def test_training_resumes_to_the_same_bits(name, tmp_path):
    model, tokens_BT, draws = random_model(), random_tokens(40, 16), []
    cfg = SAEConfig(num_features=64, objective=name, l0=8, tokens=64 * 40, batch_size=64, buffer_rows=300, resample_rows=100,
                    resample_at=(0.5,), dead_window=0.01, checkpoint_seconds=0)

    def train(run):
        generator = seeded()
        buffer = ActivationBuffer(model, LAYER, tokens_BT, cfg, generator)
        draw = buffer.draw
        buffer.draw = lambda rows: draws.append(rows) or draw(rows)
        return train_sae(buffer, cfg, run, generator)

    sae = train(Run(tmp_path / "a", {}, resume=False))
    assert draws.count(64) == 40 and draws.count(100) == OBJECTIVES[name].resample
    resumed, run = killed_and_resumed(tmp_path / "b", 25, train)
    assert all(map(torch.equal, sae.state_dict().values(), resumed.state_dict().values()))
    assert run.rows()[-1]["step"] == 39


# --------------------------------------------------------------------------------------------------------------- the buffer

def matched(buffer_rows_ND: torch.Tensor, model, tokens_BT) -> list[int]:
    """-> which row of the whole text each given row is; every one must be one of them."""
    distance_NN = torch.cdist(buffer_rows_ND, mlp_rows(model, LAYER, tokens_BT), compute_mode="donot_use_mm_for_euclid_dist")
    assert distance_NN.min(1).values.max() < 1e-9
    return distance_NN.argmin(1).tolist()


def test_buffer_that_holds_all_draws_each_row_once_a_pass():
    model, tokens_BT = random_model(torch.float64), random_tokens(20, 10).int()
    whole_BTD = model.mlp_output(tokens_BT.long(), LAYER)
    assert torch.equal(mlp_rows(model, LAYER, tokens_BT), whole_BTD[:, 1:].reshape(-1, D))
    buffer = ActivationBuffer(model, LAYER, tokens_BT, SAEConfig(batch_size=30, buffer_rows=180), seeded())
    passes = [matched(torch.cat([buffer.draw(30) for _ in range(6)]), model, tokens_BT) for _ in range(2)]
    assert buffer.holds_all and sorted(passes[0]) == sorted(passes[1]) == list(range(180)) and passes[0] != passes[1]


def test_small_buffer_is_refilled_and_resumes():
    model, tokens_BT, cfg = random_model(torch.float64), random_tokens(40, 10), SAEConfig(batch_size=20, buffer_rows=100)
    buffer = ActivationBuffer(model, LAYER, tokens_BT, cfg, seeded())
    assert not buffer.holds_all and buffer.rows_ND.shape == (100, D)        # windows of 9 rows, the last one cut
    batches = [matched(buffer.draw(20), model, tokens_BT) for _ in range(120)]
    assert all(len(set(rows)) == 20 for rows in batches[:9])     # no row twice before the text has been through
    counts = np.bincount(sum(batches, []), minlength=360)
    assert counts.min() > 0 and counts.max() < 25                # 6.7 on average
    other = ActivationBuffer(model, LAYER, tokens_BT, cfg, seeded(9))
    other.load_state_dict({key: value.clone() if torch.is_tensor(value) else value for key, value in buffer.state_dict().items()})
    other.generator.set_state(buffer.generator.get_state())
    assert all(torch.equal(buffer.draw(20), other.draw(20)) for _ in range(20))


@pytest.mark.parametrize("context", [10, 100])
def test_smallest_buffer_that_the_config_allows(context):
    """Two batches, which whole windows do not fill."""
    model, cfg = random_model(max_positions=128), SAEConfig(batch_size=32, buffer_rows=64)
    buffer = ActivationBuffer(model, LAYER, random_tokens(12, context), cfg, seeded())
    assert all(buffer.draw(32).shape == (32, D) for _ in range(8))


# ---------------------------------------------------------------------------------------------------- training as a whole

def test_training_explains_variance_with_the_same_bits_also_when_killed_and_resumed(tmp_path):
    model, tokens_BT = random_model(), random_tokens(40, 16)
    cfg = SAEConfig(num_features=64, l0=8, l1_coef=0.5, l0_rate=0.02, tokens=64 * 120, batch_size=64, buffer_rows=300, lr=5e-3,
                    resample_rows=100, resample_at=(0.4, 0.84), dead_window=0.01, checkpoint_seconds=0)

    def train(run):
        return train_sae(ActivationBuffer(model, LAYER, tokens_BT, cfg, g := seeded()), cfg, run, g)

    run = Run(tmp_path / "a", {}, resume=False)
    sae, again = train(run), train(Run(tmp_path / "b", {}, resume=False))
    resumed, other = killed_and_resumed(tmp_path / "c", 61, train)
    for same in (again, resumed):
        assert all(map(torch.equal, sae.state_dict().values(), same.state_dict().values()))
    rows = run.rows()
    assert other.rows() == rows and [row["step"] for row in rows] == [0, 20, 40, 48, 60, 80, 100, 119]
    assert rows[6]["resampled"] > 0 and rows[-1]["fvu"] < 0.7 * rows[0]["fvu"] and 5 < rows[-1]["l0"] < 12 < rows[0]["l0"]
    assert evaluate_sae(model, LAYER, sae, random_tokens(10, 16, seed=7))["fvu"] < 0.6 and not sae.W_dec_FD.requires_grad
    torch.testing.assert_close(sae.W_dec_FD.norm(dim=-1), torch.ones(64))


@pytest.mark.parametrize("poison, named", [(torch.nan, "activation"), (torch.inf, "activation"), (1e30, "loss")])
def test_nan_is_named_before_the_step(poison, named):
    trainer, x_ND = trained_a_little(random_sae())
    before = {name: value.clone() for name, value in trainer.sae.state_dict().items()}
    x_ND[3, 5] = poison
    assert complaint(trainer.step, 3, x_ND).startswith(f"sae, step 3: {named} is NaN or infinite; the step was not applied")
    assert all(map(torch.equal, before.values(), trainer.sae.state_dict().values()))


def test_refitted_decoder_is_least_squares_on_the_same_features():
    sae, x_ND = random_sae(num_features=20), 4 * torch.randn(400, D, generator=seeded()) + 1
    sae.b_enc_F.data[7] = -1e4                                   # never fires: stays as it is
    features, reconstruction = numpy_sae(sae, x_ND)
    dead_row_D, fired = sae.W_dec_FD[7].detach().clone(), features > 0
    design = np.concatenate([features, np.ones((400, 1))], axis=1)
    best = design @ np.linalg.lstsq(design, x_ND.numpy(), rcond=None)[0]
    refit_decoder(sae, x_ND, ridge=1e-7)
    features, after = numpy_sae(sae, x_ND)
    assert ((features > 0) == fired).mean() > 0.9999 and not fired[:, 7].any() and fired[:, :7].any(0).all()
    np.testing.assert_allclose(after, best, atol=1e-2)
    assert ((x_ND.numpy() - after) ** 2).sum() < 0.9 * ((x_ND.numpy() - reconstruction) ** 2).sum()
    torch.testing.assert_close(sae.W_dec_FD.norm(dim=-1), torch.ones(20))
    torch.testing.assert_close(sae.W_dec_FD[7], dead_row_D)


# ---------------------------------------------------------------------------------------------------------------- evaluation

def test_evaluation_of_the_mean_and_of_the_identity():
    model, tokens_BT = random_model(), random_tokens(12, 10)
    sae = SAE(D, 2 * D)
    sae.b_enc_F.data[:] = -1e6
    sae.b_dec_D.data[:] = mlp_rows(model, LAYER, tokens_BT).mean(0)
    mean = evaluate_sae(model, LAYER, sae, tokens_BT)
    assert mean["fvu"] == pytest.approx(1, abs=1e-5) and mean["l0"] == mean["l1"] == 0 and mean["dead_fraction"] == 1
    assert mean["ce_sae"] == pytest.approx(mean["ce_mean"], abs=1e-5) and mean["ce_recovered_mean"] == pytest.approx(0, abs=1e-4)
    sae = SAE(D, 2 * D)
    sae.W_dec_FD.data[:] = torch.cat([torch.eye(D), -torch.eye(D)])
    sae.W_enc_DF.data[:] = sae.W_dec_FD.T
    whole = evaluate_sae(model, LAYER, sae, tokens_BT)
    want = {"fvu": 0, "mse": 0, "l0": D, "shrinkage": 1, "ce_sae": whole["ce_base"], "ce_recovered": 1,
            "ce_recovered_mean": 1}
    assert {key: whole[key] for key in want} == pytest.approx(want, abs=1e-5)
    assert abs(whole["ce_base"] - whole["ce_zero"]) > 0.05 and abs(whole["ce_base"] - whole["ce_mean"]) > 0.05


def test_evaluation_equals_numpy():
    model, sae, tokens_BT = random_model(), random_sae(bias=-5.0), random_tokens(200, 12)      # more rows than are looked at at once
    x = mlp_rows(model, LAYER, tokens_BT)
    features, reconstruction = numpy_sae(sae, x)
    sae.W_dec_FD.data[5] *= 2                                    # l1 counts each feature by its vector's length
    sae.W_enc_DF.data[:, 5], sae.b_enc_F.data[5] = sae.W_enc_DF.data[:, 5] / 2, sae.b_enc_F.data[5] / 2
    x, fired = x.double().numpy(), features > 0
    error = ((x - reconstruction) ** 2).sum()
    want = {"rows": 2200, "mse": error / 2200, "fvu": error / ((x - x.mean(0)) ** 2).sum(), "l0": fired.sum() / 2200,
            "l1": features.sum() / 2200, "dead_fraction": (~fired.any(0)).mean(), "dense_fraction": (fired.mean(0) > 0.01).mean(),
            "rare_fraction": (fired.mean(0) < 1e-5).mean(),
            "shrinkage": (np.linalg.norm(reconstruction, axis=1) / np.linalg.norm(x, axis=1)).mean()}
    assert 0 < want["dead_fraction"] < 1 - want["dense_fraction"] < 1
    figures, rate = evaluate_sae(model, LAYER, sae, tokens_BT), fired.mean(0)
    assert {key: figures[key] for key in want} == pytest.approx(want, rel=1e-4)
    assert figures["density"] == [(rate == 0).sum()] + [((rate > low) & (rate <= high)).sum() for low, high in (
        (0, 1e-5), (1e-5, 1e-4), (1e-4, 1e-3), (1e-3, 1e-2), (1e-2, 1e-1), (1e-1, 1))]

    def loss(replace=None) -> float:
        """Next-token loss with the MLP's output replaced by a hook, without the model's own edits; first tokens as they are."""
        def hook(module, inputs, outputs):
            return torch.cat([outputs[0][:, :1], replace(outputs[0])[:, 1:]], dim=1), outputs[1]

        handle = model.gpt_neox.layers[LAYER].mlp.register_forward_hook(hook) if replace else None
        logits_BTV = model(tokens_BT)
        if handle:
            handle.remove()
        return -logits_BTV.log_softmax(-1)[:, :-1].gather(-1, tokens_BT[:, 1:, None]).mean().item()

    ce = {"base": loss(), "zero": loss(torch.zeros_like), "sae": loss(lambda m: sae(m).detach()),
          "mean": loss(lambda m: torch.from_numpy(x.mean(0)).float().expand_as(m))}
    assert {name: figures[f"ce_{name}"] for name in ce} == pytest.approx(ce, rel=1e-5)
    assert figures["ce_recovered"] == pytest.approx((ce["zero"] - ce["sae"]) / (ce["zero"] - ce["base"]), rel=1e-3)


def test_mmcs_finds_a_dictionary_again_in_another_order():
    rows_FD = torch.randn(20, 8, generator=seeded())
    order = torch.randperm(20, generator=seeded(1))
    assert mmcs(rows_FD, 3 * rows_FD[order]) == pytest.approx(1, abs=1e-6)
    a, b = rows_FD[:12].numpy(), rows_FD[12:].numpy()
    want = np.mean([max(u @ v / np.linalg.norm(u) / np.linalg.norm(v) for v in b) for u in a])
    assert mmcs(rows_FD[:12], rows_FD[12:]) == pytest.approx(want, rel=1e-5) and want < 0.95


@pytest.mark.parametrize("field, value", [
    ("objective", "l7"), ("l0", -1.0), ("l0", 1e9), ("num_features", 0), ("batch_size", 0), ("tokens", 0),
    ("buffer_rows", -1), ("buffer_rows", 2 * SAEConfig.batch_size - 1),
    ("eval_tokens", 0), ("resample_rows", 0), ("text_tokens", 0), ("context", 1)])
def test_config_refuses(field, value):
    assert f"--sae-{field.replace('_', '-')}" in complaint(SAEConfig, **{field: value})
    assert SAEConfig(buffer_rows=4096, batch_size=2048).objective == "l1"


@pytest.mark.parametrize("rates", [False, True])
@torch.no_grad()
def test_random_dictionary_is_as_large_and_as_sparse(rates):
    like, x_ND = SAE(16, 200, seeded()), torch.randn(500, 16, generator=seeded(3))
    like.b_dec_D += 0.1
    like.b_enc_F -= 3 * torch.rand(200, generator=seeded(4))           # some are always active, some never
    control = random_dictionary(like, seeded(2), x_ND) if rates else random_dictionary(like, seeded(2), l0=7.4)
    features_NF, projections_NF = control.encode(x_ND), (x_ND - like.b_dec_D) @ control.W_dec_FD.T
    if rates:
        active_F, wanted_F = ((features > 0).sum(0) for features in (features_NF, like.encode(x_ND)))
        wanted_F = wanted_F.minimum((projections_NF > 0).sum(0))       # no threshold is below 0
        assert wanted_F.min() < 5 and wanted_F.max() > 200 and (active_F - wanted_F).abs().max() <= 1          # 1: rounding at the threshold
        want_NF = torch.where(features_NF > 0, projections_NF, 0.0)
    else:
        want_NF = torch.where(projections_NF >= projections_NF.topk(7).values[:, -1:], projections_NF, 0.0)
    torch.testing.assert_close(features_NF, want_NF)
    torch.testing.assert_close(control.W_dec_FD.norm(dim=-1), torch.ones(200))
    assert control.W_dec_FD.shape == like.W_dec_FD.shape and mmcs(control.W_dec_FD, like.W_dec_FD) < 0.9
    assert not any(p.requires_grad for p in control.parameters())
