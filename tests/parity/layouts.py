"""The table of layouts: which model trains how, and how close to one process. A row a line.

A row is made of words: an axis and its size (`tp2`, `pp4`; what is left of the ranks is data parallel), a pipeline
schedule, the ZeRO stage, and what the other words in `WORDS` say.
"""

from dataclasses import dataclass
from pathlib import Path

from megalm.config.rules.pipeline import SCHEDULES

STEPS = 2
SAMPLES, SEQ, VOCAB = 8, 16, 61
RUN = (
    f"--num-layers 2 --hidden-size 32 --vocab-size {VOCAB} --make-vocab-size-divisible-by 8 --seq-length {SEQ} "
    f"--max-position-embeddings {SEQ} --global-batch-size {SAMPLES} --train-iters {STEPS} --lr 0.01 --weight-decay 0.1 "
    "--clip-grad 0.5 --adam-eps 1e-4 --mock-data --eval-iters 0 --micro-batch-size 2 "
)
LLAMA = (
    "--num-attention-heads 4 --num-query-groups 2 --ffn-hidden-size 64 --swiglu --disable-bias-linear "
    "--position-embedding-type rope --normalization RMSNorm"
)
GPT2 = "--num-attention-heads 4 --ffn-hidden-size 48 --untie-embeddings-and-output-weights --openai-gelu"
BERT = (
    "--model-family bert --objective masked --num-attention-heads 4 --num-query-groups 2 --ffn-hidden-size 48 "
    "--init-method-std 0.2"
)
RTD = (
    "--model-family electra --objective rtd --num-attention-heads 4 --ffn-hidden-size 48 --embedding-size 24 "
    "--mask-prob 0.4 --rtd-generator-size 0.5 --rtd-loss-weight 3 --init-method-std 0.2"
)
TEACHER = f"{LLAMA} --num-layers 3 --hidden-size 48 --init-method-std 0.2"
DOCUMENTS = "--reset-position-ids --reset-attention-mask --eod-mask-loss"
T5 = (
    "--model-family t5 --objective span --num-attention-heads 4 --ffn-hidden-size 48 "
    "--position-embedding-type relative --normalization RMSNorm --disable-bias-linear --decoder-seq-length 8 "
    "--relative-attention-num-buckets 8 --relative-attention-max-distance 12"
)
MODELS = {
    # tied head, two KV heads, vocabulary 61
    "llama": LLAMA,
    # biases everywhere, learned positions, own head
    "gpt2": GPT2,
    # eight query heads for two KV heads
    "eight heads": LLAMA.replace("heads 4", "heads 8") + " --qk-layernorm",
    # one KV head, norms of heads, biases on q, k and v only
    "qwen": LLAMA.replace("groups 2", "groups 1") + " --add-qkv-bias --qk-layernorm",
    # norms of branches make rounding larger where these are small: larger initial values
    # windows, norms before and after, soft-capping, a norm's weight as its distance from one
    "gemma": (
        f"{LLAMA} --norm-order sandwich --apply-layernorm-1p --qk-layernorm --scale-embeddings --window-size 5,0 "
        "--window-attn-skip-freq 2 --rotary-base-local 100 --attn-logit-softcapping 5 --final-logit-softcapping 3 "
        "--init-method-std 0.2"
    ),
    # norms after, over all heads together, of which two ranks share one of keys
    "olmo": f"{LLAMA} --norm-order branch --qk-layernorm --qk-layernorm-full-width --init-method-std 0.2",
    # both branches of one input, biases, half of each head turns
    "neox": f"{GPT2} --position-embedding-type rope --rotary-percent 0.5 --use-parallel-residual",
    # sums that are normalized, token types, padding, two losses
    "bert": BERT,
    # no biases, windows on both sides, documents
    "modernbert": (
        "--model-family bert --objective masked --num-attention-heads 4 --ffn-hidden-size 64 --norm-order pre --geglu "
        "--position-embedding-type rope --rotary-base-local 100 --window-size 3,2 --window-attn-skip-freq 2 "
        "--num-tokentypes 0 --bert-no-binary-head --disable-bias-linear --disable-bias-norm --reset-attention-mask "
        "--reset-position-ids --init-method-std 0.2"
    ),
    # narrow embeddings, own head
    "electra": f"{BERT} --num-layers 4 --embedding-size 24 --bert-no-binary-head --untie-embeddings-and-output-weights",
    # two networks and what is drawn between them; padding, token types, narrow embeddings; own head, dropout, documents
    "rtd": RTD,
    "rtd dropout": (
        f"{RTD} --rtd-generator-size 1 --untie-embeddings-and-output-weights --hidden-dropout 0.1 "
        "--reset-attention-mask"
    ),
    "deep llama": f"{LLAMA} --num-layers 4",
    "deep gpt2": f"{GPT2} --num-layers 4",
    "uneven llama": f"{LLAMA} --num-layers 5",
    "seven layers": f"{GPT2} --num-layers 7",
    "eight layers": f"{GPT2} --num-layers 8",
    "dropout": f"{GPT2} --num-layers 4 --hidden-dropout 0.2",
    "all dropout": f"{GPT2} --num-layers 4 --hidden-dropout 0.1 --attention-dropout 0.1",
    "llama documents": f"{LLAMA} --num-layers 4 {DOCUMENTS}",
    "gpt2 documents": f"{GPT2} --num-layers 4 {DOCUMENTS}",
    # prefixes that are seen both ways: of the row, of each document, in windows; fewer tokens have a loss
    "prefix": f"{LLAMA} --num-layers 4 --objective prefix --init-method-std 0.2",
    "prefix documents": f"{GPT2} --num-layers 4 --objective prefix {DOCUMENTS}",
    "prefix windows": (
        f"{LLAMA} --objective prefix --window-size 5,0 --attn-logit-softcapping 5 --attention-dropout 0.1"
    ),
    # two modules that predict tokens further ahead, inside documents too
    "mtp": f"{LLAMA} --mtp-num-layers 2 --mtp-loss-scaling-factor 0.5",
    "mtp documents": f"{GPT2} --mtp-num-layers 2 --hidden-dropout 0.1 {DOCUMENTS}",
    # a teacher of another size: its likeliest tokens beside the objective, or all tokens alone
    "taught": f"{LLAMA} --teacher-load TEACHER --logit-kl-topk 20 --logit-kl-temperature 2 --kd-loss-scale 0.7",
    "taught alone": f"{GPT2} --mtp-num-layers 1 --hidden-dropout 0.1 --teacher-load TEACHER --skip-lm-loss",
    # every row goes on from what the one of the step before has left: distances by sinusoids, or rotary
    "segments": f"{GPT2} --position-embedding-type relative --segment-memory 12 --sampling consecutive "
    "--init-method-std 0.2",
    "rotary segments": f"{LLAMA} --segment-memory 24 --sampling consecutive --hidden-dropout 0.1",
    # samples of three objectives, in some of which nothing is prefix
    "mixture": f"{GPT2} --num-layers 4 --objective-mixture causal:0.25,fim:0.25,prefix:0.5",
    # two layers and three, tied head
    "t5": f"{T5} --relu --decoder-num-layers 3",
    "t5 1.1": f"{T5} --geglu --openai-gelu --untie-embeddings-and-output-weights",
    "ul2": (
        f"{T5.replace('span', 'ul2').replace('length 8', 'length 12')} --relu --ul2-denoisers R:0.2:2,S:0.3,X:0.5:2"
    ),
    # hidden channels of MLPs drop too, the same on any number of ranks
    "t5 hidden dropout": f"{T5} --geglu --hidden-dropout 0.2",
    # what is read and what is written in one row
    "ul2 decoder": (
        f"{LLAMA} --num-layers 4 --objective ul2 --ul2-denoisers R:0.2:2,S:0.3,X:0.5:2 --init-method-std 0.2"
    ),
    "t5 dropout": f"{T5} --relu --hidden-dropout 0.1 --attention-dropout 0.1",
}
JSONS = Path(__file__).resolve().parents[2] / "ds_configs"
WORDS = {
    **{f"tp{size}": f"--tensor-model-parallel-size {size}" for size in (2, 4, 8)},
    **{f"pp{size}": f"--pipeline-model-parallel-size {size}" for size in (2, 3, 4)},
    **{f"zero{stage}": f"--zero-stage {stage}" for stage in range(4)},
    **{name: f"--pipeline-schedule {name}" for name in SCHEDULES},
    "sp": "--sequence-parallel",
    "offload": f"--deepspeed_config {JSONS / 'offload.json'}",
    "zero3-offload": f"--deepspeed_config {JSONS / 'zero3_offload.json'}",
    "three-chunks": "--virtual-pipeline-size 3",
    "0,2,2,1": "--pipeline-layout 0,2,2,1",
    "1,2,2,0": "--pipeline-layout 1,2,2,0",
    "by-parameters": "--pipeline-partition parameters",
    "one-by-one": "--micro-batch-size 1",
    "full": "--recompute-granularity full",
    "selective": "--recompute-granularity selective",
    "lion": "--optimizer lion",
    "muon": "--optimizer muon --muon-extra-scale-factor 0.2",
    "by-sums": "--muon-tp-mode distributed",
    "linear": "--cross-entropy-fusion-impl linear",
    "bf16": "--bf16",
    "fp16": "--fp16 --initial-loss-scale 1024 --loss-scale-window 1",
}


