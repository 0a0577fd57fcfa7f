"""How a command starts and ends: flags parsed, bad input told in one line with exit code 2."""

import errno
import os
import sys
from collections.abc import Callable, Sequence

import jax
from absl import app, flags, logging

from dsv2_jax.fields import InputError

HELP = {"--help", "-h", "--helpshort", "--helpfull"}
# What a path or a disk of the user's may answer; any other error of the system is a bug.
USERS = {
    getattr(errno, name)
    for name in [
        "ENOSPC",
        "EDQUOT",
        "EFBIG",
        "EACCES",
        "EPERM",
        "EROFS",
        "ENOTDIR",
        "ENAMETOOLONG",
        "EISDIR",
        "ENOENT",
        "ELOOP",
        "EEXIST",
    ]
}


def run(main: Callable[..., None], arguments: Sequence[str] = ()) -> None:
    """Parses the flags and runs `main` with the arguments beside them, which `arguments` names.

    Exit codes: 0 done, 2 bad arguments or input (one line), 1 a bug (a traceback).
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS([argument for argument in argv if argument not in HELP])
            if set(argv) & HELP:
                app.usage(shorthelp=True)
                sys.exit(0)
        except flags.Error as error:
            _leave(str(error))
        given = rest[1:]
        if len(given) > len(arguments):
            _leave(f"unexpected argument {given[len(arguments)]!r}: other arguments are flags, --name=value")
        if len(given) < len(arguments):
            _leave(f"missing argument {arguments[len(given)]}")
        return rest

    def guarded(argv: list[str]) -> None:
        logging.set_verbosity(logging.FATAL)  # libraries narrate, and log errors that they also raise
        try:
            main(*argv[1:])
        except InputError as error:
            _leave(str(error))
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:  # `| head`: the reader has gone, and nobody is left to tell
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except OSError as error:
            if error.errno not in USERS or (error.filename is None and error.errno != errno.ENOSPC):
                raise
            _leave(f"{error.filename or 'output'}: {os.strerror(error.errno).lower()}")

    logging.set_verbosity(logging.WARNING)  # JAX tells at INFO which accelerators it did not find
    app.run(guarded, flags_parser=parse)


def cache_compilations() -> None:
    """Keeps compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or the user's cache directory."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "dsv2_jax"))


def _leave(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
