"""`python -m tests.faults.victim SCRIPT ...` or `... -m accelerate.commands.launch ...`: a forked process with a kill point."""

from __future__ import annotations

import os
import sys

from tests.faults.kill_point import install
from tests.warm_processes import run_words

if __name__ == "__main__":
    os.setpgrp()
    install()
    run_words(sys.argv[1:])
