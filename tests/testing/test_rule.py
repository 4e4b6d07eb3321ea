"""Every rule against the contract, and the contract's checker against rules that break it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from specjax import testing, trees, types, verification
from specjax.verification import block, coupled, kernel, match, multi_candidate, token

CHAIN, TREE = trees.chain(2), trees.from_parents((0, 0, 2))


@pytest.mark.parametrize("name", sorted(verification.RULES))
def test_rule_keeps_the_contract(name):
    report = testing.check_rule(verification.get(name), jax.random.key(30))
    lines = report.splitlines()
    # Chains and trees, sampled, certain, partly certain, coupled, distinct or dynamic, as far as
    # the rule takes them.
    counts = {"match": 8, "multi_candidate": 6, "traversal": 6, "k_seq": 4, "coupled": 1}
    assert len(lines) == counts.get(name, 2)
    assert all(f"rule '{name}'" in line and ": exact; " in line for line in lines)


# What breaks the contract.


def check(rule, tree=CHAIN, batch=16):
    return testing.check_rule(rule, jax.random.key(31), tree=tree, batch=batch)


def unclipped(draft, target_log_probs):
    return jnp.exp(token.log_ratio(draft, target_log_probs))


def accept_absent(draft, target_log_probs):
    everywhere = dataclasses.replace(draft, present=jnp.ones_like(draft.present))
    return token.accept(everywhere, target_log_probs)


def unmasked(draft, target_log_probs):
    """The mask comes after the difference of infinities: right, and NaN in its gradient."""
    own = kernel.node_log_probs(draft)
    ratio = kernel.parent_laws(draft, target_log_probs) - own
    return jnp.where(
        draft.present & (own > -jnp.inf), jnp.exp(jnp.where(ratio < 0, ratio, ratio * 0)), 0.0
    )


def in_half_precision(draft, target_log_probs):
    return token.accept(draft, target_log_probs).astype(jnp.bfloat16)


def accept_all_that_is_possible(draft, target_log_probs):
    possible = kernel.parent_laws(draft, target_log_probs) > -jnp.inf
    return (draft.present & possible).astype(jnp.float32)


def accept_below_dead_ends(draft, target_log_probs):
    del target_log_probs
    return draft.present.astype(jnp.float32)


def likely(draft, target_log_probs):
    """As typical acceptance does: whatever the target holds likely enough."""
    enough = kernel.parent_laws(draft, target_log_probs) > jnp.log(0.3)
    return (draft.present & enough).astype(jnp.float32)


def target_residual(draft, target_log_probs, node):
    del draft
    return jnp.take_along_axis(target_log_probs, node[:, None, None], axis=1)[:, 0]


def unnormalised(draft, target_log_probs, node):
    return token.residual(draft, target_log_probs, node) - 0.1


def undefined(draft, target_log_probs, node):
    """Divides by the mass of the difference, even where there is none."""
    law = target_residual(draft, target_log_probs, node)
    proposal = kernel.draft_law(draft, jnp.minimum(node + 1, draft.tokens.shape[1]))
    gap = jnp.maximum(jnp.exp(law) - jnp.exp(proposal), 0.0)
    rejected = jnp.any(kernel.children(draft, node), axis=-1, keepdims=True)
    return jnp.where(rejected, jnp.log(gap / jnp.sum(gap, axis=-1, keepdims=True)), law)


def half_a_residual(draft, target_log_probs, node):
    return token.residual(draft, target_log_probs, node).astype(jnp.bfloat16)


def renormalised(draft, target_log_probs, node):
    return jax.nn.log_softmax(match.residual(draft, target_log_probs, node), axis=-1)


def colder(keys, length, draft, target_log_probs):
    return match.draw(keys, length, draft, jax.nn.log_softmax(2 * target_log_probs, axis=-1))


def greedy_draw(keys, length, draft, target_log_probs):
    del keys, length, draft
    return jnp.argmax(target_log_probs, axis=-1).astype(jnp.int32)


def uncoupled_draw(keys, length, draft, target_log_probs):
    return match.draw(keys, length + 1000, draft, target_log_probs)


def careless_where_traced(draft, target_log_probs, state):
    """Token's acceptance, earlier siblings forgotten, on dynamic trees alone."""
    if draft.tree.static_parents is not None:
        return multi_candidate.accept(draft, target_log_probs, state)
    return token.accept(draft, target_log_probs)


def generous_to_certain_nodes(draft, target_log_probs, state):
    accept = multi_candidate.accept(draft, target_log_probs, state)
    certain = (draft.law < 0) & (accept > 0)
    return jnp.where(certain, jnp.sqrt(jnp.where(certain, accept, 1.0)), accept)


def keys_of_others(keys, length, draft, target_log_probs):
    return match.draw(keys[jnp.arange(length.shape[0])[::-1]], length, draft, target_log_probs)


