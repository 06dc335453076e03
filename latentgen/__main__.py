"""`python -m latentgen`, for launchers of several processes: `accelerate launch -m latentgen data cache ...`."""

from latentgen.cli.main import run

if __name__ == "__main__":
    run()
