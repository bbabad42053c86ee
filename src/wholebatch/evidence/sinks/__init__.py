"""Where do the events of a run go? A log, the terminal, TensorBoard, Weights & Biases, MLflow, any function.

An event is a mapping with the key ``"event"``; ``{"event": "update", **update.to_dict()}`` is one. A sink needs two
methods, and no base class:

    class Sink(Protocol):
        def write(self, event: Mapping[str, Any]) -> None: ...
        def close(self) -> None: ...

`Sinks` makes several of them one, and finishes them whichever way a loop ends. Nothing is imported, and no file opened,
before a sink is made.
"""

from wholebatch.evidence.sinks.jsonlines import JsonLines
from wholebatch.evidence.sinks.mlflow import MLflow
from wholebatch.evidence.sinks.progress import ProgressBar
from wholebatch.evidence.sinks.seam import CallbackSink, Sink, SinkError
from wholebatch.evidence.sinks.tensorboard import TensorBoard
from wholebatch.evidence.sinks.together import Sinks
from wholebatch.evidence.sinks.weights_and_biases import WeightsAndBiases

__all__ = [
    "CallbackSink",
    "JsonLines",
    "MLflow",
    "ProgressBar",
    "Sink",
    "SinkError",
    "Sinks",
    "TensorBoard",
    "WeightsAndBiases",
]
