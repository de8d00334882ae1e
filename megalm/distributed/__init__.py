"""Ranks: the launch environment, the process group, the mesh of ranks, and collectives."""
