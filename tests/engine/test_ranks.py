"""Several ranks are refused, not silently trained on the rows of one."""

import subprocess
import sys
import textwrap

RANK = """
    import sys
    import torch
    import wholebatch as wb

    rank, store = int(sys.argv[1]), sys.argv[2]
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = torch.nn.Linear(2, 1)
    try:
        wb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1))
    except wb.OptimizerError as error:
        print(error)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


def test_a_process_among_several_ranks_is_refused(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(RANK)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for rank in ranks:
        said, _ = rank.communicate(timeout=120)
        assert rank.returncode == 0
        assert "one of 2 ranks" in said
        assert "hint: train in one process" in said
