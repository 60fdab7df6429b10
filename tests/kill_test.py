"""Runs killed at random moments, or stopped by a full disk or a signal, against runs left alone: the same bits in the end.

    python tests/kill_test.py [STAGE ...] [--kills 20]        prints a line for each kind of end and stage

Every run is a forked child, so that importing torch is paid for once. SIGKILL comes at a random moment of what an uninterrupted run
takes; --resume goes on, is killed again, and so on until a run gets through; then all begins anew, until the kills are used up.
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch._dynamo  # noqa: E402, F401  (torch imports it late, which would be once for every child)

import train  # noqa: E402
from files import read_json  # noqa: E402

# What clocks, the machine and the folder decide.
MEASURED = {"seconds", "seconds_per_iteration", "tokens_per_second", "peak_memory_gib", "commands"}
SHORT = {                                            # options that make a stage a matter of seconds
    "lm": "--lm-num-layers 2 --lm-hidden-size 32 --lm-num-heads 2 --lm-context 32 --lm-tokens 10000 --lm-batch-size 4 "
          "--lm-checkpoint-seconds 0.1",
    "reward": "--reward-epochs 24 --reward-batch-size 8 --reward-max-tokens 32 --reward-min-tokens 8 --reward-checkpoint-seconds 0.1",
    "sae": "--sae-context 32 --sae-text-tokens 4000 --sae-eval-tokens 512 --sae-tokens 20000 --sae-batch-size 128 --sae-num-features 256 "
           "--sae-buffer-rows 2048 --sae-resample-rows 256 --sae-checkpoint-seconds 0.1",
    "rlhf": "--rlhf-iterations 16 --rlhf-episodes 16 --rlhf-eval-samples 1 --rlhf-response-tokens 4 "
            "--rlhf-checkpoint-seconds 0.1",
    "interpret": "--interpret-features 8"}
NEEDS = {"lm": (), "reward": (), "sae": (), "rlhf": ("sae",), "interpret": ("sae", "rlhf-coef")}
FOLDERS = {"rlhf": "rlhf-coef", "interpret": "report"}


def command(stage: str, out: Path) -> list[str]:
    """-> the options of a short run of `stage` in `out`."""
    texts = out.parent / "texts.jsonl"
    if not texts.exists():
        texts.write_text("".join(json.dumps({"text": f"a {'good' if i % 2 else 'bad'} film, number {i}, that I saw", "label": i % 2}) + "\n"
                                 for i in range(80)))
    prompts = out.parent / "prompts.txt"
    prompts.write_text("".join(f"this {word} film\n" for word in ("good", "bad", "old", "new", "long", "French", "silent", "little")))
    options = ["--stage", stage, "--out", str(out), "--resume", "--eval-prompts", str(prompts), *SHORT[stage].split()]
    if stage in ("lm", "reward"):
        options += ["--corpus", str(texts), "--eval-corpus", str(texts)]
    return options + ["--model", str(out.parent / "whole" / "lm" / "model")] if stage == "reward" else options


def start(options: list[str], prepare: Callable = lambda: None) -> tuple[int, int]:
    """Fork a child that runs train.py -> its process id, and a pipe of what it writes on stderr."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.dup2(writer, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            prepare()
            code = train.main(options)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    return pid, reader


def wait(child: tuple[int, int]) -> tuple[int, str]:
    """-> exit code (minus the signal of a child that was killed), and the lines that are no progress bar."""
    with open(child[1], encoding="utf-8") as pipe:
        lines = pipe.read().replace("\r", "\n").splitlines()
    status = os.waitpid(child[0], 0)[1]
    return os.waitstatus_to_exitcode(status), "\n".join(line for line in lines if line.startswith(("error", "stopped", "Traceback")))


