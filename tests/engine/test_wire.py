"""What is said when the network fails under a wrapper, and what is left as it is."""

import pytest
import torch
import torch.distributed as dist

from wholebatch.core.errors import RankError
from wholebatch.engine.ranks.wire import Wire

GONE = (
    "[/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:11190. This is typically"
)


@pytest.fixture
def wire():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Wire(dist.group.WORLD)
    dist.destroy_process_group()


@pytest.mark.parametrize("error", [RuntimeError(GONE), dist.DistBackendError("NCCL error: remote process exited")])
def test_a_rank_that_is_gone_is_said_so_wherever_it_is_found_out(wire, error):
    with pytest.raises(RankError, match="a rank is gone") as found, wire.watching():
        raise error
    assert found.value.__cause__ is error
    with pytest.raises(RankError, match="cannot go on"):
        wire.require()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        torch.OutOfMemoryError("CUDA out of memory (gloo)"),
        RankError("Rank 1 is lost over gloo.", hint="start again."),
        LookupError("gloo"),
    ],
)
def test_other_errors_leave_as_they_are(wire, error):
    with pytest.raises(type(error)) as found, wire.watching():
        raise error
    assert found.value is error
    assert not wire.is_down(error)
    wire.require()
