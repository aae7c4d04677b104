"""What is still inside: recovery, relearning, distance from a model retrained without the target."""
