"""Six assignments, each an extension of one file. Its task stands at the head of its tests:

    python -m pytest tests/assignments --assignment 3              # your code
    python -m pytest tests/assignments --assignment 3 --solution   # the reference solution in its place

solutions/ holds the reference solutions, each with some wrong ones that the tests must tell apart (`tests/test_assignments.py`). A solution
is installed from outside, by the names that the task gives, so that it does not rot when the files around it change.
"""

import pytest


def need(there: bool, what: str) -> None:
    """Fail with one line where the student has not begun."""
    if not there:
        pytest.fail(f"{what}: the task stands at the head of this test file", pytrace=False)
