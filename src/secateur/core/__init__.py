"""Floor 0: errors, exact selection, names, and any weight seen as a matrix."""