def contents(folder: Path) -> dict[str, object]:
    """-> all that a run left behind, by file, without what clocks decide."""
    def unclocked(value):
        if isinstance(value, dict):
            return {key: unclocked(inner) for key, inner in value.items() if key not in MEASURED}
        return [unclocked(inner) for inner in value] if isinstance(value, list) else value

    def read(path: Path):
        if path.suffix == ".json":
            return unclocked(read_json(path))
        if path.suffix == ".jsonl":
            return [unclocked(json.loads(line)) for line in path.read_text().splitlines()]
        return None if path.suffix == ".html" else path.read_bytes()              # the page holds what report.json holds
    return {str(path.relative_to(folder)): read(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def differences(a: Path, b: Path) -> list[str]:
    """-> the files in which two runs differ."""
    left, right = contents(a), contents(b)
    return [name for name in sorted(left.keys() | right.keys()) if left.get(name, ...) != right.get(name, ...)]


class Stage:
    """An uninterrupted run of one stage, and fresh folders for others of it."""

    def __init__(self, name: str, root: Path):
        self.name, self.root, self.folder = name, root, FOLDERS.get(name, name)
        self.whole = root / "whole"
        for needed in {"reward": ["lm"], "rlhf": ["sae"], "interpret": ["sae", "rlhf"]}.get(name, []):
            if not (self.whole / FOLDERS.get(needed, needed) / "metrics.json").exists():
                Stage(needed, root)
        begun = time.monotonic()
        code, told = wait(start(command(name, self.whole)))
        self.seconds = time.monotonic() - begun
        assert code == 0, told

    def fresh(self) -> Path:
        """-> an output folder with what the stage builds on, and nothing of its own."""
        out = self.root / "out"
        shutil.rmtree(out, ignore_errors=True)
        for needed in NEEDS[self.name]:
            shutil.copytree(self.whole / needed, out / needed)
        return out

    def check(self, out: Path) -> None:
        differ = differences(self.whole / self.folder, out / self.folder)
        assert not differ, f"{self.name}: {', '.join(differ)} differ from those of the uninterrupted run"


def kill_and_resume(stage: Stage, kills: int, rng: random.Random) -> str:
    """Kill `kills` times in all -> one line of what happened; AssertionError where a run does not end with the same bits."""
    killed = with_state = torn = runs = 0
    out = None
    while killed < kills or out:
        out = out or stage.fresh()
        child = start(command(stage.name, out))
        if killed < kills:
            time.sleep(rng.uniform(0, stage.seconds))
            os.kill(child[0], signal.SIGKILL)
        code, told = wait(child)
        assert code in (0, -signal.SIGKILL), f"{stage.name}: exit code {code}: {told}"
        if code:
            killed += 1
            left = {path.name for path in (out / stage.folder).glob("*")}
            with_state, torn = with_state + ("state.pt" in left), torn + any(name.endswith(".tmp") for name in left)
        else:
            stage.check(out)
            runs, out = runs + 1, None
    return (f"{stage.name}: {killed} kills in {runs} runs of {stage.seconds:.1f} s; a state was there at {with_state} of them, "
            f"a file half written at {torn}; 0 runs with other bits")


def fill_disk(stage: Stage, writes: list[int], limits: list[int]) -> str:
    """Resume on a disk that is full from the nth file on, then with no room for files beyond a size -> one line of what happened."""
    out, refused = stage.fresh(), []

    def no_room(size: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)                           # so that a write fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    def full_from(number: int) -> None:
        left, fsync = iter(range(number)), os.fsync

        def failing(descriptor: int) -> None:
            if next(left, None) is None:
                raise OSError(28, "No space left on device")
            fsync(descriptor)
        os.fsync = failing

    for prepare in [lambda number=number: full_from(number) for number in writes] + [lambda size=size: no_room(size) for size in limits]:
        had_state = (out / stage.folder / "state.pt").exists()
        code, told = wait(start(command(stage.name, out), prepare))
        if code:
            assert code == 2 and re.fullmatch(r"error: .*: cannot be written \((File too large|No space left on device)\).*", told), told
            refused.append(told.partition(": cannot")[0].rpartition("/")[2])
            assert not list(out.rglob("*.tmp")), "a half-written file was left"
            assert not had_state or (out / stage.folder / "state.pt").exists(), "the state of before is gone"
    code, told = wait(start(command(stage.name, out)))
    assert code == 0, told
    stage.check(out)
    return f"{stage.name}: {len(refused)} full disks, at {', '.join(dict.fromkeys(refused))}; 0 runs with other bits"


def stop_politely(stage: Stage, number: signal.Signals, rng: random.Random) -> str:
    """Ctrl-C or SIGTERM in the middle -> one line of what happened."""
    out = stage.fresh()
    child = start(command(stage.name, out))
    while not (out / stage.folder / "metrics.jsonl").exists():
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.3) * stage.seconds)
    asked = time.monotonic()
    os.kill(child[0], number)
    code, told = wait(child)
    seconds = time.monotonic() - asked
    assert code == 128 + number and told.startswith("stopped") and "\n" not in told and seconds < 15, (code, told)
    assert (out / stage.folder / "state.pt").exists(), "no state was saved"
    assert wait(start(command(stage.name, out)))[0] == 0
    stage.check(out)
    return f"{stage.name}: {number.name} stopped it after {seconds:.2f} s with exit code {code}; 0 runs with other bits"


def sample() -> None:
    """The cheapest of it, for the test suite."""
    rng = random.Random(1)
    with tempfile.TemporaryDirectory() as root:
        stage = Stage("lm", Path(root))
        print(kill_and_resume(stage, 2, rng), fill_disk(stage, [2], []), stop_politely(stage, signal.SIGTERM, rng), sep="\n")


def test_a_sample():
    """In a process of its own: this one's threads do not survive a fork."""
    ended = subprocess.run([sys.executable, "-c", "import kill_test; kill_test.sample()"], cwd=Path(__file__).parent, text=True,
                           env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert ended.returncode == 0 and ended.stdout.count("0 runs with other bits") == 3, ended.stdout + ended.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", default=list(SHORT), metavar="STAGE")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as root:
        for name in args.stages:
            stage = Stage(name, Path(root))
            print(kill_and_resume(stage, args.kills, rng), flush=True)
            print(fill_disk(stage, [0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 2000, 50_000]), flush=True)
            if name != "interpret":                  # which has no state
                print(stop_politely(stage, signal.SIGINT, rng), flush=True)
                print(stop_politely(stage, signal.SIGTERM, rng), flush=True)


if __name__ == "__main__":
    main()
