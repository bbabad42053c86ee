"""What does the C library do with memory that was freed? On a CPU it is kept for the next micro-batch."""

from functools import cache

import torch

from wholebatch.engine import memory


@cache
def keep_freed_blocks() -> None:
    """Let the C library see a large block come and go, once in a process.

    From then on glibc does not give freed blocks of up to this size back to the system at once, as it would have learnt
    from the first tensor that is as large. What a micro-batch frees is needed by the next one, and fresh pages cost up
    to a tenth of its time. Nothing writes to the block, so it takes no memory; where even addresses are short, there is
    nothing to keep.

    Source:
        M_MMAP_THRESHOLD and M_TRIM_THRESHOLD in mallopt(3).
    """
    try:
        torch.empty(_LARGE_BLOCK, dtype=torch.uint8, device="cpu")
    except Exception as error:
        if not memory.is_out_of_memory(error):
            raise


_LARGE_BLOCK = (32 << 20) - (64 << 10)
"""The largest block from which glibc learns, less its own needs. Unit: bytes."""
