"""Detectors: what is in a picture, asked of models that had no part in making it."""
