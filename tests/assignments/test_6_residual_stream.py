"""Assignment 6: a new hook site, the residual stream. File: pythia.py. About 5 lines.

All here reads and edits the MLP output of a layer. Many SAEs are trained on the residual stream behind the block instead
(`blocks.N.hook_resid_post`), which holds what all layers so far have written. Make the place a property of the model:

    model.site = "mlp"        as before, and the default
    model.site = "resid"      the stream after the block, x + attn + mlp, takes the place of the MLP output *everywhere*: edits are given it,
                              `trunk` and `mlp_output` return it

An edit's change is added to the stream after the block already, so nothing else has to change: SAE training, `evaluate_sae`, `FeatureScale` and PPO's
cache follow. Edits get the stream *before* their own change.

Hints: where is `edits[layer]` called, and what does that function return to `trunk`? Three lines in all will do, and `recompute` shows how the model
keeps a setting. To go on: an option `--site` in train.py, the hook's name in the files of `SAE.save`, and a run to compare both sites.
"""

import numpy as np
import torch

import pythia
from assignments import need
from conftest import random_model, random_tokens
from policies import EditPolicy, FeatureScale
from sae import SAE, evaluate_sae

F64 = torch.float64


def wanted(**changes) -> pythia.Pythia:
    """-> a random model that reads and edits the residual stream."""
    model = random_model(F64, **changes)
    need(hasattr(model, "site"), "Pythia has no attribute site yet")
    assert model.site == "mlp", 'a model\'s site must be "mlp" as long as nobody sets it'
    model.site = "resid"
    return model


def stream_by_hand(model: pythia.Pythia, tokens_BT: torch.Tensor, layer: int) -> torch.Tensor:
    """-> resid_BTD behind `layer`, from modules of a model whose site nobody touched: embedding + every attention's and MLP's output."""
    plain, outputs, hooks = random_model(F64, parallel_residual=model.cfg.parallel_residual), [], []
    for block in plain.gpt_neox.layers[:layer + 1]:
        hooks += [block.attention.register_forward_hook(lambda module, given, out: outputs.append(out)),
                  block.mlp.register_forward_hook(lambda module, given, out: outputs.append(out[0]))]
    plain(tokens_BT)
    return plain.gpt_neox.embed_in(tokens_BT) + sum(outputs)


def test_the_stream_is_the_sum_of_all_that_was_written_to_it():
    for parallel in (True, False):
        model, tokens_BT = wanted(parallel_residual=parallel), random_tokens(3, 9)
        for layer in range(4):
            got_BTD, want_BTD = model.mlp_output(tokens_BT, layer), stream_by_hand(model, tokens_BT, layer)
            np.testing.assert_allclose(got_BTD, want_BTD, atol=1e-9, err_msg=(
                f"mlp_output at layer {layer} must be embedding + attentions + MLPs up to there, this block's own included"))
            resid_BTD, read_BTD, _ = model.trunk(tokens_BT, layer)
            assert torch.equal(resid_BTD, got_BTD) and torch.equal(read_BTD, got_BTD), "trunk must return the stream twice"


def test_the_mlp_output_is_still_there():
    model, plain, tokens_BT = wanted(), random_model(F64), random_tokens(3, 9)
    model.site = "mlp"
    edits = {1: lambda mlp_BTD, neurons_BTM: -0.5 * mlp_BTD}
    for read in (lambda m: m.mlp_output(tokens_BT, 2), lambda m: m(tokens_BT, edits=edits)):
        assert torch.equal(read(model), read(plain)), 'with site = "mlp" nothing may change'
    other = wanted()
    assert model.site == "mlp" and other.site == "resid", "one model's site is not another's"


def test_a_stream_set_to_zero_leaves_only_the_last_bias():
    model, tokens_BT = wanted(), random_tokens(2, 7)
    logits_BTV = model(tokens_BT, edits={3: lambda resid_BTD, neurons_BTM: -resid_BTD})
    want_V = model.gpt_neox.final_layer_norm.bias @ model.embed_out.weight.T
    np.testing.assert_allclose(logits_BTV, want_V.expand_as(logits_BTV), atol=1e-9, err_msg=(
        "an edit that takes away all of the stream after the last layer leaves only the final layer norm's bias to be unembedded"))


def test_patching_the_stream_makes_another_text_of_it():
    """Activation patching: with the whole stream of a donor in place of its own, a model says what it would say of the donor."""
    model, tokens_BT, donor_BT = wanted(), random_tokens(2, 9), random_tokens(2, 9, seed=5)
    for layer in (0, 2):
        donor_BTD = stream_by_hand(model, donor_BT, layer)
        logits_BTV = model(tokens_BT, edits={layer: lambda resid_BTD, neurons_BTM: donor_BTD - resid_BTD})
        np.testing.assert_allclose(logits_BTV, random_model(F64)(donor_BT), atol=1e-8, err_msg=f"patched after layer {layer}")


def test_sampling_sees_the_same_stream_token_by_token():
    model, prompt_BT = wanted(), random_tokens(3, 6)
    edits = {1: lambda resid_BTD, neurons_BTM: -0.9 * resid_BTD.roll(1, -1), 2: lambda resid_BTD, neurons_BTM: 0.3 * resid_BTD.abs()}
    tokens_BT = model.generate(prompt_BT, 8, temperature=0.0, edits=edits)
    assert torch.equal(model(tokens_BT, edits=edits)[:, 5:-1].argmax(-1), tokens_BT[:, 6:]), "greedy sampling must agree with the forward pass"


def test_an_sae_and_its_coefficients_follow():
    """An SAE that is exact by construction, x = relu(x) − relu(−x), loses nothing; PPO's cached trunk gives what the whole model gives."""
    model, tokens_BT = wanted(), random_tokens(6, 12)
    sae, eye_DD = SAE(32, 64).requires_grad_(False), torch.eye(32)
    sae.W_enc_DF.copy_(torch.cat([eye_DD, -eye_DD], dim=1))
    sae.W_dec_FD.copy_(torch.cat([eye_DD, -eye_DD]))
    figures = evaluate_sae(model, 3, sae, tokens_BT)
    assert figures["fvu"] < 1e-6 and abs(figures["ce_sae"] - figures["ce_base"]) < 1e-5, f"an exact SAE must lose nothing: {figures}"
    resid_BTD = stream_by_hand(model, tokens_BT, 3)
    policy = EditPolicy(model, {1: FeatureScale(sae)})
    np.testing.assert_allclose(figures["l1"], resid_BTD[:, 1:].abs().sum(-1).mean(), rtol=1e-5, err_msg="Σ f ‖d‖: evaluate_sae read another place")
    policy.edits[1].coef_F.data[:] = 0.5                             # all features halved: so is the stream
    ones_BT = torch.ones_like(tokens_BT)
    hidden_BRD = policy.hidden(tokens_BT, ones_BT, 5, policy.observe(tokens_BT, ones_BT, 5))
    want_BTD = random_model(F64).hidden_from(0.5 * stream_by_hand(model, tokens_BT, 1), 1)
    np.testing.assert_allclose(hidden_BRD.detach(), want_BTD[:, -6:-1], atol=1e-6, err_msg="all coefficients ½ must halve the stream")
