"""What belongs to Emoji World alone: its classifiers and their training, its check, its scenes, retrained models."""
