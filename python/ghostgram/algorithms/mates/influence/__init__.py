"""The influence model: it learns labels from text, and tells them of any text."""
