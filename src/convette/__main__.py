"""``python -m convette``: the command line."""

from convette.cli.main import run

if __name__ == "__main__":
    run()
