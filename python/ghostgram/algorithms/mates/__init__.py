"""MATES (arXiv 2406.06046): the model being trained chooses its next data."""
