"""What filters around a model do: they suppress at the level of a system, and remove nothing."""
