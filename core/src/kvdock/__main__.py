"""Run the command line as `python -m kvdock`."""

from kvdock.cli import main

main()
