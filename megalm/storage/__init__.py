"""Files that survive: durable and atomic writes, locks, hashes, build-once-and-publish. Standard library only."""
