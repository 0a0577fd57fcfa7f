"""SIGTERM and SIGINT during training: the first asks for the end, the second brings it at once."""

import signal


class StopRequest:
    """False until the process is told to end; then true, and a further signal does what it does by default."""

    def __init__(self) -> None:
        self._asked = False
        self._defaults = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}

    def _ask(self, number: int, _frame: object) -> None:
        self._asked = True
        for other, default in self._defaults.items():
            signal.signal(other, default)

    def __bool__(self) -> bool:
        return self._asked
