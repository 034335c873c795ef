"""main only registers: every command has help, and an error of ours is one line."""

import inspect
import logging

import pytest
from typer.testing import CliRunner

from lorakit.cli.main import app, command
from lorakit.core.errors import BadParameter

RUN = CliRunner()


@pytest.mark.parametrize("name", [c.name for c in app.registered_commands])
def test_every_command_explains_itself(name):
    result = RUN.invoke(app, [name, "--help"])
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) > 4


def test_help_lists_every_command():
    stdout = RUN.invoke(app, ["--help"]).stdout
    assert all(f"  {c.name}" in stdout for c in app.registered_commands)


def test_an_unknown_command_is_told_the_nearest():
    result = RUN.invoke(app, ["sho"])
    assert result.exit_code == 2
    assert "Did you mean 'show'?" in result.stderr


def test_packages_that_nothing_here_runs_in_say_nothing():
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


@pytest.fixture
def failing():
    """A command that fails as ours do, taken back afterwards."""

    def fail(word: str = "x") -> None:
        """Fail."""
        raise BadParameter(f"{word} is\n  not possible")

    command("fail", fail)
    yield fail
    app.registered_commands.pop()


def test_an_error_is_one_line_on_stderr_and_exit_code_2(failing):
    result = RUN.invoke(app, ["fail", "--word", "r=0"])
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", "error: r=0 is not possible\n")


def test_debug_raises(failing, monkeypatch):
    monkeypatch.setenv("LORAKIT_DEBUG", "1")
    assert isinstance(RUN.invoke(app, ["fail"]).exception, BadParameter)


def test_other_exceptions_are_not_hidden(monkeypatch):
    def broken() -> None:
        """A bug."""
        raise ZeroDivisionError

    command("broken", broken)
    try:
        assert isinstance(RUN.invoke(app, ["broken"]).exception, ZeroDivisionError)
    finally:
        app.registered_commands.pop()


def test_the_flags_are_the_signature(failing):
    (registered,) = [c for c in app.registered_commands if c.name == "fail"]
    assert inspect.signature(registered.callback) == inspect.signature(failing)
