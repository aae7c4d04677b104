"""Programs whose results stand in docs/; they are no part of the distribution."""
