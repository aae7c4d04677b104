"""Erasers that cheat: one file for each kind, the claims that it must get and those that it must not."""
