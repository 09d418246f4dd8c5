"""`pulid` as an operator runs it."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager


@contextmanager
def pulid(environment, *words):
    """The command with these words, from when it says that it is ready; in the end stopped as an operator stops it."""
    command = [sys.executable, "-c", "from cluster.cli import main; main()", *words]
    with subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert any(line.startswith("Ready") for line in process.stdout)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.stdout.read()
