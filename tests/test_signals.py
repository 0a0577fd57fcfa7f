"""The first signal asks for the end, the second brings it at once."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = """
import os, sys
from dsv2_jax.signals import StopRequest
stop, first, second = StopRequest(), *map(int, sys.argv[1:])
assert not stop
os.kill(os.getpid(), first)
assert stop
print("asked", flush=True)
os.kill(os.getpid(), second)
print("still here")
"""


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_at_once(first, second):
    ended = subprocess.run([sys.executable, "-c", PROGRAM, str(first.value), str(second.value)], cwd=ROOT, capture_output=True)
    assert ended.stdout == b"asked\n"
    assert ended.returncode == -second  # Python too ends by the signal that it was interrupted with
