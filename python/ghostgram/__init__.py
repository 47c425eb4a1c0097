"""ghostgram."""
