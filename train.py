"""Train a recipe: `accelerate launch train.py --config configs/quickstart.yaml [section.key=value ...]`."""

from latentgen.cli.main import run_verb

if __name__ == "__main__":
    run_verb("train")
