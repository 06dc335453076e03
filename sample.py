"""Draw pictures: `python sample.py "a red circle above a blue square"`."""

from latentgen.cli.main import run_verb

if __name__ == "__main__":
    run_verb("sample")
