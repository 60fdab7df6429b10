"""How much memory a PPO iteration needs on a GPU, without one: every tensor is counted as it comes and goes, and none has any data.

    python tests/memory.py --model 6.9b --policy coef --layer 16 --features 32768        # a line a phase: GiB before it, and at most

The code that runs is the real one (`bench.PPOBench`: sampling, logprobs of policy and reference, scores, update), at the real shapes, on the
pretended GPU of pretend_gpu.py, whose tensors are held on PyTorch's `meta` device here. Where the code asks for a value, every number is
ACTIVE, every truth True, and every token has ACTIVE active features. Not counted: what a kernel needs inside, fragmentation, and what CUDA
itself takes (about half a GiB).
"""

import argparse
import json
import weakref
from typing import Any

import pretend_gpu
import torch
from pretend_gpu import DEVICE, PretendGPU
from torch.utils._pytree import tree_leaves

import bench
import ppo
from pythia import Pythia, PythiaConfig
from reward import RewardModel
from sae import SAE

ACTIVE = 64              # features a token
META = torch.device("meta")


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
    name, x = func._schema.name.removeprefix("aten::"), next((x for x in tree_leaves(args) if isinstance(x, torch.Tensor)), None)
    if x is not None and x.device == META:
        if name == "_local_scalar_dense":
            return True if x.dtype == torch.bool else float(ACTIVE) if x.is_floating_point() else ACTIVE
        if name == "_to_copy" and kwargs.get("device") not in (None, META):
            return torch.ones(x.shape, dtype=kwargs.get("dtype") or x.dtype)
        if name == "nonzero":
            return seen(torch.empty(x.numel() // x.shape[-1] * ACTIVE, x.dim(), dtype=torch.long, device=META))
        if name == "bincount":
            return seen(torch.empty(kwargs.get("minlength") or args[2], dtype=torch.long, device=META))
        if name == "index" and args[1][0] is not None and args[1][0].dtype == torch.bool:                  # all True
            return seen(torch.empty(args[1][0].numel(), *x.shape[args[1][0].dim():], dtype=x.dtype, device=META))
    return seen(func(*args, **kwargs))


def seen(out: Any) -> Any:
    for x in tree_leaves(out):
        if isinstance(x, torch.Tensor) and x.device == META:
            COUNTER.see(x)
    return out


def make(args: argparse.Namespace) -> bench.PPOBench:
    """-> the iteration of a policy with a reward model of its own shape, and an SAE."""
    def config(name: str) -> PythiaConfig:
        layers, hidden, heads, vocab = bench.SHAPES[name]
        return PythiaConfig(vocab, hidden, layers, heads, 4 * hidden)

    torch.set_default_dtype(torch.bfloat16)
    model, reward = Pythia(config(args.model)).requires_grad_(False), RewardModel(config(args.reward)).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    saes = {args.layer: SAE(model.cfg.hidden_size, args.features).requires_grad_(False)} if args.policy == "coef" else {}
    cfg = ppo.PPOConfig(episodes=args.episodes, samples_per_prompt=1, response_tokens=args.response_tokens, epochs=args.epochs,
                        micro_batch=args.micro_batch, generate_batch=args.generate_batch, recompute=args.recompute)
    return bench.PPOBench(args, ppo.make_policy(args.policy, model, [args.layer], saes, cfg), reward, cfg, args.prompt_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="6.9b", choices=bench.SHAPES)
    parser.add_argument("--reward", default="6.9b", choices=bench.SHAPES)
    parser.add_argument("--policy", default="coef", choices=[name for name in ppo.POLICIES if name != "random"])
    for name, default in (("layer", 16), ("features", 32768), ("episodes", 64), ("prompt-tokens", 64), ("response-tokens", 64), ("epochs", 1),
                          ("micro-batch", 4), ("generate-batch", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--recompute", action="store_true")
    args = parser.parse_args()
    pretend_gpu.perform, pretend_gpu.HELD_ON = perform, META
    pretend_gpu.patch()
    with PretendGPU():
        with torch.device(DEVICE):
            run = make(args)
        for number in range(2):                      # Adam's moments are there from the second on
            for phase in (run.generate, run.reference, run.score, run.update):
                before, COUNTER.peak = COUNTER.now, COUNTER.now
                phase()
                if number:
                    print(json.dumps({"bench": "memory"} | vars(args) | {"phase": phase.__name__, "before_gib": round(before / 2 ** 30, 2),
                                                                         "peak_gib": round(COUNTER.peak / 2 ** 30, 2)}), flush=True)


if __name__ == "__main__":
    main()
