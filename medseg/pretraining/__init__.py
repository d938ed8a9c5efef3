"""Learning from scans without labels: a network that reconstructs images, whose weights begin a segmenter."""
