"""`python -m latentgen`: the `latentgen` command."""

from latentgen.cli.main import run

if __name__ == "__main__":
    run()
