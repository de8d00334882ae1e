"""From defaults, recipes, flags and the DeepSpeed JSON to one checked run, and back to text."""
