"""sae.py against its formulas in numpy, and on autoencoders whose figures are known without measuring."""

import json

import numpy as np
import pytest
import torch

from conftest import CONFIG, complaint, killed_and_resumed, random_model, random_tokens
from pythia import read_safetensors, write_json, write_safetensors
from sae import (SAE, ActivationBuffer, SAEConfig, SAETrainer, evaluate_sae, load_sae, mlp_rows, normalize_decoder,
                 refit_decoder, remove_radial_gradient, resample_dead, train_sae)
from train import Run

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
    torch.testing.assert_close(column_GD, 0.2 * norm * row_GD)
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
        return train_sae(model, LAYER, tokens_BT, cfg, run, seeded())

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


def test_evaluation_equals_numpy_in_batches_of_any_size():
    model, sae, tokens_BT = random_model(), random_sae(bias=-5.0), random_tokens(15, 12)
    x = mlp_rows(model, LAYER, tokens_BT)
    features, reconstruction = numpy_sae(sae, x)
    sae.W_dec_FD.data[5] *= 2                                    # l1 counts each feature by its vector's length
    sae.W_enc_DF.data[:, 5], sae.b_enc_F.data[5] = sae.W_enc_DF.data[:, 5] / 2, sae.b_enc_F.data[5] / 2
    x, fired = x.double().numpy(), features > 0
    error = ((x - reconstruction) ** 2).sum()
    want = {"rows": 15 * 11, "mse": error / 165, "fvu": error / ((x - x.mean(0)) ** 2).sum(), "l0": fired.sum() / 165,
            "l1": features.sum() / 165, "dead_fraction": (~fired.any(0)).mean(), "dense_fraction": (fired.mean(0) > 0.01).mean(),
            "shrinkage": (np.linalg.norm(reconstruction, axis=1) / np.linalg.norm(x, axis=1)).mean()}
    assert 0 < want["dead_fraction"] < 1 - want["dense_fraction"] < 1
    figures = [evaluate_sae(model, LAYER, sae, tokens_BT, batch_size) for batch_size in (15, 4)]
    for some in figures:
        assert {key: some[key] for key in want} == pytest.approx(want, rel=1e-4)
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)

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
    assert {name: figures[0][f"ce_{name}"] for name in ce} == pytest.approx(ce, rel=1e-5)
    assert figures[0]["ce_recovered"] == pytest.approx((ce["zero"] - ce["sae"]) / (ce["zero"] - ce["base"]), rel=1e-3)


@pytest.mark.parametrize("field, value", [
    ("objective", "l7"), ("num_features", 0), ("batch_size", 0), ("tokens", 0), ("buffer_rows", -1), ("buffer_rows", 2 * SAEConfig.batch_size - 1),
    ("eval_tokens", 0), ("resample_rows", 0), ("text_tokens", 0), ("context", 1)])
def test_config_refuses(field, value):
    assert f"--sae-{field.replace('_', '-')}" in complaint(SAEConfig, **{field: value})
    assert SAEConfig(buffer_rows=4096, batch_size=2048).objective == "l1"
