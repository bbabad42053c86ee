"""How are several ranks started on this machine? By torchrun's own launcher, with the same arguments."""

import logging
import os
import signal
from collections.abc import Sequence

from wholebatch.cli.edge import DONE, ENDED_BY_CTRL_C, FAILED, WRONG_INPUT
from wholebatch.core.errors import ConfigError


def require_launcher(nproc: int) -> None:
    """Refuse to start ranks from a rank.

    Raises:
        ConfigError: This process was itself started as one of several.
    """
    if "RANK" in os.environ:
        raise ConfigError(
            f"--nproc {nproc} starts ranks, and this is rank {os.environ['RANK']} of {os.environ.get('WORLD_SIZE')}.",
            hint="leave out --nproc under torchrun, which says by itself how many processes there are.",
        )


def launch(nproc: int, arguments: Sequence[str]) -> int:
    """Run ``wholebatch`` in so many processes, and wait for all of them.

    As ``torchrun --standalone --nproc-per-node N -m wholebatch ...`` does, but what went wrong is said by the ranks
    alone, and the exit code is theirs.

    Args:
        nproc: How many processes.
        arguments: Those of each.

    Returns:
        0 if all ended well, 2 if one found its input wrong, 130 after Ctrl-C, else 1.
    """
    # torchrun would leave each rank a single thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):  # each has a level of its own
            logging.getLogger(name).setLevel(logging.CRITICAL)
    command = ["--standalone", "--nproc-per-node", str(nproc), "-m", "wholebatch", *arguments]
    try:
        run.run(run.parse_args(command))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        return next((code for code in (WRONG_INPUT, ENDED_BY_CTRL_C) if code in codes), FAILED)
    except SignalException as stopped:
        return ENDED_BY_CTRL_C if stopped.sigval == signal.SIGINT else FAILED
    return DONE


def rest_while_waiting() -> None:
    """Let threads of PyTorch sleep while they wait, unless the user has said otherwise. Needed before it is loaded.

    Spinning, the default of OpenMP, costs most of a core as soon as anything else runs on the machine: on two busy
    cores the text recipe trained 5 times as slow.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
