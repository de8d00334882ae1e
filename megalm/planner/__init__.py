"""`megalm plan`: what a run will need and how it is laid out, without starting it."""