@dataclass(frozen=True)
class Tolerance:
    """Largest relative differences from one process."""

    first: float
    """Loss and gradient norm of the first step."""
    losses: float
    """... of every step, and of the evaluation after them."""
    norms: float
    weights: float
    """L2 distance of all weights together."""
    logits: float


EXACT = Tolerance(1e-5, 1e-5, 1e-5, 1e-5, 2e-5)
# every layout rounds partial sums in its own way, and the steps make that larger, with AVX2 more than with AVX-512
LOW = {
    "bf16": Tolerance(2e-3, 2e-3, 5e-2, 1e-2, 1e-1),
    "fp16": Tolerance(3e-4, 2e-4, 5e-3, 2e-3, 1e-2),
}


@dataclass(frozen=True)
class Row:
    """One layout of one model; `ci` rows run always, the others with --all-layouts."""

    ranks: int
    model: str
    words: str
    ci: bool = False

    def __str__(self) -> str:
        return f"{self.ranks} ranks, {self.model}: {self.words}"

    @property
    def flags(self) -> str:
        """The layout as a command line."""
        return " ".join(WORDS[word] for word in self.words.split())

    @property
    def precision(self) -> str | None:
        """bf16, fp16, or None for fp32: one process computes in the same."""
        return next((word for word in self.words.split() if word in LOW), None)

    @property
    def optimizer(self) -> str | None:
        """lion, muon, or None for AdamW."""
        return next((word for word in self.words.split() if word in ("lion", "muon")), None)

    @property
    def tolerance(self) -> Tolerance:
        """How close the row is to one process."""
        if self.precision is not None:
            return LOW[self.precision]
        return EXACT


