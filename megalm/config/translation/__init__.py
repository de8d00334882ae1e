"""Configurations of other trainers in, a recipe and a table of what became of every setting out. One file a format."""
