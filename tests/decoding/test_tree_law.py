"""Decodes by every ratio rule with every drafter that fits it, against the enumerated law."""

import pytest

from specjax import drafters
from tests.decoding import test_law as law

pytestmark = pytest.mark.optimised

TARGET, DRAFT = law.MODELS["tabular"]
_, OTHER = law.MODELS["recurrent"]
DRAFTERS = {
    "chain": drafters.model(DRAFT, 3),
    "tree": drafters.tree(DRAFT, (2, 1)),
    "tree with replacement": drafters.tree(DRAFT, (2, 1), replacement=True),
    "union": drafters.union(
        drafters.prompt_lookup(2, shortest=1),
        drafters.model(OTHER, 1),
        drafters.tree(DRAFT, (2,), replacement=True),
    ),
    "coupled chain": drafters.model(DRAFT, 3, coupled=True),
}
FITS = {
    "chain": ("multi_candidate", "k_seq", "traversal"),
    "tree": ("multi_candidate", "traversal", "match"),
    "tree with replacement": ("multi_candidate", "k_seq", "traversal"),
    "union": ("multi_candidate", "traversal", "match"),
    "coupled chain": ("coupled", "match"),
}


@pytest.mark.parametrize("name, rule", [(name, rule) for name in FITS for rule in FITS[name]])
def test_decodes_have_the_law_of_the_target(name, rule):
    statistics = law.checked(TARGET, DRAFTERS[name], rule, law.DECODES, law.PLAIN)
    law.assert_unequal_acceptance(statistics)


@pytest.mark.parametrize("rule", ["multi_candidate", "traversal"])
def test_warped_decodes_of_a_union_have_the_warped_law_of_the_target(rule):
    statistics = law.checked(TARGET, DRAFTERS["union"], rule, law.DECODES, law.WARPED)
    law.assert_unequal_acceptance(statistics)
