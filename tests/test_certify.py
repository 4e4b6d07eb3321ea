"""The certifying binary: its table, rules of one's own, and bad input."""

import pytest
from absl.testing import flagsaver

from experiments import binary, certify
from specjax import types
from specjax.verification import token

WRONG = types.VerificationRule(
    "of one's own", token.rule.check, token.accept, lambda draft, target, node: target[:, 0]
)


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


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--rule=tokn"], "tokn"),
        (["--rule=nowhere:rule"], "nowhere"),
        (["--rule=specjax.trees:__name__"], "VerificationRule"),
        (["--seeds=0"], "--seeds=0"),
        (["--rule=tests.test_certify:REFUSING"], "takes no draft that could be certified"),
    ],
)
def test_bad_input(call, arguments, named):
    code, output, errors = call(*arguments)
    assert code == 2 and output == ""
    assert named in errors.splitlines()[-1]
