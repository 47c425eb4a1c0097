"""MATES (arXiv 2406.06046): what one more document would do to the model being trained, learned, and selected by."""
