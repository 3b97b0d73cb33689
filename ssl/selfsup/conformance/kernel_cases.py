"""What pytest_plugin.py collects: one test, parametrised over the cases."""

import pytest

from selfsup.conformance.run import BAD, run_case


def test_attention(attention_case, pytestconfig):
    kernel, case = attention_case
    result = run_case(kernel, case, seed=0, device=pytestconfig.getoption("--attention-device"))
    if result.verdict == "REFUSED":
        pytest.skip(f"refused: {result.detail}")
    if result.verdict in BAD:
        pytest.fail(
            f"{result.verdict} {result.id}: {result.detail}\nresembles: {result.cites}\n\n{result.reproducer or ''}",
            pytrace=False,
        )
