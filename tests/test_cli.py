"""The command line as a whole: what it knows, what it says when it is interrupted or cannot go on."""

import re
import signal

import pytest

from selfsup import cli


def call(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["selfsup", *arguments])
    return cli.main()


def test_every_command_in_the_usage_is_known(monkeypatch, capsys):
    commands = re.findall(r"^  ([a-z]+(?: [a-z]+)?)", cli.USAGE, re.MULTILINE)
    assert {"train", "probe", "probe linear", "export", "look", "doctor", "data show"} <= set(commands)
    for command in commands:
        try:
            assert call(monkeypatch, *command.split(), "--help") == 0
        except SystemExit as left:  # tyro's way to end after its help
            assert left.code == 0
        assert f"selfsup {command}" in capsys.readouterr().out


def test_an_unknown_command(monkeypatch, capsys):
    assert call(monkeypatch, "data", "shwo") == 2
    assert "unknown command: selfsup data shwo" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fault,code,line",
    [
        (KeyboardInterrupt(), 128 + signal.SIGINT, "interrupted"),
        (OSError(28, "No space left on device", "/x"), 2, "error: [Errno 28] No space left on device: '/x'"),
        (ValueError("first\nsecond"), 2, "error: first\nerror: second"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_fault_is_lines_and_an_exit_code(monkeypatch, capsys, fault, code, line):
    def fail(*_):
        raise fault

    monkeypatch.setattr(cli, "_call", fail)
    assert call(monkeypatch, "embed", "a", "b", "--out", "c.npz") == code
    assert capsys.readouterr().err.startswith(line)
