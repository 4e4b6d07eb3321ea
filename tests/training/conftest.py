"""Data of a tiny target, and a vocabulary chosen from it; made once."""

import pytest

from specjax.training import shapes
from tests.training import tasks


@pytest.fixture(scope="session")
def held(tmp_path_factory):
    return tasks.make(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tokens(held):
    bundle = tasks.bundle()
    return shapes.vocabulary(held, 120, bundle.target.eos_ids, bundle.config.vocab_size)
