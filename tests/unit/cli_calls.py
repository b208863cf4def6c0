"""Calls of one verb of `moc-ckpt` in this process, and what they must print."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from typer.testing import CliRunner

from moc_ckpt.cli.main import app


@dataclass(frozen=True)
class Verb:
    """One verb.

    Attributes:
        name: of the verb.
        env: environment variables of its calls.
        errors: types of the errors that it refuses with; any if there are none.
    """

    name: str
    env: dict[str, str] = field(default_factory=dict)
    errors: tuple[str, ...] = ()

    def run(self, *args: object) -> tuple[int, str, str]:
        """Returns exit status, standard output and standard error."""
        result = CliRunner().invoke(app, [self.name, *map(str, args)], env=self.env)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout, result.stderr

    def data(self, *args: object) -> dict[str, Any]:
        """Returns what it prints as JSON; it must succeed."""
        code, out, err = self.run(*args, "--json")
        assert (code, err) == (0, ""), err
        found = json.loads(out)
        assert isinstance(found, dict)
        return found

    def text(self, *args: object) -> str:
        """Returns what it prints, on one line; it must succeed."""
        code, out, err = self.run(*args)
        assert (code, err) == (0, ""), err
        return " ".join(out.split())

    def refused(self, *args: object, status: int = 2) -> str:
        """Returns the error of a run that must fail, alike on the screen and in JSON."""
        code, out, err = self.run(*args)
        assert (code, out) == (status, ""), (code, out, err)
        code, out, _ = self.run(*args, "--json")
        error = json.loads(out)["error"]
        assert code == status
        assert not self.errors or error["type"] in self.errors
        for part in (error["what"], error["where"], error["fix"]):
            assert part in err
        return " | ".join(error.values())
