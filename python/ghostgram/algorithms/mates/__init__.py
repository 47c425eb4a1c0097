"""MATES (arXiv 2406.06046): ask the model in training what a document would do, teach a small model to tell, select."""
