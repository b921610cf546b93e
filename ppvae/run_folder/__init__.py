"""What keeps the files of a run whole and together: locks, files that appear at once, identities, trust in code."""
