"""How large is the next logical batch, and what does its learning rate become? Fixed, stepped, grown, or by noise."""

from wholebatch.core.noise import NoiseSample, NoiseScale, wasted_share
from wholebatch.core.schedules.noise import ByNoise
from wholebatch.core.schedules.rates import Change, Rates, ema_decay, rescaled
from wholebatch.core.schedules.schedule import Fixed, Geometric, Linear, Schedule, Stepped

__all__ = [
    "ByNoise",
    "Change",
    "Fixed",
    "Geometric",
    "Linear",
    "NoiseSample",
    "NoiseScale",
    "Rates",
    "Schedule",
    "Stepped",
    "ema_decay",
    "rescaled",
    "wasted_share",
]
