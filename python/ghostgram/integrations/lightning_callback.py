"""Lightning's Callback, by whichever name its package is installed."""

from importlib.util import find_spec

if find_spec("lightning") is not None:
    from lightning.pytorch import Callback
else:  # the same package by its older name
    from pytorch_lightning import Callback

__all__ = ["Callback"]
