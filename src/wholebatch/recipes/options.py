"""What can be said about a run? The keys of a configuration file, which are the flags too."""

from typing import NamedTuple


class Option(NamedTuple):
    """One thing that can be stated.

    Attributes:
        what: What it is, as a phrase.
        takes: Which values there are.

    Example:
        >>> OPTIONS["seed"].help
        'Of weights, order and dropout: a whole number from 0 to 4294967295.'
    """

    what: str
    takes: str

    @property
    def help(self) -> str:
        """The line of ``--help``."""
        return f"{self.what}: {self.takes}."


OPTIONS: dict[str, Option] = {
    "recipe": Option("What is trained", "text, images, my_file.py:recipe or package.module:recipe"),
    "logical_batch": Option(
        "What one update is made of", "rows or tokens, such as '512 rows' (the default) or '65536 tokens'"
    ),
    "grow_to": Option(
        "How large a logical batch becomes in the course of the run", "an amount in the unit of logical_batch"
    ),
    "grow": Option(
        "How it grows to that",
        "'geometric' (by equal factors, the default), 'linear', or 'noise' (as the measured noise scale allows)",
    ),
    "lr_rule": Option(
        "How the learning rate follows a logical batch that grows",
        "'none' (the default), 'linear' (SGD) or 'sqrt' (Adam)",
    ),
    "noise_scale": Option("Whether the gradient noise scale is measured, for log and report", "true or false"),
    "micro_batch": Option(
        "What is in memory at once", "'auto' (the default), rows or tokens, such as '16 rows' or '4096 tokens'"
    ),
    "memory": Option(
        "What training may take in all", "a size such as '8GiB' or '500MB'; left out, what the device has free"
    ),
    "epochs": Option("How often the rows are gone through", "a whole number of at least 1, 1 by default"),
    "updates": Option("When the run ends, in place of epochs", "a whole number of at least 1"),
    "lr": Option(
        "Learning rate of every parameter group", "a number above 0; left out, what the recipe's optimizer says"
    ),
    "batch_norm": Option(
        "What is done about batch norm, which sees the cut",
        "'refuse' (the default), 'exact', 'group' (convert), 'frozen' or 'per_micro_batch'",
    ),
    "clip_norm": Option("Largest norm of a logical batch's gradient", "a number above 0, or 0 for no clipping"),
    "precision": Option("In what the model computes", "'fp32' (the default), 'bf16' or 'fp16'"),
    "accumulate_in": Option("How gradients of 16-bit weights are summed", "'fp32', 'compensated' or 'weights'"),
    "wrapper": Option(
        "In what the model is wrapped on several ranks", "'none' (the default), 'ddp' or 'fsdp2' (fully_shard)"
    ),
    "communication": Option(
        "How often ranks gather weights and reduce gradients that fully_shard has spread",
        "'once' a window (the default), or with 'each' pass, which holds less and sends more",
    ),
    "seed": Option("Of weights, order and dropout", "a whole number from 0 to 4294967295"),
    "out": Option(
        "Where log and report go", "a folder, in which an earlier run is replaced; left out, a new one in runs/"
    ),
    "sink": Option(
        "Where the run is shown besides log and report", "'tensorboard', 'wandb' or 'mlflow', or a list of them"
    ),
    "compare": Option(
        "Whether a batch is compared, at the end, with the undivided one and the plain loop", "true or false"
    ),
}
"""By key: what it is and what it takes. The defaults named here are those where the recipe says nothing."""
