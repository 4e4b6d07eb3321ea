"""The checker of whole decodes against drafters and rules that break their promises."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from specjax import drafters, testing, types
from specjax.verification import token
from tests.testing import toys

TARGET = toys.tabular(0)
DRAFTER = drafters.model(toys.tabular(1), 2)


def check(drafter=DRAFTER, **options):
    options = {"rules": ["token"], "new_tokens": 12, **options}
    return testing.check_decoding(drafter, TARGET, jax.random.key(40), toys.PROMPTS, **options)


def accept_all(draft, target_log_probs):
    del target_log_probs
    return draft.present.astype(jnp.float32)


def test_a_rule_that_is_lossy_and_says_lossless_is_found():
    wrong = types.VerificationRule("greedy", token.rule.check, accept_all, token.residual)
    with pytest.raises(AssertionError, match="rule 'greedy': row 0 at temperature 0.0 writes"):
        check(rules=[wrong])
    assert "greedy: acceptance rate 1.000" in check(
        rules=[dataclasses.replace(wrong, lossless=False)]
    )


def test_a_perfect_draft_reaches_full_acceptance_and_another_does_not():
    report = check(drafters.model(TARGET, 2), least_acceptance=0.999)
    assert "acceptance rate 1.000" in report
    with pytest.raises(AssertionError, match="acceptance rate 0.[0-9]*, below 0.999"):
        check(least_acceptance=0.999)


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """Drafts by a key that hangs on the number of rows."""

    def __call__(self, params, state, context, keys):
        shifted = jax.vmap(jax.random.fold_in, (0, None))(keys, keys.shape[0])
        return DRAFTER.propose(params, state, context, shifted)


def test_a_row_that_hangs_on_its_batch_is_found():
    with pytest.raises(AssertionError, match="in the batch, and .* alone"):
        check(dataclasses.replace(DRAFTER, propose=Neighbours()), rules=["block"], new_tokens=24)


def only_a_draft(params, state, context, keys):
    return DRAFTER.propose(params, state, context, keys)[0]


def no_state(params, state, context, draft, verdict, output):
    del params, state, context, draft, verdict, output


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"propose": only_a_draft}, r"propose returned a Draft; it must return \(draft, state\)"),
        ({"update": no_state}, "update returned PyTreeDef.None., and the step began with a state"),
    ],
)
def test_functions_that_return_the_wrong_things_are_told(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        check(dataclasses.replace(DRAFTER, **changes))


def test_drafts_that_no_rule_takes_are_told():
    with pytest.raises(ValueError, match="no rule takes these drafts:\nprompt_lookup, token: ref"):
        check(drafters.prompt_lookup(2, shortest=1))
    with pytest.raises(ValueError, match="at least 2 prompts, got 1"):
        testing.check_decoding(DRAFTER, TARGET, jax.random.key(0), [[1]])
