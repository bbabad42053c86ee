"""Which bad habits do loops have? Each mistake by name, with the ways in which it comes."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Habit:
    """How a loop divides, keeps and steps. The defaults are right.

    Attributes:
        divide_by: What the losses of a window are divided by: the sum by its targets; or each micro-batch's mean by the
            number of those that came, by the number that a window should have, by the number that are still there to
            come, or by nothing; or each row's mean by the rows that a logical batch of the epoch has on average,
            rounded down.
        cut: Whether micro-batches are those of the loader, or each takes every k-th row of the logical batch.
        keep: Whether all gradients of a window count, or only the last one.
        tail: Whether a short window at the end of an epoch is an update, is dropped, leaves its gradients to the first
            window of the next epoch, or runs on there until it is full.
        repeats: Whether epochs are repeated until there are as many updates as there should be.
        none_last: Whether a window whose last micro-batch is None is an update, is dropped, or leaves its gradients to
            the next.
        clip: Whether the gradient of the window is clipped, that of each micro-batch, or that of each optimizer.
        term: Whether the term counts once in a window, or once for each micro-batch.
        step: Whether the optimizer steps once a window, or after each micro-batch.
        unscaled: Whether the gradient of a second optimizer is divided by the loss scale once, or twice.
        given_up: What is left of a window that was given up: nothing, or its gradients until then.
        skipped: Whether a window that overflows is no update, counts as one for the schedule, is one for the second of
            two optimizers, or is filled up again where only its micro-batch that overflows is skipped.
        sum_in: Whether gradients are added up exactly, or in the dtype of the weights.
        stopped: Whether another process knows the window in which the one before was stopped, forgets its gradients, or
            sees the epoch once again from its beginning.
        evaluated: What an evaluation leaves of the window in which it begins: all, or nothing.
        schedule: Whether the learning rate goes by updates, or by micro-batches.
        follow: Whether a moving average follows once an update, or after each micro-batch.
        evened: Whether an epoch repeats its first micro-batches until all ranks have equally many.
    """

    divide_by: Literal["targets", "micro-batches", "window", "to come", "nothing", "average rows"] = "targets"
    cut: Literal["loader", "every k-th row"] = "loader"
    keep: Literal["all", "last"] = "all"
    tail: Literal["update", "drop", "carry", "run on"] = "update"
    repeats: bool = False
    none_last: Literal["update", "drop", "carry"] = "update"
    clip: Literal["window", "micro-batch", "optimizer"] = "window"
    term: Literal["once", "each"] = "once"
    step: Literal["window", "micro-batch"] = "window"
    unscaled: Literal["once", "twice"] = "once"
    given_up: Literal["nothing", "gradients"] = "nothing"
    skipped: Literal["nothing", "counts", "second steps", "micro-batch"] = "nothing"
    sum_in: Literal["exact", "weights"] = "exact"
    stopped: Literal["knows", "forgets", "sees again"] = "knows"
    evaluated: Literal["all", "nothing"] = "all"
    schedule: Literal["updates", "micro-batches"] = "updates"
    follow: Literal["update", "micro-batch"] = "update"
    evened: bool = False


STAGNATES = "the sum of the gradients stagnates in the dtype of the weights"

HABITS: dict[str, tuple[Habit, ...]] = {
    "a mean of means: each micro-batch weighs the same, whatever it holds": (
        Habit("micro-batches"),
        Habit("micro-batches", cut="every k-th row"),
    ),
    "the means of the micro-batches are added up, and divided by nothing": (Habit("nothing"),),
    "a short window is divided by the number of a full one": (Habit("window"),),
    "each window is divided by the same number of rows, the mean over the epoch rounded down": (Habit("average rows"),),
    "the tail of an epoch is dropped": (Habit("window", tail="drop"), Habit(tail="drop")),
    "the tail of an epoch is carried into the next": (
        Habit("window", tail="carry"),
        Habit("to come", tail="carry", repeats=True),
    ),
    "a window runs on into the next epoch until it is full": (Habit("window", tail="run on"),),
    "a window whose last micro-batch is None is dropped": (Habit("window", none_last="drop"),),
    "a window whose last micro-batch is None is carried into the next": (Habit("window", none_last="carry"),),
    "only the last micro-batch of a window counts": (
        Habit("window", keep="last"),
        Habit("nothing", keep="last"),
        Habit(keep="last"),
    ),
    "each micro-batch's gradient is clipped": (
        Habit("window", clip="micro-batch"),
        Habit("nothing", clip="micro-batch"),
    ),
    "each optimizer's gradient is clipped by itself": (Habit("window", clip="optimizer"),),
    "the term counts once for each micro-batch": (Habit(term="each"),),
    STAGNATES: (
        Habit("window", sum_in="weights"),
        Habit("micro-batches", sum_in="weights"),
        Habit(sum_in="weights"),
    ),
    "the optimizer steps after each micro-batch": (
        Habit("window", step="micro-batch"),
        Habit("nothing", step="micro-batch"),
    ),
    "the second optimizer's gradient is divided by the loss scale twice": (Habit("window", unscaled="twice"),),
    "what a window had gathered when it was given up joins the next": (Habit("window", given_up="gradients"),),
    "the schedule goes on although the update was skipped": (Habit("window", skipped="counts"),),
    "one optimizer steps although the gradient of the other overflows": (Habit("window", skipped="second steps"),),
    "only the micro-batch that overflows is skipped, and the next takes its place": (
        Habit("window", tail="run on", skipped="micro-batch"),
    ),
    "the schedule goes on with each micro-batch": (Habit(schedule="micro-batches"),),
    "the moving average follows each micro-batch": (Habit(follow="micro-batch"),),
    "micro-batches come twice, so that all ranks have equally many": (
        Habit(evened=True),
        Habit("micro-batches", evened=True),
        Habit("nothing", evened=True),
    ),
    "the gradients that a window had gathered when the run was stopped are lost": (
        Habit("window", stopped="forgets"),
        Habit("nothing", stopped="forgets"),
    ),
    "the epoch in which the run was stopped is seen again from its beginning": (
        Habit("window", tail="drop", stopped="sees again"),
    ),
    "an evaluation zeroes what the window had gathered": (Habit("window", evaluated="nothing"),),
}
"""The mistakes by name."""
