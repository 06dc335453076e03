"""`train.py` that writes down its draws: what the launchers of several processes start in the tests."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recorder import record

from latentgen.cli.main import run_verb

if __name__ == "__main__":
    record(os.environ["DRAWS_FOLDER"])
    run_verb("train")
