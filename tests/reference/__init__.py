"""Straightforward versions of the methods, written from the published equations alone: slow, plain, float64."""
