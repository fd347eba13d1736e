"""The entry of the command `kvdock`: an error becomes one message and an exit code."""

from __future__ import annotations

import sys

from kvdock.errors import KVDockError

INTERRUPTED = 130
FAILED = 2


def main() -> int:
    """Run the command line; an error the user can act on is one message and exit code 2."""
    try:
        _run(sys.argv[1:])
    except KVDockError as error:
        print(f"kvdock: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("kvdock: interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as end:
        # how typer reports Ctrl-C
        if end.code == INTERRUPTED:
            print("kvdock: interrupted", file=sys.stderr)
        raise
    return 0


def _run(arguments: list[str]) -> None:
    if arguments == ["list"]:
        from kvdock.cli_list import print_methods

        print_methods()
        return
    from kvdock.cli_app import OWN, app
    from kvdock.registry import default_host

    # a broken package of commands must not touch the core's own
    if not set(arguments[:1]) & OWN:
        for reason in default_host().add_commands(app).values():
            print(f"kvdock: {reason}", file=sys.stderr)
    app()
