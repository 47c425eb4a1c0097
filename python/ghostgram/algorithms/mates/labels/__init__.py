"""The label stage: what an update on one document would do to the references."""
