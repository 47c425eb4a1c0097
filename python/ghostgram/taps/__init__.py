"""Taps: how a model's layers hand (a, b) to the ops during backward, and what of the model they cover."""

from ghostgram.taps.coverage import Coverage, UncoveredParameterError, cover
from ghostgram.taps.session import Taps

__all__ = ["Coverage", "Taps", "UncoveredParameterError", "cover"]
