"""Rules between settings: of the run, of the layout over ranks, of the pipeline, of batch sizes."""
