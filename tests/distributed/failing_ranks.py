"""Run under the launcher: a training run in which the processes RANKS ("0 1", "1") are given a key that does not exist.

usage: failing_ranks.py RANKS SECONDS key=value …, SECONDS being how long a process leaves the telling to the main one
"""

from __future__ import annotations

import os
import sys

from mrpo import run

if __name__ == "__main__":
    launched, ranks, seconds, *arguments = sys.argv[1:]  # the launcher puts --local_rank first
    run.ALONE_AFTER = float(seconds)
    wrong = ["no.such_key=1"] if os.environ["RANK"] in ranks.split() else []
    run.main([launched, *arguments, *wrong])
