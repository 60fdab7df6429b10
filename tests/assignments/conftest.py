"""--assignment N chooses whose tests run, --solution puts the reference solution in place of the student's code (see ../conftest.py)."""

import importlib
from pathlib import Path

import pytest


def number_of(path: Path) -> int:
    """-> N of tests/assignments/test_N_….py"""
    return int(path.name.split("_")[1])


def pytest_collection_modifyitems(config, items):
    chosen = config.getoption("--assignment")
    for item in items:
        if item.path.parent == Path(__file__).parent and number_of(item.path) != chosen:
            item.add_marker(pytest.mark.skip(reason=f"an assignment: --assignment {number_of(item.path)} runs its tests"))


@pytest.fixture(autouse=True)
def solution(request, monkeypatch):
    """The reference solution, where it was asked for."""
    if request.config.getoption("--solution"):
        importlib.import_module(f"assignments.solutions.solution_{number_of(request.path)}").install(monkeypatch)
