"""MATES (arXiv 2406.06046): pretraining data chosen by what one document would do to a reference loss."""
