"""What the stages share: the folder of a run, checks of options and of steps, the precision and the memory of a device."""

import fcntl
import json
import resource
import signal
import time
from pathlib import Path

import torch
from torch import Tensor

from files import UserError, load_state, not_written, read_json, read_rows, write_json, write_whole


class Run:
    """One stage's folder OUT/STAGE: config.json, metrics.jsonl (a line a logged step), state.pt while it runs, metrics.json at its end.

    Each file is whole at every instant but metrics.jsonl, which state.pt has a copy of: whatever was going on when a run was killed,
    resuming puts all back to one moment. A lock keeps a second process out; the kernel drops it when the process ends, however it ends.
    """

    def __init__(self, folder: Path, config: dict, resume: bool):
        self.folder, self.config = folder, config
        found = folder / "config.json"
        self.fresh = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(folder / "lock", "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is being worked on by another process: wait for its end, or choose another --out or --tag") from None
        if found.exists():
            if not resume:
                raise UserError(f"{folder} holds a run already: go on with it by --resume, or choose another folder by --out or --tag")
            before = read_json(found)
            changed = [key for key, value in (before | config).items() if before.get(key) != value]
            if changed:
                raise UserError(f"{folder} was begun with another {', '.join(changed)}: give the same options, or another --out")
        write_json(found, config)
        self.saved = time.monotonic()
        self.loop_begun, self.stopped = False, 0
        self.tokens_per_second = 0.0                 # of SAE training, which fills it in

    def log(self, **figures) -> None:
        """Append a line to metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        try:
            with open(path, "a") as file:
                file.write(json.dumps(figures) + "\n")
        except OSError as error:
            raise not_written(path, error) from None

    def rows(self) -> list[dict]:
        """All lines of metrics.jsonl."""
        return read_rows(self.folder / "metrics.jsonl")

    def checkpoint(self, step: int, seconds: float, **parts) -> None:
        """Every `seconds`, and when the run was asked to stop, save the log and the state of `parts` (dicts, and what has a state_dict) after
        `step` steps."""
        if self.stopped or time.monotonic() - self.saved > seconds:
            signal.alarm(0)                          # a save in progress may take its time
            log = self.folder / "metrics.jsonl"
            state = {"step": step, "log": log.read_text() if log.exists() else ""} | {
                name: part.get_state() if isinstance(part, torch.Generator) else part if isinstance(part, dict) else part.state_dict()
                for name, part in parts.items()}
            write_whole(self.folder / "state.pt", lambda file: torch.save(state, file))
            self.saved = time.monotonic()
        if self.stopped:
            raise KeyboardInterrupt(self.stopped)

    def restore(self, **parts) -> int:
        """-> how many steps are done, with `parts` and the log as they were then."""
        self.loop_begun = True
        log, path = self.folder / "metrics.jsonl", self.folder / "state.pt"
        if not path.exists():
            log.unlink(missing_ok=True)
            return 0
        state = load_state(path)
        for name, part in parts.items():
            (part.set_state if isinstance(part, torch.Generator) else part.update if isinstance(part, dict) else part.load_state_dict)(state[name])
        write_whole(log, lambda file: file.write(state["log"].encode()))
        return state["step"]

    def stop(self, signum: int, frame: object) -> None:
        """On Ctrl-C or SIGTERM: the training loop may end its step, and saves its state; after 10 s, or when asked twice, or where no loop
        has begun, stop at once (the alarm after 10 s comes back here). The state on the disk is whole at any instant."""
        if self.stopped or not self.loop_begun:
            raise KeyboardInterrupt(self.stopped or signum)
        self.stopped = signum
        signal.alarm(10)

    def __enter__(self) -> "Run":
        self.handlers = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
        return self

    def __exit__(self, *_) -> None:
        signal.alarm(0)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.lock.close()

    def finish(self, figures: dict) -> dict:
        """Write the final figures; the resumable state is no longer needed."""
        write_json(self.folder / "metrics.json", figures)
        for path in self.folder.glob("*.pt*"):       # also what a kill left of one that was being written
            path.unlink()
        if self.stopped:                             # while it was evaluated: no next stage
            raise KeyboardInterrupt(self.stopped)
        return figures


# ------------------------------------------------------------------------------------------------------------------ checks

def check_positive(config: object, stage: str, *names: str) -> None:
    """UserError that names the first of these fields of a stage's configuration that is not above 0."""
    for name in names:
        if not getattr(config, name) > 0:
            raise UserError(f"--{stage}-{name.replace('_', '-')} must be positive, not {getattr(config, name)}")


def check_finite(where: str, optimizer: torch.optim.Optimizer | None = None, **quantities: Tensor | float) -> None:
    """UserError that names the first quantity with a NaN or an infinity in it, the optimizer's gradients last. Called before a step: the
    weights and the saved state are still good then."""
    if optimizer:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        quantities["gradient"] = sum(torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients)
    for name, value in quantities.items():
        if not torch.as_tensor(value).isfinite().all():
            raise UserError(f"{where}: {name} is NaN or infinite; the step was not applied and the last saved state is good: "
                            "lower the learning rate, or try --dtype float32")


# ----------------------------------------------------------------------------------------------------------------- devices

def mixed_precision(device: torch.device) -> torch.autocast:
    """-> a context in which matrix products of float32 weights run in bfloat16, where the hardware multiplies bfloat16 (there several times
    faster); elsewhere one that changes nothing, as a CPU that must emulate it is a hundred times slower."""
    return torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bfloat16(device))


def multiplies_bfloat16(device: torch.device) -> bool:
    """-> whether the hardware has matrix products in bfloat16: a GPU from Ampere on, few CPUs."""
    if device.type == "cpu":
        return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory used so far: on a GPU what torch allocated there, on a CPU the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20        # Linux counts in KiB
