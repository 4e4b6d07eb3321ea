"""Cases that a test takes."""

import pytest

__all__ = ["exhaustive"]


def exhaustive(*values):
    """A case that says again, at length, what another case of the same test says."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)
