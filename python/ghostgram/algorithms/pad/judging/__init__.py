"""What nets learn from a set of images, beside controls."""
