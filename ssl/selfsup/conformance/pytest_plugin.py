"""pytest --attention-kernel TARGET: the conformance suite as tests, one id a case. Loaded by its entry point.

pytest --attention-kernel mine.py:attention --attention-level full -k "gqa or lse"
"""

from pathlib import Path

import pytest

CASES = Path(__file__).with_name("kernel_cases.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attention kernels (selfsup)")
    group.addoption("--attention-kernel", metavar="TARGET", help="name, module:function or file.py:function")
    group.addoption("--attention-level", default="train", choices=("core", "train", "full"))
    group.addoption("--attention-features", metavar="A,B", help="what the kernel claims; else whatever it accepts")
    group.addoption("--attention-layout", choices=("BHLD", "BLHD", "THD"))
    group.addoption("--attention-device", default="cpu", choices=("cpu", "cuda"))
    group.addoption("--attention-interpret", action="store_true", help="Triton's interpreter; needs TRITON_INTERPRET=1")


def pytest_configure(config: pytest.Config) -> None:
    """The suite's cases instead of the folder's tests, unless paths were named."""
    if config.getoption("--attention-kernel") is None:
        return
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    config.args = [*(config.args if named else []), str(CASES)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "attention_case" not in metafunc.fixturenames:
        return
    from selfsup.conformance.claims import Target  # here, so that other sessions do not load torch
    from selfsup.conformance.run import prepare, select

    option = metafunc.config.getoption
    if option("--attention-interpret"):
        from selfsup.conformance import interpreter

        interpreter.install()
    features = option("--attention-features")
    target = Target(
        option("--attention-kernel"), option("--attention-layout"), features and tuple(features.split(","))
    )
    try:
        kernel, base = prepare(target, option("--attention-device"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    chosen, _ = select(kernel, option("--attention-level"), base, option("--attention-interpret"))
    metafunc.parametrize("attention_case", [(kernel, case) for case in chosen], ids=[case.id for case in chosen])
