"""Models for one device: what a rank computes is decided by `megalm.parallel`, which replaces layers by name."""
