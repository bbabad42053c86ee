"""What did a run achieve? Key figures, each with the sentence that it stands in."""

import math
import re
from dataclasses import dataclass

from wholebatch.evidence.runlog import Run
from wholebatch.evidence.wording import (
    Event,
    number,
    one_line,
    say_bytes,
    say_count,
    say_rate,
    say_seconds,
    say_share,
    text,
)

_REASONS_SAID = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a run showed.

    Attributes:
        topic: What it is about, in a word.
        figure: The key figure, in a few words.
        sentence: The figure in context, as one or more full sentences.
    """

    topic: str
    figure: str
    sentence: str


def headline(run: Run) -> str:
    """Return what was run and how it ended, as sentences.

    Args:
        run: A log that was read.

    Example:
        >>> from pathlib import Path
        >>> headline(Run(path=Path("log.jsonl"), updates=({"number": 1},), finish={"status": "done", "seconds": 84.2}))
        'The run is done: 1 update in 1 min 24 s.'
    """
    planned = number(run.start, "updates_planned")
    applied = sum(not update.get("skipped") for update in run.updates)
    count = say_count(applied, "update")
    of_planned = f"{applied:,} of {say_count(planned, 'planned update')}" if planned else count
    seconds = number(run.finish, "seconds")
    within = f" in {say_seconds(seconds)}" if seconds is not None else ""
    match run.status:
        case "done":
            return f"The run is done: {count}{within}."
        case "interrupted":
            return f"The run was interrupted after {of_planned}{within}; what it did until then counts."
        case "failed":
            return f"The run failed after {of_planned}{within}."
        case "ended early":
            return (
                f"The log ends early, after {of_planned}: the run was killed, or it is still going on."
                if run.start or run.updates
                else "The log holds no run."
            )
        case other:
            return f"The run ended as {other}, after {of_planned}{within}."


def trained(run: Run) -> str:
    """Return what was trained, as a sentence; "" when the log does not say."""
    parameters, rows, seed = (number(run.start, name) for name in ("parameters", "rows", "seed"))
    device, precision = text(run.start, "device"), text(run.start, "precision")
    parts = [
        f"of {say_count(parameters, 'parameter')}" if parameters is not None else "",
        f"trained on {say_count(rows, 'row')}" if rows is not None else "",
        f"in {precision}" if precision else "",
        f"on {device}" if device else "",
        f"with seed {seed:.0f}" if seed is not None else "",
    ]
    said = " ".join(part for part in parts if part)
    return f"A model {said}." if said else ""


def findings(run: Run) -> list[Finding]:
    """Return what the run showed, by interest; what the log does not tell is left out or said to be missing.

    Args:
        run: A log that was read.

    Returns:
        One finding a topic.
    """
    if not run.updates:
        return []
    found = [_logical_batch(run), _gradient(run), _memory(run), _speed(run), _loss(run), _padding(run), _updates(run)]
    return [finding for finding in found if finding is not None]


def _logical_batch(run: Run) -> Finding | None:
    cuts = [int(cut) for cut in run.series("micro_batches") if cut >= 1]
    if not cuts:
        return None
    both = [(number(update, "rows"), number(update, "micro_batches")) for update in run.updates]
    told = [(rows, cut) for rows, cut in both if rows and cut]
    most = say_count(max(rows for rows, _ in told), "row") if told else ""
    batch = f"a logical batch of {text(run.start, 'logical_batch') or most or 'unknown rows'}"
    if max(cuts) == 1:
        return Finding("Logical batch", "not cut", f"Each update is that of {batch}, which was in memory whole.")
    asked = text(run.start, "micro_batch")
    of_kind = f" of {asked}" if re.fullmatch(r"[\d,]+ \w+", asked) else ""
    into = f"{min(cuts)} to {max(cuts)}" if min(cuts) < max(cuts) else f"{cuts[0]}"
    sentence = f"Each update is that of {batch}, cut into {into} micro-batches{of_kind}"
    if not told:
        return Finding("Logical batch", f"cut in {into}", f"{sentence}.")
    rows_at_most = re.fullmatch(r"([\d,]+) rows?", asked)
    mean = sum(rows for rows, _ in told) / sum(cut for _, cut in told)
    shown, how = (rows_at_most[1], "at most") if rows_at_most else (f"{mean:.0f}", "on average")
    were = "row was" if shown == "1" else "rows were"
    if joined(run):
        return Finding(
            "Logical batch",
            f"{shown} of {most}",
            f"{sentence}. {how.capitalize()} {shown} {were} run at once, but their graphs were joined, so that the "
            "activations of the whole batch were held.",
        )
    return Finding("Logical batch", f"{shown} of {most}", f"{sentence}: {how} {shown} {were} in memory at once.")


def joined(run: Run) -> bool:
    """Return whether the graphs of all micro-batches were held until the backward pass, as the choices made say."""
    reasons = run.finish.get("reasons") or run.start.get("reasons")
    said = [str(reason) for reason in reasons] if isinstance(reasons, list) else []
    return any("joins the graphs of all micro-batches" in reason for reason in said)


def _gradient(run: Run) -> Finding:
    error = number(run.evidence, "gradient_error")
    if error is None:
        return Finding("Gradient", "not compared", _unmeasured(run, "The gradient of the undivided batch"))
    said = f"{error:.1e}" if error else "0"
    sentence = (
        f"The gradient of the cut batch is that of the undivided one, up to rounding: the relative error is {said}."
        if run.evidence.get("gradient_ok") is True
        else "The gradient of the cut batch is not that of the undivided one: the relative error is "
        f"{said}, more than rounding explains. `wholebatch verify` looks for the cause."
    )
    return Finding("Gradient", f"error {said}", sentence)


def _memory(run: Run) -> Finding:
    peaks = [peak for peak in run.series("peak_bytes") if not math.isnan(peak)]
    sentences = []
    figure = say_bytes(max(peaks)) if peaks else "not measured"
    whole, cut = number(run.evidence, "undivided_peak_bytes"), number(run.evidence, "cut_peak_bytes")
    if whole and cut is not None:
        saved = 1 - cut / whole
        figure = f"{say_share(abs(saved))} {'less' if saved >= 0 else 'more'}"
        sentences.append(f"The undivided batch takes {say_bytes(whole)} at its peak, the cut one {say_bytes(cut)}.")
    else:
        sentences.append(_unmeasured(run, "The memory of the undivided batch"))
    if peaks:
        sentences.append(
            f"No update of the run took more than {say_bytes(max(peaks))}{_against_budget(run, max(peaks))}."
        )
    if text(run.start, "device").startswith("cpu"):
        sentences.append("Memory is what the whole process holds.")
    return Finding("Memory", figure, " ".join(sentences))


def _against_budget(run: Run, peak: float) -> str:
    budget = number(run.start, "budget_bytes")
    if not budget:
        return ""
    if peak <= budget:
        return f", which keeps the budget of {say_bytes(budget)}"
    return f", which is more than the budget of {say_bytes(budget)}"


def _speed(run: Run) -> Finding | None:
    ours, plain = number(run.evidence, "targets_per_second"), number(run.evidence, "plain_targets_per_second")
    if ours and plain:
        factor = ours / plain
        return Finding(
            "Speed",
            f"{factor:.2f} times",
            f"{say_rate(ours)} targets per CPU second, against {say_rate(plain)} of the plain loop (rows in random "
            f"order, equally many a micro-batch), measured side by side{': slower' if factor < 0.995 else ''}.",
        )
    timed = [
        (targets, seconds)
        for targets, seconds in zip(run.series("targets"), run.series("seconds"), strict=True)
        if seconds > 0 and not math.isnan(targets)
    ]
    if not timed:
        return None
    rate = say_rate(sum(targets for targets, _ in timed) / sum(seconds for _, seconds in timed))
    return Finding(
        "Speed", f"{rate} a second", f"{rate} targets per second on average. {_unmeasured(run, 'The plain loop')}"
    )


def _loss(run: Run) -> Finding | None:
    losses = [(_number_of(update), number(update, "loss")) for update in run.updates]
    finite = [(update, loss) for update, loss in losses if loss is not None]
    if not finite:
        return Finding("Loss", "never finite", "No update had a finite loss.")
    (first_update, first), (last_update, last) = finite[0], finite[-1]
    sentence = f"From {first:.4g} at update {first_update} to {last:.4g} at update {last_update}."
    if run.validations:
        event = run.validations[-1]
        measures = event.get("measures")
        values = (
            {one_line(str(name)): number(measures, name) for name in measures} if isinstance(measures, dict) else {}
        )
        said = ", ".join(f"{name} {'nan' if value is None else f'{value:.4g}'}" for name, value in values.items())
        sentence += f" Last validation, after update {text(event, 'update')}: {said or 'no measures'}."
    return Finding("Loss", f"{last:.4g}", sentence)


def _padding(run: Run) -> Finding | None:
    padding = [share for share in run.series("padding") if not math.isnan(share)]
    if not padding:
        return None
    mean = sum(padding) / len(padding)
    return Finding(
        "Padding",
        say_share(mean),
        f"{say_share(mean)} of the positions were padding, {say_share(max(padding))} at most.",
    )


def _updates(run: Run) -> Finding:
    skipped: dict[str, list[str]] = {}
    for update in run.updates:
        if update.get("skipped"):
            skipped.setdefault(text(update, "skipped"), []).append(_number_of(update))
    applied = len(run.updates) - sum(map(len, skipped.values()))
    sentences = [] if skipped else ["Every window became an update; none was skipped."]
    sentences += [f"Skipped {_listed(numbers)}: {reason}" for reason, numbers in list(skipped.items())[:_REASONS_SAID]]
    if len(skipped) > _REASONS_SAID:
        sentences.append(f"The log has {say_count(len(skipped) - _REASONS_SAID, 'further reason')}.")
    retries = sum(number(update, "retries") or 0 for update in run.updates)
    if retries:
        sentences.append(f"A logical batch was cut anew {say_count(retries, 'time')} after running out of memory.")
    figure = f"{applied:,}" if not skipped else f"{applied:,} of {len(run.updates):,}"
    return Finding("Updates", figure, " ".join(sentences))


def _listed(numbers: list[str]) -> str:
    shown = ", ".join(numbers[:5])
    return f"{len(numbers)} ({shown}{', ...' if len(numbers) > 5 else ''})"


def _number_of(update: Event) -> str:
    return text(update, "number") or "?"


def _unmeasured(run: Run, what: str) -> str:
    why = text(run.evidence, "why")
    return f"{what} was not measured{f': {why}' if why else ''}".rstrip(".") + "."
