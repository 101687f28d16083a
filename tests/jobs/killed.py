"""Runs a job with a fake model again and again, killing it each time at a random moment, then to its end.

    python -m tests.jobs.killed INPUT OUT KILLS SEED [parquet]

Prints how many runs were killed. A process of its own, so that forking meets no threads.
"""

import os
import random
import signal
import sys
import time
import warnings

from ds4jax.jobs.job import Options, run_job
from tests.jobs.fake import Fake


def job(source: str, out: str, parquet: bool) -> None:
    # small shards and a slow model, so that kills meet every kind of moment
    options = Options(shard_bytes=3000, sync_seconds=0.002, parquet=parquet, defaults={"max_tokens": 12})
    run_job([source], lambda: Fake(slots=8, pause=0.0002), out, options)


def main(source: str, out: str, kills: int, seed: int, parquet: bool) -> None:
    rng = random.Random(seed)
    killed = 0
    while killed < kills:
        child = os.fork()
        if child == 0:
            try:
                job(source, out, parquet)
                os._exit(0)
            except BaseException as e:  # noqa: BLE001
                print(repr(e), file=sys.stderr, flush=True)
                os._exit(1)
        time.sleep(rng.expovariate(1 / 0.012))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, "a run failed"
            break  # it was faster
        killed += 1
    job(source, out, parquet)
    print(killed)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if len(sys.argv) > 5:
        import pyarrow.parquet  # noqa: F401 - before forking: it takes longer than a run may live
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), len(sys.argv) > 5)
