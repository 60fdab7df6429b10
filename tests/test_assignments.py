"""The assignments themselves: each one's tests pass with its reference solution, and fail without it and with each wrong one."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TESTS = {int(path.name.split("_")[1]): f"assignments.{path.stem}" for path in sorted((HERE / "assignments").glob("test_*.py"))}


@pytest.fixture(params=TESTS, ids=str)
def number(request) -> int:
    """The number of an assignment that nobody has begun in this tree: only then can it be said what fails without a solution."""
    try:
        parts(request.param)[0].wanted()
    except pytest.fail.Exception:
        return request.param
    except Exception:
        pass
    pytest.skip(f"somebody is at work on assignment {request.param}")


def parts(number: int) -> tuple:
    """-> the modules of an assignment's tests and of its solutions."""
    return importlib.import_module(TESTS[number]), importlib.import_module(f"assignments.solutions.solution_{number}")


def failure(tests, tmp_path: Path) -> str:
    """Run a module's test functions, up to the first that fails -> its name and message; empty where all pass."""
    for name, test in [pair for pair in vars(tests).items() if pair[0].startswith("test_")]:
        try:
            test(**dict.fromkeys(inspect.signature(test).parameters, tmp_path))
        except (Exception, pytest.fail.Exception) as error:
            return f"{name}: {type(error).__name__}: {error}"
    return ""


def test_the_reference_solution_passes(number, monkeypatch, tmp_path):
    tests, solutions = parts(number)
    solutions.install(monkeypatch)
    assert failure(tests, tmp_path) == ""


def test_without_a_solution_it_fails(number, tmp_path):
    assert "the task stands at the head of this test file" in failure(parts(number)[0], tmp_path)


def test_wrong_solutions_fail(number, tmp_path):
    tests, solutions = parts(number)
    assert len(solutions.WRONG) >= 3
    for what, install in solutions.WRONG.items():
        with pytest.MonkeyPatch.context() as patch:
            install(patch)
            assert failure(tests, tmp_path), f"passes: {what}"


def test_the_task_is_told(number):
    """The head of an assignment's tests names its file, expected length, and hints."""
    text = parts(number)[0].__doc__
    first = text.split("\n")[0]
    assert first.startswith(f"Assignment {number}: ") and "File: " in first and "lines." in first and "Hints: " in text


def test_the_command_line():
    """--assignment runs one's tests and skips the others; --solution puts the reference solution in place."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/assignments", "--assignment", "4", "--solution"]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0 and re.match(r"4 passed, \d+ skipped", done.stdout.splitlines()[-1]), done.stdout + done.stderr
