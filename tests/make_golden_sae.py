"""Make tests/golden/sae: small random SAEs as three libraries save them, and what each library's own encoder says. Run by hand.

Needs an environment of its own, with torch, dictionary-learning, eai-sparsify and sae-lens; any of them that is missing is passed over:

    python tests/make_golden_sae.py                      makes everything anew
    python tests/make_golden_sae.py --load FOLDER …      loads what our SAE.save wrote into SAELens, beside FOLDER/golden.safetensors
"""

import argparse
import importlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent / "golden" / "sae"
D, F, K, N = 8, 24, 4, 40
MODEL, LAYER = "EleutherAI/pythia-test", 1


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """Random numbers in all parameters, thresholds positive."""
    for name, parameter in module.named_parameters():
        parameter.data = torch.randn_like(parameter) * 0.5
        if "threshold" in name:
            parameter.data = 0.5 + parameter.data.abs()
    return module.requires_grad_(False)


def keep(name: str, encode, decode) -> None:
    """Freeze inputs, features and reconstruction beside the saved files."""
    x = 2 * torch.randn(N, D)
    features = encode(x)
    reconstruction = decode(features)
    frozen = {"x": x, "features": features.contiguous(), "reconstruction": reconstruction.contiguous()}
    save_file(frozen, GOLDEN / name / "golden.safetensors")
    print(name, f"L0 {(features > 0).sum() / N:.1f}")


def dictionary_learning() -> None:
    module = importlib.import_module("dictionary_learning.dictionary")
    trainers = importlib.import_module("dictionary_learning.trainers")
    for trainer, name, options in (
            ("StandardTrainer", "AutoEncoder", {}), ("StandardTrainerAprilUpdate", "AutoEncoderNew", {}),
            ("TopKTrainer", "AutoEncoderTopK", {"k": K}), ("BatchTopKTrainer", "BatchTopKSAE", {"k": K}),
            ("GatedSAETrainer", "GatedAutoEncoder", {}), ("JumpReluTrainer", "JumpReluAutoEncoder", {})):
        made = getattr(module, name, None) or getattr(trainers.top_k, name, None) or getattr(trainers.batch_top_k, name)
        sae = randomize(made(D, F, **options))
        if name == "BatchTopKSAE":
            sae.threshold.fill_(0.8)
        folder = GOLDEN / f"dictionary_learning-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(sae.state_dict(), folder / "ae.pt")
        (folder / "config.json").write_text(json.dumps({"trainer": {
            "trainer_class": trainer, "dict_class": name, "activation_dim": D, "dict_size": F, "layer": LAYER, "lm_name": MODEL,
            "submodule_name": f"mlp_out_layer_{LAYER}", **options}, "buffer": {"d_submodule": D, "io": "out"}}))
        keep(folder.name, sae.encode, sae.decode)


def sparsify() -> None:
    SparseCoder, Config = importlib.import_module("sparsify").SparseCoder, importlib.import_module("sparsify").SparseCoderConfig
    sae = randomize(SparseCoder(D, Config(num_latents=F, k=K)))
    name = f"sparsify/layers.{LAYER}.mlp"
    sae.save_to_disk(GOLDEN / name)

    def encode(x):
        top = sae.encode(x)
        return torch.zeros(len(x), F).scatter(-1, top.top_indices, top.top_acts)

    keep(name, encode, lambda features: sae.decode(*features.topk(K, dim=-1)))


def saelens() -> None:
    lens = importlib.import_module("sae_lens")
    for name, options in (("Standard", {}), ("TopK", {"k": K}), ("JumpReLU", {}), ("Gated", {})):
        cfg = getattr(lens, f"{name}SAEConfig")(d_in=D, d_sae=F, apply_b_dec_to_input=name != "JumpReLU", **options)
        cfg.metadata.model_name, cfg.metadata.hook_name = MODEL, f"blocks.{LAYER}.hook_mlp_out"
        sae = randomize(getattr(lens, f"{name}SAE")(cfg))
        sae.save_model(GOLDEN / f"saelens-{name}")
        keep(f"saelens-{name}", sae.encode, sae.decode)


def load_ours(folder: Path) -> None:
    sae, golden = importlib.import_module("sae_lens").SAE.load_from_disk(folder), load_file(folder / "golden.safetensors")
    for name, value in (("features", sae.encode(golden["x"])), ("reconstruction", sae(golden["x"]))):
        print(folder, name, "largest difference", (value - golden[name]).abs().max().item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=Path, nargs="*", default=[])
    args = parser.parse_args()
    torch.manual_seed(0)
    for folder in args.load:
        load_ours(folder)
    for make in () if args.load else (dictionary_learning, sparsify, saelens):
        try:
            make()
        except ImportError as error:
            print(f"{make.__name__}: passed over: {error}")


if __name__ == "__main__":
    main()
