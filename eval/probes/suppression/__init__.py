"""What comes out when the target is asked for: by name, in other words, by descriptions, and by attackers."""