def bytes_of_draws(keys, length, draft, target_log_probs):
    return match.draw(keys, length, draft, target_log_probs).astype(jnp.int8)


def stumble(draft):
    raise KeyError(draft.tree.size)


def fail(draft, target_log_probs):
    raise ValueError(f"no laws of {target_log_probs.shape[2]} tokens for {draft.tree.size} nodes")


def take_anything(draft):
    del draft


def refuse(draft):
    raise ValueError(f"no draft of {draft.tree.size} nodes will do")


@pytest.mark.parametrize(
    "rule, changes, tree, complaint",
    [
        (token.rule, {"accept": unclipped}, CHAIN, "node .: the acceptance .* is no probability"),
        (token.rule, {"accept": accept_absent}, CHAIN, "is above 0 at an absent node"),
        (token.rule, {"accept": unmasked}, CHAIN, "gradient of the outcome law in log . is nan"),
        (token.rule, {"accept": in_half_precision}, CHAIN, "accept gives bfloat16"),
        (token.rule, {"accept": accept_all_that_is_possible}, CHAIN, "texts of 3 tokens is off by"),
        (token.rule, {"accept": accept_below_dead_ends}, CHAIN, "below one after which the target"),
        (token.rule, {"residual": target_residual}, CHAIN, "texts of 3 tokens is off by"),
        (token.rule, {"residual": unnormalised}, CHAIN, "residual after node . has mass 0.904"),
        (token.rule, {"residual": undefined}, CHAIN, "residual after node . has mass nan"),
        (token.rule, {"residual": half_a_residual}, CHAIN, "residual gives bfloat16"),
        (token.rule, {"accept": fail}, CHAIN, "takes sampled drafts .* and fails on them: no laws"),
        (token.rule, {"check": take_anything}, TREE, r"tree \(0, 0, 2\): the law of texts"),
        (token.rule, {"check": stumble}, CHAIN, "check of .* raises KeyError"),
        (block.rule, {"residual": token.residual}, CHAIN, "texts of 3 tokens is off by"),
        (
            match.rule,
            {"residual": renormalised},
            CHAIN,
            "has a token where the target's law has no",
        ),
        (match.rule, {"draw": colder}, CHAIN, "verdicts stop at node . with token ., and by"),
        (
            match.rule,
            {"draw": keys_of_others},
            CHAIN,
            "row .: .* is . under vmap, and . otherwise",
        ),
        (
            multi_candidate.rule,
            {"accept": careless_where_traced},
            trees.from_parents((0, 0)),
            "dynamic trees of 2: the law of texts",
        ),
        (
            multi_candidate.rule,
            {"accept": generous_to_certain_nodes},
            trees.from_parents((0, 0)),
            "partly deterministic drafts .*: the law of texts",
        ),
        (match.rule, {"draw": bytes_of_draws}, CHAIN, r"draw does not give int32\[16, 3\]"),
    ],
)
def test_a_broken_rule_is_found(rule, changes, tree, complaint):
    with pytest.raises(AssertionError, match=f"rule '{rule.name}': .*{complaint}"):
        # As outside these tests, where numbers of unequal kinds mix without a word.
        with jax.numpy_dtype_promotion("standard"):
            check(dataclasses.replace(rule, **changes), tree)


@pytest.mark.parametrize("draw", [greedy_draw, uncoupled_draw])
def test_draws_that_are_not_coupled_to_the_draft_are_found(draw):
    with pytest.raises(AssertionError, match="coupled drafts on .* verdicts stop at node"):
        check(dataclasses.replace(coupled.rule, draw=draw), batch=64)


def test_a_rule_whose_functions_are_made_anew_is_found():
    with pytest.raises(AssertionError, match="accept is .*lambda.*neither a function of a module"):
        check(dataclasses.replace(token.rule, accept=lambda *given: token.accept(*given)))


def test_a_lossy_rule_says_by_how_much():
    lossy = types.VerificationRule(
        "likely", token.check_sampled_chain, likely, target_residual, lossless=False
    )
    assert "lossy, off by 0." in check(lossy)
    with pytest.raises(AssertionError, match="off by 0.*the rule says it is lossless"):
        check(dataclasses.replace(lossy, lossless=True))


def test_a_rule_that_refuses_everything_is_refused():
    with pytest.raises(ValueError, match="refuses every draft: .*no draft of 2 nodes will do"):
        check(dataclasses.replace(token.rule, check=refuse))


@pytest.mark.parametrize(
    "options, shown",
    [
        ({"batch": 12}, "12"),
        ({"vocab_size": 1}, "1 and 64"),
        ({"tree": trees.chain(0)}, "at least one node"),
        ({"tree": trees.dynamic(jnp.zeros((1, 2), jnp.int32), 1)}, "must be static"),
    ],
)
def test_sizes_that_check_nothing_are_refused(options, shown):
    with pytest.raises(ValueError, match=shown):
        testing.check_rule(token.rule, jax.random.key(32), **options)
