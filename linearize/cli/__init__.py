"""The `linearize` command: one module per subcommand, each importing torch only when it runs."""

from __future__ import annotations

import sys


def main() -> None:
    """The entry of the console script: run the command line and exit with its status."""
    try:
        from linearize.cli.app import run

        status = run()
    except KeyboardInterrupt:  # during the imports; `run` handles it afterwards
        status = 130
    sys.exit(status)
