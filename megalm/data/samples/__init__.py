"""From indexed datasets to numbered samples: the index of samples, blends, streams, and what a run draws from."""
