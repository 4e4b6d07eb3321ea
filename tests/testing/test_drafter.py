"""Every drafter keeps the contract, and so do toys of kinds that the library has none of yet."""

import jax
import pytest

from specjax import drafters, testing
from tests.cases import exhaustive
from tests.testing import toys

DRAFTERS = {
    "lookup": lambda: (drafters.prompt_lookup(4, shortest=1), toys.tabular(0)),
    "lookup of short matches": lambda: (
        drafters.prompt_lookup(3, shortest=2, longest=3),
        toys.state_space(0),
    ),
    "model": lambda: (drafters.model(toys.tabular(1), 3), toys.transformer(0)),
    "recurrent model, stopping": lambda: (
        drafters.model(toys.state_space(1), 3, stop_below=0.4),
        toys.tabular(0),
    ),
    "greedy model": lambda: (drafters.model(toys.tabular(1), 2, greedy=True), toys.state_space(0)),
    "transformer": lambda: (drafters.model(toys.transformer(1), 2), toys.tabular(0)),
    "coupled model": lambda: (
        drafters.model(toys.tabular(1), 3, coupled=True),
        toys.transformer(0),
    ),
    "tree": lambda: (drafters.tree(toys.transformer(1), (3, 2, 1)), toys.tabular(0)),
    "tree with replacement": lambda: (
        drafters.tree(toys.state_space(1), (2, 2), replacement=True),
        toys.transformer(0),
    ),
    "greedy tree": lambda: (drafters.tree(toys.tabular(1), (2, 2), greedy=True), toys.tabular(0)),
    "union": lambda: (
        drafters.union(
            drafters.prompt_lookup(3, shortest=1),
            drafters.model(toys.tabular(1), 2),
            drafters.tree(toys.transformer(1), (2, 1), replacement=True),
        ),
        toys.tabular(0),
    ),
    "union of dynamic trees": lambda: (
        drafters.union(toys.grown(), drafters.model(toys.tabular(1), 2)),
        toys.tabular(0),
    ),
    "siblings": lambda: (toys.pair("independent"), toys.tabular(0)),
    "distinct siblings": lambda: (toys.pair("distinct"), toys.tabular(0)),
    "dynamic trees": lambda: (toys.grown(), toys.tabular(0)),
    "reader of features": lambda: (toys.reader(), toys.transformer(0)),
}


# What differs from another in nothing but the model behind it, or in how its model draws.
_SAID_AGAIN = {
    "lookup of short matches",
    "recurrent model, stopping",
    "greedy model",
    "transformer",
    "tree with replacement",
    "greedy tree",
    "siblings",
}


def marked(names):
    return [exhaustive(name) if name in _SAID_AGAIN else name for name in names]


@pytest.mark.parametrize("name", marked(DRAFTERS))
def test_drafter_keeps_the_contract(name):
    drafter, target = DRAFTERS[name]()
    testing.check_drafter(drafter, target, jax.random.key(20), prompts=toys.PROMPTS)


# The others differ from these in nothing that a text could show.
@pytest.mark.parametrize(
    "name", marked(sorted({*DRAFTERS} - {"lookup of short matches", "transformer"}))
)
def test_whole_decodes_by_every_rule(name):
    drafter, _ = DRAFTERS[name]()
    target = toys.transformer(0) if drafter.taps else toys.tabular(0)
    report = testing.check_decoding(drafter, target, jax.random.key(25), toys.PROMPTS)
    assert f"{drafter.name}, match: acceptance rate" in report


def test_prompts_are_made_up_where_none_are_given():
    testing.check_drafter(
        drafters.prompt_lookup(3, shortest=1), toys.tabular(0), jax.random.key(21)
    )
