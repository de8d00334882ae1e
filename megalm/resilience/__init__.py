"""Ending well: signals that ask a run to save and stop."""
