"""SIGTERM and SIGINT during training: the first asks for the end, the second brings it at once."""

import signal

# Not what was there before: a shell has its programs in the background ignore SIGINT.
DEFAULTS = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}


class StopRequest:
    """False until the process is told to end; then true, and a further signal does what it does by default."""

    def __init__(self) -> None:
        self._asked = False
        for number in DEFAULTS:
            signal.signal(number, self._ask)

    def _ask(self, number: int, _frame: object) -> None:
        self._asked = True
        for other, default in DEFAULTS.items():
            signal.signal(other, default)

    def __bool__(self) -> bool:
        return self._asked
