"""Run the command line as `python -m kvdock`."""

import sys

from kvdock.cli import main

sys.exit(main())
