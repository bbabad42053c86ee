"""How often did it step? Once a window, and the schedule with it, is right."""

from wholebatch.engine.checks.causes import Cause
from wholebatch.evidence.certificate.measured import Measured


def miscounts(measured: Measured) -> list[Cause]:
    """Return what is wrong with the number of steps."""
    first = measured.windows[0]
    causes = []
    stepping = next((each for each in measured.windows if len(each.found.steps) > 1), None)
    if stepping is not None:
        causes.append(
            Cause(
                "optimizer stepped per micro-batch",
                f"The optimizer stepped {len(stepping.found.steps)} times in a window of {stepping.number} "
                "micro-batches.",
                "step once, after the last micro-batch: move the line out of the loop.",
                measured.say(stepping.line("stepped")),
            )
        )
    late = next((each for each in measured.windows if not each.found.steps), None)
    if late is first:
        causes.append(
            Cause(
                "no update",
                f"The optimizer never stepped in a window of {first.number} micro-batches"
                + (", although the weights moved." if first.found.moved else "."),
                "call optimizer.step() once, after the last micro-batch, on the optimizer that the step is given.",
                measured.say(measured.added),
            )
        )
    elif late is not None:
        causes.append(
            Cause(
                "ragged last window",
                f"A window of {late.number} micro-batches ended without an update, where one of {first.number} had "
                "one: what it has gathered is lost, or leaks into the next.",
                "step at the end of every window, also of one that is shorter.",
                measured.say(first.line("stepped")),
            )
        )
    often = max(measured.windows, key=lambda each: each.found.schedule_steps)
    if often.found.schedule_steps > 1:
        causes.append(
            Cause(
                "scheduler per micro-batch",
                f"The schedule was stepped {often.found.schedule_steps} times in a window of {often.number} "
                "micro-batches, which is one update.",
                "step it once an update, next to optimizer.step().",
                measured.say(often.line("scheduled")),
            )
        )
    return causes
