"""megalm: large-scale training of language models on DeepSpeed, from a laptop CPU to a SLURM cluster.

The way of the data is the layout:

    stage             file                                    value handed on
    ----------------  --------------------------------------  --------------------------------------------------------
    text              data/text/formats.py                    documents: text with its file and line
    tokens            data/tokenizers/, data/preprocess/      ids of a document
    .bin/.idx         data/indexed/writer.py, reader.py       IndexedDataset: sequences of ids on disk
    sample            data/samples/                           Sample: number, dataset, tokens
    objective         objectives/                             Example: named arrays, such as tokens, labels, loss_mask
    batch             data/loader.py                          Batch: tensors by name, sample numbers, seed
    model             models/, parallel/                      Stream: hidden states; then named sums of losses
    step              engine/engine.py                        StepResult: losses, gradient norm, loss scale
    checkpoint        checkpoint/writer.py                    step_N/: shards and a manifest, then `latest`
    metrics           monitor/logger.py                       rows for the sinks: terminal, metrics.jsonl, TensorBoard

`entry.py` goes from a command line to `training.py`, the loop, which calls exactly these in this order; `assembly.py`
builds them. docs/contributing.md says where to add things.
"""

__version__ = "0.1.0"
