"""The configuration of a fit as the command line reads it, without module, data and Trainer."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_optim.cli.command import require_extra
from lightning_optim.cli.merge import plain


class ConfigError(ValueError):
    """A configuration that the command line refuses; the message is for users."""


@dataclass(frozen=True)
class FitConfig:
    """A configuration that has been parsed.

    Args:
        data: ``model``, ``data``, ``trainer`` with the list of callbacks, and the rest, as plain data.
        callbacks: The callbacks of ``trainer.callbacks``.
    """

    data: dict[str, Any]
    callbacks: list[Any]

    def only(self, cls: type) -> Any:
        """Return the callback of a class; None if there is none, or several."""
        found = [callback for callback in self.callbacks if isinstance(callback, cls)]
        return found[0] if len(found) == 1 else None


def read_fit(args: Sequence[str]) -> FitConfig:
    """Return the parsed configuration of ``lightning-optim fit``, with the defaults.

    Types are checked, and callbacks are created, which checks their arguments and those of the optimizer; neither
    module, data nor Trainer are.

    Args:
        args: The command line after ``fit``: ``["--config", "run.yaml", "--optim.lr", "0.1"]``.

    Returns:
        The configuration.

    Raises:
        ConfigError: It is wrong; the message has file, line and key, in at most six lines.
        ModuleNotFoundError: A package of the extra ``cli`` is missing.
    """
    require_extra()
    from jsonargparse import Namespace

    from lightning_optim.cli.optim_cli import Command

    read: list[FitConfig] = []

    class Reader(Command):
        """Reads, and runs nothing."""

        def _set_seed(self) -> None:
            pass

        def instantiate_classes(self) -> None:
            fit, callbacks = self.config.fit, self.config.fit.trainer.get("callbacks")
            made: Any = []
            if callbacks is not None:
                only = Namespace(trainer=Namespace(callbacks=callbacks))  # type: ignore[no-untyped-call]
                made = self._subcommand_parsers["fit"].instantiate_classes(only).trainer.callbacks
            read.append(FitConfig(plain(fit), made if isinstance(made, list) else [made]))

        def _run_subcommand(self, subcommand: str) -> None:
            pass

    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    written = io.StringIO()
    try:
        with redirect_stderr(written):
            Reader.run(["fit", *args])
    except SystemExit:
        raise ConfigError(written.getvalue().strip().removeprefix("error: ")) from None
    return read[0]
