"""What else changed: neighbours, unrelated things, composition, distributions, what comes instead."""
