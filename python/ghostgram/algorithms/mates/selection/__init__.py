"""Selection: which of the scored documents are trained on, and which have been."""
