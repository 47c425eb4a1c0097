"""What is done to pixels: augmentation, whitening."""
