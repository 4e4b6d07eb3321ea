"""The certifying binary: its table, rules of one's own, and bad input."""

import dataclasses

import jax.numpy as jnp
import pytest
from absl.testing import flagsaver

from experiments import binary, certify
from specjax import types
from specjax.verification import match, token

WRONG = types.VerificationRule(
    "of one's own", token.rule.check, token.accept, lambda draft, target, node: target[:, 0]
)


def most_probable(keys, length, draft, target_log_probs):
    del keys, length, draft
    return jnp.argmax(target_log_probs, axis=-1).astype(jnp.int32)


# Its laws are right, and it does not draw from them.
MOST_PROBABLE = dataclasses.replace(match.rule, draw=most_probable, name="most probable")


def refuse(draft):
    raise ValueError("never")


REFUSING = types.VerificationRule("refusing", refuse, token.accept, token.residual)


@pytest.fixture
def call(capsys):
    def run(*arguments):
        with flagsaver.flagsaver():
            code = 0
            try:
                certify.main(binary.parse_flags(["certify", "--compilation_cache=", *arguments]))
            except SystemExit as end:
                code = end.code
        return (code, *capsys.readouterr())

    return run


def test_a_rule_of_ones_own_that_is_not_exact(call):
    code, output, errors = call("--rule=tests.test_certify:WRONG", "--seeds=1")
    assert code == 1, errors
    assert "NOT EXACT" in output and "of one's own" in output


def test_a_rule_that_is_exact_and_its_draws(call):
    code, output, errors = call("--rule=token", "--seeds=1", "--draws=50000")
    assert code == 0, errors
    assert "lossless: all exact" in output and "NOT" not in output
    assert "50,000 draws on a chain of 2" in output and "token 1.1111 = 10/9" in output
    (refusals,) = [line for line in output.splitlines() if "refuses everywhere" in line]
    always, _, on_some = refusals.partition("; on some trees: ")
    assert "traced tree" in always and "certain" in always and "sampled" in on_some


def test_draws_that_do_not_have_their_law(call):
    code, output, errors = call("--rule=tests.test_certify:MOST_PROBABLE", "--seeds=1")
    assert code == 1, errors
    assert "NOT THE LAW" in output and "NOT EXACT" not in output


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--rule=tokn"], "tokn"),
        (["--rule=nowhere:rule"], "nowhere"),
        (["--rule=specjax.trees:__name__"], "VerificationRule"),
        (["--rule=specjax.verification.token:residual"], "calling it without arguments fails"),
        (["--seeds=0"], "--seeds=0"),
        (["--rule=tests.test_certify:REFUSING"], "takes no draft that could be certified"),
    ],
)
def test_bad_input(call, arguments, named):
    code, output, errors = call(*arguments)
    assert code == 2 and output == ""
    assert named in errors.splitlines()[-1]
