"""Signals in processes that a command forks."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import multiprocessing, time
from rayft.flow.interrupt import interrupts

interrupts.install()
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
child.start()
time.sleep(0.2)
child.terminate()
child.join()
print(child.exitcode)
"""


def test_a_forked_process_ends_by_a_signal_without_a_word() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("-15\n", "")
