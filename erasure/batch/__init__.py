"""Recipes and the runner that works through them."""
