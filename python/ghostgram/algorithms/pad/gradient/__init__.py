"""The matching loss and its gradient by the synthetic set."""
