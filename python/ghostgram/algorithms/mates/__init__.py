<<<<<<< HEAD
"""MATES (arXiv 2406.06046): pretraining data chosen by what one document would do to a reference loss."""
=======
"""MATES (arXiv 2406.06046): ask the model in training what a document would do, teach a small model to tell, select."""
>>>>>>> select
