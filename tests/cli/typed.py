"""A command as a user types it."""

from typer.testing import CliRunner

from lorakit.cli.main import app


def run(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == code, (result.output, result.exception)
    return result.output
