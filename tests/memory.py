"""How much memory a PPO iteration, or the training of an SAE, needs on a GPU, without one: every tensor is counted as it comes and goes, and
none has any data.

    python tests/memory.py --stage rlhf --policy coef --model 6.9b --layer 16 --features 32768        # a line a phase: GiB before it, and at most
    python tests/memory.py --stage sae --model 6.9b --layer 16 --features 32768

The code that runs is the real one (`bench.PPOBench`: sampling, logprobs of policy and reference, scores, update; or what `train.stage_sae`
calls), at the real shapes, on the pretended GPU of pretend_gpu.py, whose tensors are held on PyTorch's `meta` device here. Where the code asks
for a value, every number is about ACTIVE, every truth True, and every token has ACTIVE active features. Not counted: what a kernel needs inside,
fragmentation, and what CUDA itself takes (about half a GiB).
"""

import argparse
import itertools
import json
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pretend_gpu
import torch
from pretend_gpu import DEVICE, PretendGPU, each

import bench
import lm
import policies
import ppo
from bench import NoRun
from pythia import Pythia, PythiaConfig
from reward import RewardModel
from sae import OBJECTIVES, SAE, ActivationBuffer, SAEConfig, evaluate_sae, mlp_rows, train_sae

ACTIVE = 64              # features a token
META = torch.device("meta")
TINY = itertools.count(0, 1e-6)                      # no two numbers are equal, so that no difference is 0


class Counter:
    """Bytes of the storages alive, in CUDA's blocks of 512, and the most there ever were."""

    def __init__(self):
        self.now = self.peak = 0
        self.known: weakref.WeakSet = weakref.WeakSet()

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.known:
            size = -(-storage.nbytes() // 512) * 512
            self.known.add(storage)
            weakref.finalize(storage, self.free, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def free(self, size: int) -> None:
        self.now -= size


COUNTER = Counter()


def perform(func: Any, args: tuple, kwargs: dict) -> Any:
    """One operation on tensors without data; what depends on data is made up."""
    name, x = func._schema.name.removeprefix("aten::"), args[0] if args else None
    if isinstance(x, torch.Tensor) and x.device == META:
        if name == "_local_scalar_dense":
            return True if x.dtype == torch.bool else ACTIVE + next(TINY) if x.is_floating_point() else ACTIVE
        if name == "_to_copy" and kwargs.get("device") not in (None, META):
            return torch.ones(x.shape, dtype=kwargs.get("dtype") or x.dtype)
        if name == "nonzero":
            return seen(torch.empty(x.numel() // x.shape[-1] * ACTIVE, x.dim(), dtype=torch.long, device=META))
        if name == "bincount":
            return seen(torch.empty(kwargs.get("minlength") or args[2], dtype=torch.long, device=META))
        if name == "index":                          # a mask of k dimensions is k indices, all of its places
            args = x, [index for some in args[1] for index in ([torch.empty(some.numel(), dtype=torch.long, device=META)] * some.dim()
                                                               if some is not None and some.dtype == torch.bool else [some])]
    return seen(func(*args, **kwargs))


def seen(out: Any) -> Any:
    each(lambda x: COUNTER.see(x) if isinstance(x, torch.Tensor) and x.device == META else None, out)
    return out


def count() -> None:
    """From here on tensors on the pretended GPU have no data and are counted, in this process."""
    pretend_gpu.perform, pretend_gpu.HELD_ON = perform, META
    pretend_gpu.patch()


def weights(kind: type, name: str) -> Pythia:
    """-> a frozen bfloat16 model of a published shape."""
    layers, hidden, heads, vocab = bench.SHAPES[name]
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = kind(PythiaConfig(vocab, hidden, layers, heads, 4 * hidden)).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    return model


def rlhf(args: argparse.Namespace) -> list[Callable[[], object]]:
    """-> the phases of a PPO iteration with a reward model and, for coef, an SAE."""
    model, reward = weights(Pythia, args.model), weights(RewardModel, args.reward)
    with torch.device(DEVICE):
        saes = {args.layer: SAE(model.cfg.hidden_size, args.features).requires_grad_(False)} if args.policy == "coef" else {}
    cfg = ppo.PPOConfig(episodes=args.episodes, samples_per_prompt=1, response_tokens=args.response_tokens, epochs=1, micro_batch=args.micro_batch,
                        generate_batch=args.generate_batch)
    run = bench.PPOBench(args, policies.make_policy(args.policy, model, [args.layer], saes, cfg), reward, cfg, args.prompt_tokens)
    return [run.iteration, run.generate, run.reference, run.score, run.update]           # Adam's moments are there from the second on


def sae_training(args: argparse.Namespace) -> list[Callable[[], object]]:
    """-> sampling of one batch of text, training of a few steps with the refit at its end, and the evaluation, as in `train.stage_sae`."""
    model, kept = weights(Pythia, args.model), {}
    cfg = SAEConfig(num_features=args.features, text_batch=args.generate_batch, tokens=3 * SAEConfig.batch_size, resample_at=(), objective=args.objective)

    def text() -> None:
        lm.sample_windows(model, SimpleNamespace(end_of_text=0), args.generate_batch, cfg.context, args.generate_batch, torch.Generator())

    def training() -> None:
        windows_BT = torch.zeros(cfg.text_tokens // cfg.context, cfg.context, dtype=torch.int32)
        kept["sae"] = train_sae(ActivationBuffer(model, args.layer, windows_BT, cfg, torch.Generator()), cfg, NoRun(), torch.Generator())

    def evaluation() -> None:
        heldout_BT = torch.randint(4, 50_000, (cfg.eval_tokens // cfg.context, cfg.context), dtype=torch.int32)
        evaluate_sae(model, args.layer, kept["sae"], heldout_BT)
        for x_ND in mlp_rows(model, args.layer, heldout_BT).split(2048):
            kept["sae"].encode(x_ND.float())
    return [text, training, evaluation]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", default="rlhf", choices=("rlhf", "sae"))
    parser.add_argument("--model", default="6.9b", choices=bench.SHAPES)
    parser.add_argument("--reward", default="6.9b", choices=bench.SHAPES)
    parser.add_argument("--policy", default="coef", choices=[name for name in policies.POLICIES if not name.startswith("random")])
    parser.add_argument("--objective", default="l1", choices=OBJECTIVES)
    for name, default in (("layer", 16), ("features", 32768), ("episodes", 64), ("prompt-tokens", 64), ("response-tokens", 64), ("micro-batch", 4),
                          ("generate-batch", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    count()
    with PretendGPU():
        for phase in {"rlhf": rlhf, "sae": sae_training}[args.stage](args):
            before, COUNTER.peak = COUNTER.now, COUNTER.now
            phase()
            print(json.dumps({"bench": "memory", "stage": args.stage, "model": args.model, "phase": phase.__name__, "before_gib": round(before / 2 ** 30, 2),
                              "peak_gib": round(COUNTER.peak / 2 ** 30, 2)}), flush=True)


if __name__ == "__main__":
    main()