CI = True
ROWS = [
    # the reference itself
    Row(1, "llama", "zero1", CI),
    Row(1, "gpt2", "zero3"),
    # data parallel, ZeRO 0 to 3
    Row(2, "llama", "zero0", CI),
    Row(2, "llama", "zero1"),
    Row(2, "llama", "zero2"),
    Row(2, "llama", "zero3", CI),
    Row(4, "llama", "zero0 one-by-one"),
    Row(4, "llama", "zero1 one-by-one"),
    Row(4, "llama", "zero2 one-by-one", CI),
    Row(4, "llama", "zero3 one-by-one"),
    Row(4, "gpt2", "zero1"),
    Row(4, "gpt2", "zero3"),
    # encoder-decoders: stages cut between the stacks and inside them, tables of positions travel
    Row(2, "t5", "tp2 sp zero1", CI),
    Row(2, "t5", "pp2 1f1b zero1", CI),
    Row(2, "t5 1.1", "zero3"),
    Row(2, "t5", "tp2 zero0"),
    Row(4, "t5", "tp4 sp zero2"),
    Row(2, "t5", "zero1"),
    Row(2, "t5", "zero2 one-by-one"),
    Row(2, "t5", "zero3"),
    Row(2, "t5 1.1", "tp2 sp zero3 linear"),
    Row(2, "t5", "pp2 gpipe zero0"),
    Row(2, "t5", "pp2 1f1b zero3"),
    Row(2, "t5", "pp2 interleaved-1f1b zero1"),
    Row(2, "t5", "pp2 interleaved-zero-bubble zero0"),
    Row(2, "t5", "pp2 zbv zero1"),
    Row(2, "t5 1.1", "pp2 dualpipev zero2"),
    Row(4, "t5", "tp2 pp2 1f1b zero1"),
    Row(4, "t5 1.1", "tp2 sp pp2 zbv zero1"),
    Row(4, "t5", "pp4 1f1b one-by-one 1,2,2,0 zero1"),
    Row(8, "t5", "tp2 sp pp2 1f1b zero1 one-by-one"),
    Row(2, "t5", "tp2 sp zero1 selective"),
    Row(2, "t5", "zero3 full"),
    Row(2, "t5 hidden dropout", "tp2 zero0"),
    Row(2, "t5 hidden dropout", "tp2 sp zero1 full"),
    Row(2, "t5 dropout", "pp2 1f1b zero1 full"),
    Row(2, "t5 dropout", "pp2 zbv zero0 selective"),
    Row(2, "t5 1.1", "tp2 sp zero1 bf16"),
    # what other decoders have
    Row(2, "gemma", "tp2 sp zero1", CI),
    Row(2, "gemma", "tp2 zero0"),
    Row(2, "gemma", "pp2 zero1"),
    Row(2, "gemma", "zero1"),
    Row(2, "gemma", "zero3"),
    Row(4, "gemma", "tp2 pp2 zero1"),
    Row(2, "olmo", "tp2 zero3"),
    Row(4, "olmo", "tp4 sp zero0"),
    Row(2, "olmo", "tp2 sp zero1", CI),
    Row(2, "olmo", "pp2 zero1"),
    Row(2, "olmo", "zero1"),
    Row(2, "olmo", "zero3"),
    Row(4, "olmo", "tp2 pp2 zero1"),
    Row(2, "neox", "tp2 sp zero1", CI),
    Row(2, "neox", "tp2 zero0"),
    Row(2, "neox", "pp2 zero1"),
    Row(2, "neox", "zero1"),
    Row(2, "neox", "zero3"),
    Row(4, "neox", "tp2 pp2 zero1"),
    # encoders
    Row(2, "bert", "tp2 sp zero1", CI),
    Row(2, "bert", "tp2 zero0"),
    Row(2, "bert", "pp2 zero1"),
    Row(2, "bert", "zero1"),
    Row(2, "bert", "zero3 full"),
    Row(2, "bert", "tp2 sp zero3 linear"),
    Row(2, "bert", "pp2 1f1b zero1 linear"),
    Row(4, "bert", "tp2 sp pp2 zero1"),
    Row(4, "bert", "tp4 sp zero0"),
    Row(2, "electra", "pp2 interleaved-1f1b zero1"),
    Row(2, "electra", "pp2 zbv zero1 selective"),
    Row(2, "modernbert", "tp2 zero3"),
    Row(2, "modernbert", "tp2 sp zero0"),
    Row(2, "modernbert", "pp2 zero1 selective", CI),
    Row(2, "modernbert", "zero1"),
    Row(4, "modernbert", "tp2 pp2 zero1"),
    Row(2, "electra", "tp2 sp zero0"),
    Row(2, "electra", "pp2 zero1"),
    Row(2, "electra", "zero3"),
    Row(4, "electra", "tp2 pp2 zero1"),
    Row(2, "rtd", "tp2 zero1", CI),
    Row(2, "rtd", "tp2 sp zero0"),
    Row(2, "rtd", "zero1"),
    Row(2, "rtd", "zero2 one-by-one"),
    Row(2, "rtd", "zero3"),
    Row(2, "rtd", "tp2 sp zero1 linear"),
    Row(2, "rtd", "zero0 selective"),
    Row(4, "rtd", "tp2 sp zero3 full one-by-one"),
    Row(2, "rtd", "tp2 sp zero1 bf16"),
    Row(2, "rtd dropout", "tp2 zero0"),
    Row(2, "rtd dropout", "zero1 full"),
    # tensor parallel, with fewer KV heads than ranks in the rows of 4
    Row(2, "llama", "tp2 zero0", CI),
    Row(2, "llama", "tp2 zero1"),
    Row(2, "llama", "tp2 zero2"),
    Row(2, "llama", "tp2 zero3"),
    Row(2, "llama", "tp2 sp zero3", CI),
    Row(4, "llama", "tp4 zero0", CI),
    Row(4, "qwen", "tp4 zero0"),
    Row(4, "gpt2", "tp4 zero0"),
    Row(2, "gpt2", "tp2 zero0"),
    Row(2, "dropout", "tp2 zero0"),
    # tensor and data parallel
    Row(4, "llama", "tp2 zero1"),
    Row(4, "llama", "tp2 zero2"),
    Row(4, "llama", "tp2 zero3"),
    # sequence parallel
    Row(2, "llama", "tp2 sp zero0", CI),
    Row(2, "gpt2", "tp2 sp zero0", CI),
    Row(2, "gpt2", "tp2 sp zero2"),
    Row(4, "qwen", "tp4 sp zero0"),
    Row(2, "qwen", "tp2 sp zero0", CI),
    Row(2, "dropout", "tp2 sp zero0", CI),
    Row(4, "llama", "tp2 sp zero1"),
    Row(4, "llama", "tp2 sp zero3"),
    # eight tensor-parallel ranks: each KV head stands on four of them
    Row(8, "eight heads", "tp8 zero0"),
    Row(8, "eight heads", "tp8 sp zero3"),
    # two pipeline ranks
    Row(2, "deep llama", "pp2 gpipe zero0"),
    Row(2, "deep llama", "pp2 1f1b zero0", CI),
    Row(2, "deep llama", "pp2 interleaved-1f1b zero0"),
    Row(2, "deep llama", "pp2 interleaved-zero-bubble zero0", CI),
    Row(2, "deep llama", "pp2 zbv zero0"),
    Row(2, "deep llama", "pp2 dualpipev zero0"),
    Row(2, "deep llama", "pp2 gpipe zero1", CI),
    Row(2, "deep llama", "pp2 1f1b zero1"),
    Row(2, "deep llama", "pp2 interleaved-1f1b zero1", CI),
    Row(2, "deep llama", "pp2 interleaved-zero-bubble zero1"),
    Row(2, "deep llama", "pp2 zbv zero1", CI),
    Row(2, "deep llama", "pp2 dualpipev zero1", CI),
    Row(2, "deep gpt2", "pp2 1f1b zero0 one-by-one"),
    Row(2, "deep gpt2", "pp2 zbv zero1 one-by-one"),
    # ... under data parallelism, with ZeRO 2 and 3
    Row(4, "deep llama", "pp2 1f1b zero0 one-by-one"),
    Row(4, "deep llama", "pp2 1f1b zero1 one-by-one"),
    Row(4, "deep llama", "pp2 zbv zero1 one-by-one"),
    Row(4, "deep llama", "pp2 gpipe zero2 one-by-one"),
    Row(4, "deep llama", "pp2 1f1b zero2 one-by-one", CI),
    Row(4, "deep llama", "pp2 interleaved-1f1b zero2 one-by-one"),
    Row(4, "deep llama", "pp2 interleaved-zero-bubble zero2 one-by-one"),
    Row(4, "deep llama", "pp2 zbv zero2 one-by-one"),
    Row(4, "deep llama", "pp2 dualpipev zero2 one-by-one"),
    Row(4, "deep llama", "pp2 gpipe zero3 one-by-one"),
    Row(4, "deep llama", "pp2 1f1b zero3 one-by-one"),
    Row(4, "deep llama", "pp2 interleaved-1f1b zero3 one-by-one"),
    # four pipeline ranks
    Row(4, "eight layers", "pp4 gpipe zero1 one-by-one"),
    Row(4, "eight layers", "pp4 1f1b zero1 one-by-one"),
    Row(4, "eight layers", "pp4 interleaved-1f1b zero1 one-by-one"),
    Row(4, "eight layers", "pp4 interleaved-zero-bubble zero1 one-by-one"),
    Row(4, "eight layers", "pp4 zbv zero1 one-by-one"),
    Row(4, "eight layers", "pp4 dualpipev zero1 one-by-one"),
    # uneven stages, more of them
    Row(3, "seven layers", "pp3 1f1b zero3 one-by-one"),
    Row(3, "seven layers", "pp3 zbv zero2 one-by-one"),
    Row(4, "uneven llama", "pp4 1f1b 0,2,2,1 zero1", CI),
    Row(2, "uneven llama", "pp2 1f1b by-parameters zero2"),
    Row(2, "uneven llama", "pp2 zbv zero1"),
    Row(2, "eight layers", "pp2 interleaved-1f1b three-chunks zero1"),
    # tensor and pipeline parallel
    Row(4, "deep llama", "tp2 pp2 gpipe zero0"),
    Row(4, "deep llama", "tp2 pp2 1f1b zero0"),
    Row(4, "deep llama", "tp2 pp2 interleaved-1f1b zero0"),
    Row(4, "deep llama", "tp2 pp2 interleaved-zero-bubble zero0"),
    Row(4, "deep llama", "tp2 pp2 zbv zero0"),
    Row(4, "deep llama", "tp2 pp2 dualpipev zero0"),
    Row(4, "deep llama", "tp2 pp2 gpipe zero1"),
    Row(4, "deep llama", "tp2 pp2 1f1b zero1", CI),
    Row(4, "deep llama", "tp2 pp2 interleaved-1f1b zero1"),
    Row(4, "deep llama", "tp2 pp2 interleaved-zero-bubble zero1"),
    Row(4, "deep llama", "tp2 pp2 zbv zero1"),
    Row(4, "deep llama", "tp2 pp2 dualpipev zero1"),
    Row(4, "deep gpt2", "tp2 sp pp2 1f1b zero1"),
    Row(8, "deep llama", "tp4 sp pp2 zbv zero1"),
    # tensor, pipeline and data parallel
    Row(8, "deep llama", "tp2 pp2 gpipe zero0 one-by-one"),
    Row(8, "deep llama", "tp2 pp2 1f1b zero0 one-by-one"),
    Row(8, "deep llama", "tp2 pp2 interleaved-1f1b zero0 one-by-one"),
    Row(8, "deep llama", "tp2 pp2 interleaved-zero-bubble zero0 one-by-one"),
    Row(8, "deep llama", "tp2 pp2 zbv zero0 one-by-one"),
    Row(8, "deep llama", "tp2 pp2 dualpipev zero0 one-by-one"),
    Row(8, "deep llama", "tp2 sp pp2 gpipe zero1 one-by-one"),
    Row(8, "deep llama", "tp2 sp pp2 1f1b zero1 one-by-one"),
    Row(8, "deep llama", "tp2 sp pp2 interleaved-1f1b zero1 one-by-one"),
    Row(8, "deep llama", "tp2 sp pp2 interleaved-zero-bubble zero1 one-by-one"),
    Row(8, "deep llama", "tp2 sp pp2 zbv zero1 one-by-one"),
    Row(8, "deep llama", "tp2 sp pp2 dualpipev zero1 one-by-one"),
    Row(8, "deep llama", "tp2 sp pp2 1f1b zero2 one-by-one"),
    Row(8, "deep llama", "tp2 sp pp2 1f1b zero3 one-by-one"),
    # recomputation
    Row(2, "deep llama", "tp2 sp zero1 full"),
    Row(2, "deep llama", "tp2 sp zero1 selective"),
    Row(2, "deep llama", "zero3 full"),
    Row(2, "deep llama", "zero2 selective"),
    Row(2, "all dropout", "pp2 1f1b zero0"),
    Row(2, "all dropout", "pp2 zbv zero1 full", CI),
    Row(2, "all dropout", "pp2 interleaved-zero-bubble zero0 selective"),
    Row(2, "all dropout", "pp2 1f1b zero3 full"),
    # documents: positions, attention and loss end with them
    Row(2, "llama documents", "zero2"),
    Row(2, "llama documents", "tp2 zero1"),
    Row(2, "gpt2 documents", "tp2 sp zero1"),
    Row(2, "llama documents", "pp2 1f1b zero1"),
    Row(2, "gpt2 documents", "pp2 zbv zero0"),
    Row(4, "llama documents", "tp2 sp pp2 zbv zero1"),
    Row(4, "gpt2 documents", "pp2 interleaved-1f1b zero3 one-by-one"),
    # prefixes
    Row(2, "prefix", "tp2 sp zero1 selective"),
    Row(2, "prefix", "zero3 full"),
    Row(2, "prefix documents", "pp2 zbv zero1"),
    Row(2, "prefix documents", "zero2"),
    Row(2, "prefix windows", "pp2 1f1b zero0 full"),
    Row(4, "prefix documents", "tp2 sp pp2 zbv zero1"),
    Row(2, "mixture", "pp2 zbv zero1", CI),
    Row(2, "mixture", "zero3"),
    Row(2, "mtp", "tp2 sp zero1", CI),
    Row(2, "mtp", "tp2 zero0"),
    Row(2, "mtp", "zero1"),
    Row(2, "mtp", "zero2 one-by-one"),
    Row(2, "mtp", "zero3 linear"),
    Row(2, "mtp", "tp2 sp zero3 selective"),
    Row(2, "mtp documents", "tp2 sp zero0"),
    Row(2, "mtp documents", "zero3 full"),
    Row(2, "taught", "tp2 zero1"),
    Row(2, "taught", "tp2 sp zero2 selective"),
    Row(2, "taught", "zero1"),
    Row(2, "taught", "zero3"),
    Row(2, "taught", "tp2 sp zero1 bf16"),
    Row(2, "taught alone", "tp2 sp zero0"),
    Row(2, "taught alone", "zero2"),
    Row(4, "taught alone", "tp2 zero3 full"),
    Row(2, "ul2 decoder", "tp2 sp zero1"),
    Row(2, "ul2 decoder", "pp2 1f1b zero1"),
    Row(2, "ul2 decoder", "zero3"),
    # segment recurrence
    Row(2, "segments", "tp2 zero1", CI),
    Row(2, "segments", "zero0"),
    Row(2, "segments", "zero1 one-by-one"),
    Row(2, "segments", "zero2 one-by-one"),
    Row(2, "segments", "zero3"),
    Row(2, "segments", "zero3 full"),
    Row(2, "segments", "tp2 zero3 selective"),
    Row(4, "segments", "tp4 zero0 linear"),
    Row(4, "segments", "tp2 zero2 one-by-one"),
    Row(2, "segments", "zero1 bf16"),
    Row(2, "rotary segments", "tp2 zero0 full"),
    Row(2, "rotary segments", "zero3 selective"),
    Row(4, "mixture", "tp2 sp pp2 1f1b zero1"),
    Row(2, "ul2", "tp2 sp zero1"),
    # low precision against one process in the same
    Row(2, "llama", "zero1 bf16"),
    Row(2, "llama", "zero2 bf16 one-by-one"),
    Row(2, "llama", "zero3 bf16"),
    Row(2, "llama", "tp2 sp zero1 bf16", CI),
    Row(4, "qwen", "tp4 zero0 bf16"),
    Row(2, "llama", "pp2 1f1b zero0 bf16"),
    Row(2, "deep llama", "pp2 zbv zero1 bf16"),
    Row(4, "llama", "pp2 1f1b zero2 bf16"),
    Row(4, "llama", "pp2 1f1b zero3 bf16"),
    Row(8, "deep llama", "tp2 sp pp2 zbv zero1 bf16 one-by-one"),
    Row(2, "llama", "zero2 fp16"),
    Row(2, "llama", "tp2 zero1 fp16"),
    Row(4, "llama", "pp2 1f1b zero1 fp16"),
    # other optimizers than AdamW
    Row(2, "llama", "zero0 lion"),
    Row(2, "llama", "zero1 lion"),
    Row(2, "llama", "zero2 lion one-by-one"),
    Row(2, "llama", "zero3 lion"),
    Row(2, "llama", "tp2 sp zero1 lion"),
    Row(2, "deep llama", "pp2 zbv zero1 lion"),
    Row(2, "gpt2", "zero0 muon"),
    # five layers on two ranks: the border between their ranges cuts a matrix
    Row(2, "uneven llama", "zero1 muon", CI),
    Row(4, "gpt2", "zero2 muon one-by-one"),
    Row(4, "llama", "zero2 muon one-by-one"),
    Row(2, "llama", "tp2 zero0 muon", CI),
    Row(2, "gpt2", "tp2 sp zero0 muon by-sums", CI),
    Row(4, "qwen", "tp4 sp zero0 muon"),
    Row(4, "qwen", "tp4 zero0 muon by-sums"),
    Row(4, "llama", "tp2 zero2 muon", CI),
    Row(4, "llama", "tp2 sp zero1 muon by-sums"),
    Row(2, "deep llama", "pp2 1f1b zero0 muon"),
    Row(2, "deep llama", "pp2 zbv zero1 muon"),
    Row(4, "deep gpt2", "pp2 1f1b zero2 muon one-by-one"),
    Row(4, "deep llama", "pp2 dualpipev zero2 muon one-by-one"),
    Row(8, "deep llama", "tp2 sp pp2 zbv zero2 muon one-by-one"),
    Row(2, "llama", "tp2 zero1 muon bf16"),
    Row(2, "uneven llama", "zero1 muon bf16"),
    Row(2, "uneven llama", "zero2 muon bf16 one-by-one"),
    Row(2, "llama", "zero2 muon fp16"),
    # the loss that never holds all logits, against one process that does
    Row(1, "llama", "zero0 linear"),
    Row(1, "gpt2", "zero0 linear"),
    Row(1, "llama", "zero0 linear bf16"),
    Row(2, "llama", "zero0 linear one-by-one"),
    Row(2, "llama", "zero1 linear"),
    Row(2, "gpt2", "zero2 linear one-by-one"),
    Row(2, "llama", "zero3 linear one-by-one"),
    Row(2, "gpt2", "zero3 linear"),
    Row(2, "llama", "zero1 linear bf16"),
    Row(2, "llama", "zero3 linear bf16"),
    Row(2, "llama", "zero2 linear fp16"),
    Row(2, "llama", "tp2 zero0 linear"),
    Row(2, "gpt2", "tp2 zero1 linear"),
    Row(2, "gpt2", "tp2 sp zero0 linear", CI),
    Row(2, "llama", "tp2 sp zero3 linear"),
    Row(2, "llama", "tp2 sp zero1 linear bf16"),
    # 61 ids in rows of 16: the last rank has padding too
    Row(4, "qwen", "tp4 sp zero0 linear"),
    Row(4, "llama", "tp2 sp zero3 linear one-by-one"),
    Row(2, "deep llama", "pp2 gpipe zero0 linear"),
    Row(2, "deep llama", "pp2 1f1b zero1 linear"),
    Row(2, "deep gpt2", "pp2 interleaved-1f1b zero0 linear"),
    Row(2, "deep llama", "pp2 interleaved-zero-bubble zero1 linear"),
    Row(2, "deep llama", "pp2 zbv zero1 linear"),
    Row(2, "deep gpt2", "pp2 dualpipev zero0 linear"),
    Row(2, "llama", "pp2 1f1b zero0 linear bf16"),
    Row(4, "deep llama", "pp2 1f1b zero2 linear one-by-one"),
    Row(4, "deep llama", "pp2 1f1b zero3 linear one-by-one"),
    Row(4, "deep gpt2", "tp2 sp pp2 interleaved-zero-bubble zero1 linear"),
    Row(2, "deep llama", "tp2 sp zero2 linear full"),
    Row(2, "gpt2 documents", "tp2 sp zero1 linear"),
    Row(4, "deep llama", "tp2 sp zero3-offload linear"),
    # optimizer, and with ZeRO 3 parameters, in host memory
    Row(2, "llama", "offload"),
    Row(2, "llama", "offload bf16 one-by-one"),
    Row(2, "llama", "zero3-offload", CI),
    Row(2, "llama", "zero3-offload lion"),
    Row(2, "llama", "tp2 offload muon"),
    Row(2, "uneven llama", "offload muon"),
    Row(4, "deep llama", "pp2 1f1b offload one-by-one lion"),
    Row(2, "llama", "zero3-offload bf16"),
    Row(4, "llama", "tp2 offload"),
    Row(4, "llama", "tp2 sp zero3-offload"),
    Row(4, "deep llama", "pp2 1f1b offload one-by-one"),
    Row(4, "deep llama", "pp2 zbv offload one-by-one"),
    Row(4, "deep llama", "pp2 1f1b zero3-offload one-by-one"),
    Row(4, "deep llama", "pp2 interleaved-1f1b zero3-offload one-by-one"),
    Row(8, "deep llama", "tp2 pp2 1f1b offload one-by-one"),
]


