"""Text to tokens to .bin/.idx to numbered samples to micro-batches, one file a step.

    readers -> preprocess (tokenizers) -> indexed -> sampling -> gpt_dataset -> loader

Nothing is imported here, so that `megalm preprocess` starts without torch; import the module that you need.
"""
