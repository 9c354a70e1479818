"""The way to the faster loops, and the environment of workers."""

import os
import subprocess
import sys

from paperlib.extras import fast


def test_the_environment_of_workers_needs_no_torch():
    code = "import sys; from paperlib.extras.fast import WORKER_ENVIRONMENT as e; print(len(e))"
    command = [sys.executable, "-c", code + "; assert 'torch' not in sys.modules"]
    environment = os.environ | fast.WORKER_ENVIRONMENT
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(fast.WORKER_ENVIRONMENT)
    assert not done.stderr  # glibc names settings that it does not know