def layout_of(row: Row) -> str:
    """The row's mesh, as TP 2 + SP x PP 2 x DP 2."""
    words = row.words.split()
    tp, pp = (
        next((int(word[2:]) for word in words if word[:2] == axis and word[2:].isdigit()), 1) for axis in ("tp", "pp")
    )
    sizes = {
        f"TP {tp}" + (" + SP" if "sp" in words else ""): tp,
        f"PP {pp}": pp,
        f"DP {row.ranks // (tp * pp)}": row.ranks // (tp * pp),
    }
    return " x ".join(name for name, size in sizes.items() if size > 1) or "one process"


def summary() -> str:
    """The table as docs/parallelism.md shows it: a line a mesh."""
    lines = ["| mesh | rows (always run) | ZeRO | schedules | models | with |", "|---|---|---|---|---|---|"]
    for layout in sorted({layout_of(row) for row in ROWS}, key=lambda name: (name.count("x"), name)):
        rows = [row for row in ROWS if layout_of(row) == layout]
        words = [word for row in rows for word in row.words.split()]
        stages = sorted({_zero_stage(row) for row in rows})
        columns = (
            f"{len(rows)} ({sum(row.ci for row in rows)})",
            ", ".join(stages),
            ", ".join(name for name in SCHEDULES if name in words) or "-",
            ", ".join(name for name in MODELS if any(row.model == name for row in rows)),
            ", ".join(word for word in (*ALONE, "bf16", "fp16") if word in words) or "-",
        )
        lines.append(f"| {layout} | " + " | ".join(columns) + " |")
    return "\n".join(lines) + "\n"


ALONE = (
    "linear",
    "lion",
    "muon",
    "by-sums",
    "one-by-one",
    "full",
    "selective",
    "offload",
    "zero3-offload",
    "three-chunks",
    "0,2,2,1",
    "by-parameters",
)
"""Words that are neither axis, schedule, ZeRO stage nor precision."""


def _zero_stage(row: Row) -> str:
    words = row.words.split()
    stages = {"offload": "2", "zero3-offload": "3"} | {f"zero{stage}": str(stage) for stage in range(4)}
    return next(stages[word] for word in words if word in stages)
