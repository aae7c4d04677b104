"""Running an evaluation: paired pictures of every model, and every probe on every model, cell by cell."""
