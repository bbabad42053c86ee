"""When does a callback see the gradient of a logical batch? When the optimizer is about to step, inside the window."""

from typing import Any


class BeforeStep:
    """Lets `on_pre_optimizer_step` see the gradient of the logical batch: when the optimizer is about to step.

    Args:
        trainer: Whose loop would send the event when the step is over.
        optimizer: What steps.
    """

    def __init__(self, trainer: Any, optimizer: Any) -> None:
        self._trainer = trainer
        self._handler = trainer.callback_handler
        self.due = False
        self._hook: Any = None
        if hasattr(optimizer, "_optimizer_step_pre_hooks"):  # a wrapper may leave out super().__init__()
            self._hook = optimizer.register_step_pre_hook(self._send)
            self._handler.on_pre_optimizer_step = lambda _args, _state, control: control

    def _send(self, *_: Any) -> None:
        if self.due:  # once a window: large models step in pieces
            self.due = False
            trainer = self._trainer
            event = type(self._handler).on_pre_optimizer_step
            trainer.control = event(self._handler, trainer.args, trainer.state, trainer.control)

    def remove(self) -> None:
        """Let the loop send it again."""
        if self._hook is not None:
            self._hook.remove()
        self._handler.__dict__.pop("on_pre_optimizer_step", None)
