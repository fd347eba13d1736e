"""`python -m kvdock_bench.harness`: the same as `kvdock lm-eval`."""

import sys

from kvdock_bench.harness.command import main

main(sys.argv[1:])
