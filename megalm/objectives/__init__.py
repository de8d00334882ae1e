"""What a model is trained to predict: each objective turns the tokens of one sample into the arrays of one batch row.

To add one: a file here with a frozen dataclass whose `__call__(sample)` takes int64 tokens (what a dataset of
`megalm.data` yields) and returns a dict of numpy arrays with fixed shapes and dtypes: at least `tokens` (model input),
`labels` (what each position must predict) and `loss_mask` (float32 weight of each position's loss), [seq_length] each.
It is pure, so its result depends on its fields and on the sample only (an objective that draws takes the sample's
number into its seed), and picklable, since loader workers call it. Give it to `build_loader` as `transform`.
"""
