"""What is left in a loop that was Accelerate's, and would go wrong or do nothing beside an accumulator? It is told."""

from collections.abc import Callable
from functools import wraps
from typing import Any
from weakref import ref

from accelerate import Accelerator
from torch import Tensor, nn

from wholebatch.core.errors import WindowError
from wholebatch.engine.accumulator import Accumulator
from wholebatch.engine.objective import LossFn
from wholebatch.engine.rehearsal import is_rehearsal


class Alone:
    """Called in each pass and before each step: refuses a second way to accumulate in the same loop.

    Args:
        accelerator: Which counts the calls of its `accumulate`.
        then: Called afterwards, or None.
    """

    def __init__(self, accelerator: Accelerator, then: Callable[[], object] | None) -> None:
        self._accelerator = accelerator
        self._then = then
        self._calls = accelerator.step

    def around(self, loss_fn: Any) -> LossFn:
        """Return a loss function that looks first, so that on several ranks the window is undone in time."""

        @wraps(loss_fn)
        def looking(model: Any, micro_batch: Any) -> Any:
            self._require()
            return loss_fn(model, micro_batch)

        return looking

    def __call__(self) -> None:
        self._require()
        if self._then is not None:
            self._then()

    def _require(self) -> None:
        if self._accelerator.step != self._calls:
            if not is_rehearsal():  # which may go on in another way, and would then not be told again
                self._calls = self._accelerator.step
            raise WindowError(
                "accelerator.accumulate() is used around an accumulator, and both would say when an update is due.",
                hint="leave out `with accelerator.accumulate(model):`, accelerator.backward and optimizer.step: "
                "accumulator.updates(loader, micro_batches=accelerator.gradient_accumulation_steps) does all of it.",
            )


def tell_of_clipping(accelerator: Accelerator, model: nn.Module) -> None:
    """Let the accelerator refuse to clip where there is nothing to clip, which looks as if it had been clipped."""
    clip = accelerator.clip_grad_norm_
    ours = ref(model)

    def clip_grad_norm_(parameters: Any, *arguments: Any, **options: Any) -> Any:
        several = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        trained = ours()
        known = set(map(id, trained.parameters())) if trained is not None else set()
        if several and all(id(each) in known and each.grad is None for each in several):
            raise WindowError(
                "There is no gradient to clip: an accumulator has used it up, in an update that was not clipped so.",
                hint="say it to the accumulator, which clips the gradient of the logical batch once: clip_norm=...",
            )
        return clip(several, *arguments, **options)

    accelerator.clip_grad_norm_ = clip_grad_norm_


def tell_of_states(accelerator: Accelerator, accumulator: Accumulator) -> None:
    """Let the accelerator refuse to save or load its state inside a window, whose gradient is in no such state."""
    ours = ref(accumulator)

    def between(state: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(state)
        def between_updates(*arguments: Any, **options: Any) -> Any:
            kept = ours()
            window = kept.open_window if kept is not None else None
            if window is not None and not window.is_empty:
                raise WindowError(
                    f"accelerator.{state.__name__} was called, and a window is open whose gradient is no part of it.",
                    hint="call it between updates, after window.close() or window.rollback(); wb.save and wb.load know "
                    "windows.",
                )
            return state(*arguments, **options)

        return between_updates

    # Not its hooks, which come when save_state has removed a checkpoint that is one too many.
    for name in ("save_state", "load_state"):
        setattr(accelerator, name, between(getattr(accelerator, name)))
