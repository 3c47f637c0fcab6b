"""The console script: parses arguments, runs one command, turns exceptions into exit codes.

Data goes to standard output, progress and messages to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from tenpak import __version__, _core
from tenpak.cli import (
    bench,
    calibrate,
    codecs,
    compress,
    decompress,
    delta,
    doctor,
    eval,
    generate,
    inspect,
    materialize,
    tune,
    verify,
)
from tenpak.errors import TenpakError

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

_COMMANDS = (
    compress,
    decompress,
    inspect,
    verify,
    delta,
    materialize,
    calibrate,
    tune,
    eval,
    generate,
    bench,
    codecs,
    doctor,
)

_EPILOG = """\
examples:
  tenpak compress --input tests/data/tiny-llama --output tiny.tenpak
  tenpak inspect tiny.tenpak
  tenpak decompress --input tiny.tenpak --output tiny-restored

exit codes:
  0    done
  1    an error in Tenpak itself (TENPAK_DEBUG=1 shows where)
  2    a wrong request: an unknown option or codec, an output that exists or is the input
  3    a model that cannot be read, or that holds NaN or infinity
  4    a damaged artifact
  5    valid, but of a kind or version that this build does not know
  6    the file system refused: no such file, no space, no permission
  130  interrupted; nothing is left half-written
"""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps paragraphs as they are written; a name as long as `materialize` leaves room for its summary."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            # argparse forgets that commands are indented below their heading.
            self._action_max_length += 2


class _Parser(argparse.ArgumentParser):
    """Help and the version are output, and what cannot be written is said; argparse would hide it."""

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        if file is sys.stdout:
            print(message, end="", flush=True)
        else:
            super()._print_message(message, file)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    main = _Parser(
        prog="tenpak",
        description="Shrink language-model weights to one small file, and read them back.",
        epilog=_EPILOG,
        formatter_class=_Help,
    )
    main.add_argument("--version", action="version", version=f"tenpak {__version__}")
    commands = main.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in _COMMANDS:
        name = module.__name__.rsplit(".", 1)[1]
        summary, _, rest = (module.__doc__ or "").partition("\n\n")
        command = commands.add_parser(
            name,
            help=summary.split(": ", 1)[1],
            description=summary.split(": ", 1)[1],
            epilog=rest,
            formatter_class=_Help,
        )
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
        command.set_defaults(run=module.run)
    return main


def main(argv: list[str] | None = None) -> int:
    """Runs the console script; returns its exit code."""
    # Closed by who called: what would be printed goes nowhere.
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            # A name that the terminal's encoding lacks is no reason to fail.
            stream.reconfigure(errors="backslashreplace")
    codes = dict(_core.exit_codes())
    # As for Ctrl-C; a terminal that is closed says SIGHUP, but to nobody who has asked not to hear it.
    heard = [signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        heard.append(signal.SIGHUP)
    previous = [(number, signal.signal(number, _terminate)) for number in heard]
    try:
        arguments = parser().parse_args(argv)
        arguments.run(arguments)
        sys.stdout.flush()
        return 0
    except TenpakError as error:
        return _fail(str(error), codes[type(error).__name__])
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was left half-written", codes["InterruptedByUser"])
    except BrokenPipeError:
        # Whoever read the output has seen enough.
        _drop_output()
        return 0
    except MemoryError:
        return _fail("not enough memory", codes["StorageError"])
    except OSError as error:
        # Paths have been named where they were opened; without one it is what was printed.
        if error.filename:
            return _fail(str(error), codes["StorageError"])
        _drop_output()
        return _fail(f"cannot write standard output: {error.strerror}", codes["StorageError"])
    except SystemExit:
        raise
    except BaseException as error:
        # A panic of the extension is no `Exception`.
        if os.environ.get("TENPAK_DEBUG"):
            raise
        return _fail(f"internal error ({type(error).__name__}: {error}); TENPAK_DEBUG=1 shows where", 1)
    finally:
        for number, handler in previous:
            signal.signal(number, handler)


def _terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _drop_output() -> None:
    """What is still to be written goes nowhere: Python would try again when it ends, and complain."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> int:
    # The code says it, too, where nothing can be written.
    with contextlib.suppress(OSError):
        print(f"tenpak: {message}", file=sys.stderr, flush=True)
    return code
