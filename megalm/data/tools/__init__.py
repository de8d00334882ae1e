"""`megalm inspect|verify|merge|split|corpus|train-tokenizer`: commands around datasets, one file each."""
