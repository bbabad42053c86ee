"""What time is it? The clock by which passes are compared, the same on a machine that is busy with other things."""

import time

import torch


def now(device: torch.device) -> float:
    """Return the time. Unit: seconds, from no moment in particular.

    One thread's own time is the same on a busy machine. That of several adds up and tells nothing, so there it is the
    time that passes, as on a device.

    Args:
        device: Where passes run.

    Example:
        >>> now(torch.device("cpu")) <= now(torch.device("cpu"))
        True
    """
    one = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if one else time.perf_counter()
