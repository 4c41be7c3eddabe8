"""The command ``convette``: verbs, errors as one line, exit codes."""

import os
import signal
import sys
from typing import Any, NoReturn

import typer

from convette.cli import _state
from convette.cli.catalogue import catalogue
from convette.cli.compare import compare
from convette.cli.cost import cost
from convette.cli.explain import explain
from convette.cli.export import export
from convette.cli.fit import fit
from convette.cli.prune import prune
from convette.cli.quantize import quantize
from convette.cli.recipe import recipe
from convette.cli.show import show
from convette.cli.split import split
from convette.cli.train import train
from convette.errors import ConvetteError, InterruptedRun, did_you_mean

# What the parser raises for an option or value it cannot use; by its version, typer uses click or one of its own.
_Refused: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(
    name="convette",
    help="Small, fast ConvNets, made to measure: data and a budget in, a trained network that fits out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (fit, train, prune, quantize, cost, export, split, explain, compare, show, catalogue, recipe):
    app.command(verb.__name__)(verb)


def _version(value: bool) -> bool:
    if value:
        from convette import __version__

        print(f"convette {__version__}")
        raise typer.Exit
    return value


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Small, fast ConvNets, made to measure: data and a budget in, a trained network that fits out."""


def run(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 failure, 2 usage, 3 bad data, 4 budget out of reach, 5 interrupted."""
    # PyTorch's idle threads spin for milliseconds by default; where other work runs they then starve each other (steps
    # took three times as long, measured with two cores and a load of seven). Read when PyTorch is loaded: set before.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    sys.exit(main(arguments))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code; errors are one line on standard error."""
    _state.set_debug(False)
    _state.set_quiet(False)
    try:
        value = app(args=arguments, prog_name="convette", standalone_mode=False)
        return value if isinstance(value, int) else 0
    except _Refused as error:
        return _fail(_usage(error), error.exit_code, error)
    except (KeyboardInterrupt, typer.Abort) as error:
        return _fail("stopped.", InterruptedRun.exit_code, error)
    except ConvetteError as error:
        return _fail(str(error), error.exit_code, error)
    except BrokenPipeError:
        # The reader (head, less) has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        text = f"{type(error).__name__}: {error}".replace("\n", " ")
        return _fail(f"{text} (a bug, please report it with the output of --debug)", 1, error)
    finally:
        # Who calls this from Python keeps the notes of what comes after.
        _state.set_quiet(False)


def _usage(error: Any) -> str:
    message, context = error.format_message(), getattr(error, "ctx", None)
    wrong = getattr(error, "option_name", None)
    if wrong and context is not None and getattr(error, "possibilities", None) is not None:
        known = [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]
        message = f"{error.message.rstrip('.')}.{did_you_mean(wrong, known)}"
    if context is not None and "Did you mean" not in message:
        message = f"{message.rstrip('.')}. See {context.command_path} --help."
    return message


def _fail(message: str, code: int, error: BaseException) -> int:
    if _state.debug:
        raise error
    # Under torchrun one process speaks for all.
    if os.environ.get("RANK", "0") == "0":
        print(f"convette: {' '.join(message.split())}", file=sys.stderr)
    return code
