"""Is the chosen micro-batch a good one, and what does it cost to find? Against an exhaustive sweep, and beside a peer.

For each model a budget is set to what a quarter of the logical batch takes. The accumulator chooses by itself; then
every size of a sweep that stays within the budget is timed, alternating, and the throughput of the choice is compared
with the best. The cost of choosing is the time of the first update above that of a later one, in windows.

Beside it how Accelerate, Lightning and the Hugging Face Trainer find a batch size, on a device that holds so many rows
and no more, from the start and from the middle of training on: how often training began anew, how many rows moved the
weights twice or passed through the model for nothing, and how large the batch of an update is in the end.
"""

import os
import statistics
import sys
import time

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch

import wholebatch as wb
from finders import FINDERS, Device
from page import Bar, arguments, table, tell
from zoo import ZOO, Creature

ROWS = 96
SCENES = {
    "A device that holds 13 rows": lambda: Device(13, 13, 0),
    "A device that holds 13 rows, and 6 once the weights have moved over 150": lambda: Device(13, 6, 150),
}


def seconds_of(creature: Creature, sizes: list[int], rounds: int) -> dict[int, float]:
    """Return the time of an update by its micro-batch: the median of rounds in which the sizes alternate."""
    accumulators = {}
    batch = creature.batch(ROWS)
    for size in sizes:
        torch.manual_seed(0)
        model = creature.build()
        optimizer = creature.optimizer(model.parameters())
        accumulators[size] = wb.Accumulator(
            model, optimizer, creature.loss_fn, micro_batch=wb.Rows(size), check=None, **creature.options
        )
        accumulators[size].step(batch)
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size, accumulator in accumulators.items():
            start = time.process_time()
            accumulator.step(batch)
            times[size].append(time.process_time() - start)
    return {size: statistics.median(each) for size, each in times.items()}


def choice(creature: Creature, budget: int) -> tuple[int, float]:
    """Return the micro-batch that is chosen within a budget, and what that cost, in windows."""
    torch.manual_seed(0)
    model = creature.build()
    optimizer = creature.optimizer(model.parameters())
    accumulator = wb.Accumulator(model, optimizer, creature.loss_fn, memory=budget, check=None, **creature.options)
    batch = creature.batch(ROWS)
    times = []
    for _ in range(4):
        start = time.process_time()
        update = accumulator.step(batch)
        times.append(time.process_time() - start)
    window = statistics.median(times[1:])
    return -(-ROWS // update.micro_batches), times[0] / window - 1


def sweep(creature: Creature, rounds: int) -> tuple[list[str], float, float]:
    """Return a line of the table, the share of the best throughput, and the cost of choosing in windows."""
    torch.manual_seed(0)
    model = creature.build()
    optimizer = creature.optimizer(model.parameters())
    sample = creature.batch(4)
    plan = wb.plan(model, optimizer, creature.loss_fn, sample, ROWS, "8GiB", timed=False)
    budget = round(1.06 * plan.peak_at(ROWS // 4)) + (1 << 16)
    chosen, cost = choice(creature, budget)
    fitting = [size for size in (1, 2, 4, 8, 12, 16, 24, 32, 48, 96) if plan.peak_at(size) <= budget]
    times = seconds_of(creature, sorted({*fitting, chosen}), rounds)
    best = min(times, key=times.__getitem__)
    share = times[best] / times[chosen]
    line = [creature.name, str(chosen), str(best), f"{share:.3f}", f"{cost:.2f}"]
    return line, share, cost


def peers() -> str:
    """Return the tables of what happens where too much is tried at first, and where memory is taken away later."""
    headings = [
        "way",
        "began anew",
        "rows that moved the weights twice",
        "rows run for nothing",
        "batch kept",
        "came to its end",
    ]
    parts = []
    for title, made in SCENES.items():
        rows = [find(made()).row(who) for who, find in FINDERS.items()]
        parts.append(f"{title}:\n\n{table(headings, rows)}")
    return "\n\n".join(parts)


def main() -> int:
    parser = arguments(__doc__, "benchmarks/auto.py")
    parser.add_argument("--only", default="", help="models whose name holds this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 3 if options.quick else 15
    lines, shares, costs = [], [], []
    for creature in [each for each in ZOO if options.only in each.name]:
        line, share, cost = sweep(creature, rounds)
        lines.append(line)
        shares.append(share)
        costs.append(cost)
    found = [
        Bar("throughput of the choice against the best that fits, median", statistics.median(shares), 0.95, most=False),
        Bar("cost of choosing in windows, median", statistics.median(costs), 2.0, digits=2),
    ]
    headings = ["model", "chosen rows", "fastest rows", "throughput of best", "cost, windows"]
    text = f"{table(headings, lines)}\n\n{peers()}"
    packages = ["wholebatch", "torch", "accelerate", "lightning", "transformers"]
    return tell("The micro-batch that is chosen", "auto", options, packages, text, found)


if __name__ == "__main__":
    sys.exit(main())
