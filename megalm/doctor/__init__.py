"""`megalm doctor`: what a machine, or the ranks of a job, can do."""
