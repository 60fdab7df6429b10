"""What the test files share: tiny random models, a tokenizer of single characters, and a run that dies halfway."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))       # so that a plain `pytest` finds the modules, too

import pytest
import torch

from files import UserError
from pythia import Pythia, PythiaConfig
from run import Run

CONFIG = PythiaConfig(vocab_size=64, hidden_size=32, num_layers=4, num_heads=4, intermediate_size=64, max_positions=64,
                      rotary_pct=0.5)


def pytest_addoption(parser):
    """Used in assignments/conftest.py."""
    parser.addoption("--assignment", type=int, choices=range(1, 7), help="run the tests of one of the assignments (README), 1 to 6")
    parser.addoption("--solution", action="store_true", help="with --assignment: the reference solution in place of your code")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path_factory):
    """No test reads or writes the user's cache of models, nor asks for a network."""
    for name in ("HF_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.getbasetemp() / "no-hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def random_model(dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> Pythia:
    """A frozen model, all parameters random and large enough for every part to matter."""
    model, generator = Pythia(PythiaConfig(**{**vars(CONFIG), **changes})), torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3 + ("norm" in name and name.endswith("weight"))
    return model.to(dtype).requires_grad_(False).eval()


def random_tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def complaint(function, *arguments, **options) -> str:
    """-> the message of the UserError that the call must raise, one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Characters:
    """A tokenizer: a token a character, its id the character's code; id 0 is end-of-text."""
    end_of_text = 0

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids) -> str:
        return "".join(chr(i) for i in ids)


class KilledRun(Run):
    """A run that dies when its state is to be saved the nth time: that step is in the log already, but not in the saved state."""

    def __init__(self, folder: Path, dies_at: int):
        super().__init__(folder, {}, resume=False)
        self.left = dies_at

    def checkpoint(self, step, seconds, **parts):
        self.left -= 1
        if not self.left:
            self.lock.close()                        # as the kernel does for a process that ends
            raise KeyboardInterrupt
        super().checkpoint(step, seconds, **parts)


def killed_and_resumed(folder: Path, dies_at: int, train) -> tuple[object, Run]:
    """-> what train(run) returns in the resumed run, after it was killed once, and that run."""
    with pytest.raises(KeyboardInterrupt):
        train(KilledRun(folder, dies_at))
    assert (folder / "state.pt").exists() and len(Run(folder, {}, resume=True).rows()) > 0
    run = Run(folder, {}, resume=True)
    return train(run), run
