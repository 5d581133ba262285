"""The `secateur` command: thin calls of the API, one clear sentence on bad input."""

from __future__ import annotations

import sys
import warnings

from rich.console import Console

from secateur.cli.app import app
from secateur.core.errors import SecateurError

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line; exit status 0 on success, 1 on bad input, 2 on a mistake in the call."""
    warnings.simplefilter("default", UserWarning)
    try:
        app()
    except SecateurError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print("Error:", style="bold red", end=" ")
        print(error, file=sys.stderr)
        sys.exit(1)
