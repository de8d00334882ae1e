"""Names that users bring from Megatron-LM and Megatron-DeepSpeed: other spellings, and flags of features that megalm
lacks, each with what to use instead. Flags that ask for what is always so are in nothing.py.

Flag names are written without the leading dashes and with `-` between words, whatever the peer's own spelling.
"""

from fnmatch import fnmatchcase

from megalm.config.merging.nothing import NO_EFFECT

RENAMED = {
    "num-key-value-heads": "num_query_groups",
    "layernorm-epsilon": "norm_epsilon",
    "rotary-position-embeddings-theta": "rotary_base",
    "num-virtual-stages-per-pipeline-rank": "virtual_pipeline_size",
    "checkpoint-num-layers": "recompute_num_layers",
    "muon-use-nesterov": "muon_nesterov",
    "encoder-num-layers": "num_layers",
    "encoder-seq-length": "seq_length",
    "fim-eod-token": "eod_token",
    "load-teacher": "teacher_load",
    "export-kd-teacher-load": "teacher_load",
    "kd-temp": "logit_kl_temperature",
    "kd-beta-ce": "kd_loss_scale",
}
"""Another name of a flag: the field that takes its value."""

IMPLIED: dict[str, tuple[str, str]] = {
    "use-rotary-position-embeddings": ("position_embedding_type", "rope"),
    "use-rope-scaling": ("rope_scaling", "llama3"),
    "accumulate-allreduce-grads-in-fp32": ("grad_accum_dtype", "fp32"),
    "grad-reduce-in-bf16": ("grad_accum_dtype", "model"),
    "recompute-activations": ("recompute_granularity", "selective"),
    "checkpoint-activations": ("recompute_granularity", "full"),
    "deepspeed-activation-checkpointing": ("recompute_granularity", "full"),
    "fim-data": ("objective", "fim"),
}
"""A switch that stands for one value of a field."""

VALUE_ALIASES = {
    "optimizer": {"adamw": "adam"},
    "tokenizer_type": {
        "huggingfacetokenizer": "HFTokenizer",
        "pretrainedfromhf": "HFTokenizer",
    },
    "cross_entropy_fusion_impl": {"native": "logits", "te": "logits"},
}
"""Other words (in lower case) for a choice of a field."""

_MOE = "mixture-of-experts models are not available in this version; train a dense model"
_RECOMPUTE = (
    "a layer's saved input stays whole on its device, and nothing is offloaded; use --recompute-granularity full, with "
    "--recompute-num-layers N to save fewer inputs"
)
_LENGTH = "give the length of runs in --train-iters or --train-samples and of schedules in -iters"
_KERNELS = "megalm chooses kernels when the model is built, by --kernels-backend; remove the flag"
_ZERO = 'put it in the "zero_optimization" block of the DeepSpeed JSON (--deepspeed-config)'
_PARALLEL = "this form of parallelism is not available in this version; use data parallelism with --zero-stage"
_STAGES = "the layers are balanced with embedding and head counted; name those of each stage with --pipeline-layout"
_SCHEDULE = "choose the order of passes and transfers with --pipeline-schedule"
_OBJECTIVE = "that objective is not available in this version; see --objective"
_CHECKPOINT = "megalm's checkpoints load under every layout and ZeRO stage without a conversion; remove the flag"
_TENSORBOARD = "TensorBoard always gets these values where they exist; remove the flag"
_INFERENCE = "this is an option of Megatron's inference, not of training"
_FP8 = "fp8 and fp4 are not available in this version; use --bf16"
_ATTENTION = "only multi-head and grouped-query softmax attention exist; use --num-query-groups"
_FSDP = "use ZeRO in place of FSDP: --zero-stage 3"
_RL = "reinforcement learning and fine-tuning on conversations are not available; this program pre-trains"
_OPTIMIZER = "the optimizers are --optimizer adam, lion and muon; their states and master weights are fp32"
_ROPE = "use --rotary-base, --rotary-percent, --rotary-seq-len-interpolation-factor or --rope-scaling"
_LAUNCH = "megalm finds out ranks, devices and addresses by itself; remove the flag"

UNSUPPORTED: tuple[tuple[str, str], ...] = (
    ("batch-size", "use --micro-batch-size and --global-batch-size"),
    ("warmup", "use --lr-warmup-fraction or --lr-warmup-iters"),
    ("model-parallel-size", "use --tensor-model-parallel-size"),
    ("distribute-*-activations partition-activations contigious-checkpointing", _RECOMPUTE),
    ("contiguous-checkpointing checkpoint-in-cpu synchronize-each-layer profile-backward", _RECOMPUTE),
    ("recompute-modules", "--recompute-granularity selective always recomputes attention core, norms and activation"),
    ("moe-* num-experts-* topk expert-* enable-expert-tensor-parallelism use-tutel", _MOE),
    ("disable-moe-* create-moe-param-group", _MOE),
    ("train-data-exact-num-epochs iter-per-epoch phase-transition-iterations", _LENGTH),
    ("head-lr-mult", "use --decoupled-lr, the rate of token embedding and head"),
    ("decrease-batch-size-if-needed", "a --global-batch-size that the ranks cannot share is an error; change it"),
    ("use-mup mup-*", "maximal update parametrization is not available; set --init-method-std and --lr for the size"),
    ("iterations-to-skip", "samples are used once and in order; a step that is not finite is skipped by itself"),
    ("start-eval-at-iter", "use --eval-interval; every evaluation is of the same samples"),
    ("validation-set-names", "validation sets are named after their files"),
    ("test-mode train-sync-interval", "remove the flag"),
    ("use-checkpoint-opt-param-scheduler", "the flags always decide; remove the flag"),
    ("quick-geglu disable-mem-efficient-ln", _KERNELS),
    ("batch-invariant-* disable-jit-fuser disable-mamba-mem-eff-path flash-attention-version", _KERNELS),
    ("fused-residual-rmsnorm gdp-* use-flash-attn-builder use-fused-weighted-squared-relu", _KERNELS),
    ("use-grouped-gemm-for-dense-mlp use-kitchen-attention use-te-activation-func", _KERNELS),
    ("use-transformer-engine-op-fuser disable-bf16-reduced-precision-matmul", _KERNELS),
    ("no-clone-scatter-output-in-embedding disable-clone-scatter-output-in-embedding", _KERNELS),
    ("activation-offload-fraction cpu-offloading-* delta-offload-* fine-grained-*", _RECOMPUTE),
    ("min-offloaded-tensor-size offload-modules delay-offload-until-cuda-graph", _RECOMPUTE),
    ("no-async-tensor-model-parallel-allreduce mla-down-proj-fusion onnx-safe *cuda-graph*", _KERNELS),
    ("transformer-impl-* te-* kitchen-* enable-experimental spec no-gradient-reduce-div-fusion", _KERNELS),
    ("zero-reduce-* zero-allgather-* zero-contigious-gradients remote-device use-pin-memory", _ZERO),
    ("cpu-optimizer cpu-torch-adam optimizer-cpu-offload optimizer-offload-fraction ds-fused-adam", _ZERO),
    ("overlap-cpu-optimizer-* use-torch-optimizer-for-cpu-offload no-pin-cpu-*", _ZERO),
    ("overlap-grad-reduce overlap-param-gather*", 'put "overlap_comm": true into "zero_optimization" of the JSON'),
    ("ddp-* accumulate-*-local-ddp no-contiguous-buffers-in-local-ddp use-nccl-ub no-align-param-gather", _ZERO),
    ("no-align-grad-reduce disable-align-grad-reduce", _ZERO),
    ("reuse-grad-buf-* num-distributed-optimizer-instances use-contiguous-buffers-in-local-ddp", _ZERO),
    ("use-torch-fsdp2 torch-fsdp2-* use-megatron-fsdp megatron-fsdp-* fsdp-* data-parallel-sharding-strategy", _FSDP),
    ("outer-dp-sharding-strategy enable-full-sharding-in-hsdp init-model-with-meta-device", _FSDP),
    ("gtp-* disable-symmetric-registration suggested-communication-unit-size keep-fp8-transpose-cache", _FSDP),
    ("ds-sequence-parallel-* force-ds-sequence-parallel cp-comm-type", _PARALLEL),
    ("hierarchical-context-parallel-sizes tp-comm-overlap* use-tp-pp-dp-mapping", _PARALLEL),
    ("hybrid-context-parallel max-seqlen-per-dp-cp-rank symmetric-ar-type", _PARALLEL),
    ("tensor-parallel-num-weight-shards", _PARALLEL),
    ("no-tp-comm-* disable-tp-comm-* tp-comm-bootstrap-backend", _PARALLEL),
    ("pipeline-model-parallel-split-rank pipeline-model-parallel-layout *-pipeline-num-layers", _STAGES),
    ("account-for-*-in-pipeline-split standalone-embedding-stage defer-embedding-*", _STAGES),
    ("enable-zbh1-* microbatch-group-* delay-wgrad-compute wgrad-deferral-limit", _SCHEDULE),
    ("overlap-moe-* overlap-dispatch-backward-* ep-overlap-* high-priority-a2a-comm-stream", _MOE),
    ("save-tokens-per-expert-interval use-grouped-gemm-for-shared-expert", _MOE),
    ("pipeline-model-parallel-comm-backend", "use --distributed-backend"),
    ("overlap-p2p-communication* no-overlap-p2p-communication no-scatter-gather-tensors-in-pipeline", _SCHEDULE),
    ("use-ring-exchange-p2p", _SCHEDULE),
    ("bert-load bert-embedder-type mask-type mask-factor retro-* ict-*", _OBJECTIVE),
    ("biencoder-* block-data-path embedding-path evidence-data-path titles-data-path query-in-block-prob", _OBJECTIVE),
    ("retriever-* use-one-sent-docs indexer-* output-bert-embeddings vision-* dino-* swin-* img-*", _OBJECTIVE),
    ("num-classes num-channels patch-dim classes-fraction data-per-class-fraction no-data-sharding", _OBJECTIVE),
    ("sample-rate", _OBJECTIVE),
    ("mtp-detach-heads mtp-hsm mtp-hybrid-* mtp-standalone mtp-use-repeated-layer",
     "each of --mtp-num-layers has a layer of its own behind the model, trained with it; remove the flag"),
    ("kd kd-alpha-ce export-kd-cfg mos num-*-teacher hidden-size-teacher",
     "a teacher comes with its own settings: --teacher-load, and --kd-loss-scale weighs it"),
    ("rl-* grpo-* langrl-* perform-rl-step sft sft-* refit-method run-workload-inspector-server", _RL),
    ("fp8-* no-fp8-wgrad disable-fp8-wgrad fp4-* first-last-layers-bf16 num-layers-at-*-in-bf16", _FP8),
    ("fp32-residual-connection", "the residual stream has the model's type; leave out --bf16 for fp32"),
    ("fp16-lm-cross-entropy", "the loss is always computed in fp32; remove the flag"),
    ("use-precision-aware-optimizer exp-avg-* main-grads-dtype main-params-dtype", _OPTIMIZER),
    ("sgd-momentum dump-param-to-param-group-map no-use-layer-wise-param-layout", _OPTIMIZER),
    ("muon-fp32-matmul-prec muon-use-syrk", "Newton-Schulz steps run in bf16 on GPUs, in fp32 on CPUs"),
    ("apply-wd-to-qk-layernorm no-weight-decay-cond-type", _OPTIMIZER),
    ("apply-query-key-layer-scaling", "attention scores are computed safely in fp32 instead; remove the flag"),
    ("apply-residual-connection-post-layernorm", "the residual stream is what was not normalized; see --norm-order"),
    ("no-initialization data-parallel-random-init",
     "weights are drawn from a normal distribution, the same under every layout; use --init-method-std"),
    ("perform-initialization embedding-init-method-std", "use --init-method-std"),
    ("dsa-* no-dsa-* disable-dsa-* linear-* qk-clip qk-clip-* qk-l2-norm log-max-attention-logit", _ATTENTION),
    ("enable-mhc-connections mhc-*", "the residual stream is one tensor a layer; remove the flag"),
    ("activation-func-clamp-value glu-linear-offset", "the activations are --swiglu, --squared-relu and GELU"),
    ("multi-latent-attention *-lora-rank qk-head-dim qk-pos-emb-head-dim v-head-dim cache-mla-latents", _ATTENTION),
    ("linear-attention-freq mamba-* hybrid-* is-hybrid-model", _ATTENTION),
    ("heterogeneous-layers-* experimental-attention-* attention-output-gate softmax-type", _ATTENTION),
    ("rope-type rotary-scaling-factor no-yarn-* mscale mscale-* no-rope-freq", _ROPE),
    ("yarn-mscale* yarn-correction-* yarn-original-* yarn-rotary-*", _ROPE),
    ("mrope-section rotary-interleaved", _ROPE),
    ("embedding-weights-in-fp32 disable-embedding-*", "the embedding has the model's type; remove the flag"),
    ("tokenizer-metadata tokenizer-special-tokens tokenizer-*-options tiktoken-special-tokens",
     "special tokens come from the tokenizer's files; name its end of document with --eod-token"),
    ("null-tokenizer-*", "ids of the null tokenizer follow from --vocab-size; remove the flag"),
    ("*pad-vocab-size padded-vocab-size", "use --make-vocab-size-divisible-by; 1 pads nothing"),
    ("chat-template", "no conversations are formatted; this program pre-trains"),
    ("no-tokenizer-* disable-tokenizer-* no-save-tokenizer-assets disable-save-tokenizer-assets",
     "give the tokenizer as one file: --tokenizer-model; the run knows it by its content"),
    ("no-use-tokenizer-model-from-checkpoint-args disable-use-tokenizer-model-from-checkpoint-args",
     "give the tokenizer as one file: --tokenizer-model; the run knows it by its content"),
    ("tokenizer-hf-* tokenizer-sentencepiece-* tokenizer-prompt-format legacy-tokenizer",
     "give the tokenizer as one file: --tokenizer-model"),
    ("trust-remote-code", "megalm runs no code from tokenizers or checkpoints; remove the flag"),
    ("dataloader-inter-document-masking", "use --reset-attention-mask"),
    ("create-attention-mask-in-dataloader",
     "the causal mask is never stored; remove the flag"),
    ("data-args-path per-split-data-args-path per-dataset-sequences-path",
     "give the data in flags or in a recipe: --data-path, --train-data-path"),
    ("train-idx-path train-*-idx-path train-desc-path return-data-index repeated-dataloader mid-level-dataset-surplus",
     "the order of samples follows from --seed alone; remove the flag"),
    ("no-mmap-bin-files mmap-warmup object-storage-cache-path num-dataset-builder-threads dataloader-*-mmap",
     "datasets are memory-mapped local files; copy remote ones to a local disk"),
    ("dataloader-fast-cache-load use-dataset-only allow-ambiguous-pad-tokens aml-data-download-path enable-msc",
     "datasets are memory-mapped local files; copy remote ones to a local disk"),
    ("disable-msc result-rejected-tracker-filename error-injection-*",
     "see --exit-interval and the run folder's logs; remove the flag"),
    ("data-efficiency-curriculum-learning curriculum-* random-ltd compression-training",
     "all samples are full-length and every layer sees every token; remove the flag"),
    ("no-load-lr-state no-load-loss-scale reset-iteration", "use --finetune to take only the weights"),
    ("use-checkpoint-args yaml-cfg", "give the run folder's config.yaml as a recipe: --config RUN/config.yaml"),
    ("pretrained-checkpoint", "use --load with --finetune, which takes only the weights"),
    ("load-main-params-from-ckpt", "fp32 master weights are always loaded; remove the flag"),
    ("use-mp-args-from-checkpoint-args", "the flags decide the layout; a checkpoint loads under every one"),
    ("load-tag", "name the step's folder: --load RUN/step_N"),
    ("override-ckpt-iteration ckpt-step", "name the step's folder: --load RUN/step_N"),
    ("universal-checkpoint use-dist-ckpt* dist-ckpt-* ckpt-* auto-detect-ckpt-format async-save", _CHECKPOINT),
    ("no-ckpt-* non-persistent-* persistent-save-interval verify-integrity async-strategy", _CHECKPOINT),
    ("async-ckpt-* disable-ckpt-* no-strict-fsdp-dtensor-load disable-strict-fsdp-dtensor-load", _CHECKPOINT),
    ("distrib-optim-fully-reshardable-* use-persistent-ckpt-worker replication replication-*", _CHECKPOINT),
    ("save-activations-interval save-dgrads-interval save-params-interval save-wgrads-interval",
     "use --log-params-norm and --save-interval; single tensors are not written"),
    ("log-optimizer-states-to-tensorboard log-energy", "use --log-params-norm; the gradient norm is always logged"),
    ("no-log-*-to-tensorboard disable-log-*-to-tensorboard", _TENSORBOARD),
    ("log-num-zeros-in-grad log-straggler", "use --log-params-norm; the gradient norm is always logged"),
    ("no-barrier-with-level-1-timing", "step times are always logged; remove the flag"),
    ("wandb-* one-logger-* no-one-logger app-tag-* otel-* logits-* inference-wandb-logging",
     "results go to metrics.jsonl and TensorBoard; use --tensorboard-dir"),
    ("flight-recorder-* no-flight-recorder-* disable-flight-recorder-*",
     "torch's flight recorder is set by its own variables (TORCH_NCCL_TRACE_BUFFER_SIZE)"),
    ("gpu-sniff-test-interval fault-injector-*", "see `megalm doctor`; remove the flag"),
    ("straggler-* disable-straggler-on-startup log-device-memory-used log-memory-interval",
     "step times and memory are always logged; remove the flag"),
    ("logging-level config-logger-dir", "the log has one level and goes to the run folder; remove the flag"),
    ("pytorch-profiler-collect-* record-shapes profile profile-*",
     "profiling is not available in this version; step times and memory are always logged"),
    ("use-pytorch-profiler record-memory-history memory-snapshot-path nvtx-ranges",
     "profiling is not available in this version; step times and memory are always logged"),
    ("flash-decode mlp-chunks-for-* nccl-all-reduce-for-prefill", _INFERENCE),
    ("inference inference-* ds-inference max-tokens-to-oom output-logit-dtype num-speculative-tokens", _INFERENCE),
    ("enable-chunked-prefill decode-only-cuda-graphs use-legacy-*", _INFERENCE),
    ("inprocess-* enable-ft-package ft-* calc-ft-timeouts adlr-autoresume* kill-switch-*",
     "the same command continues the run that --save holds; use --exit-duration-in-mins and signals"),
    ("check-for-*-grads check-for-spiky-loss no-check-for-* check-weight-hash-*",
     "loss and gradients are always checked; remove the flag"),
    ("distributed-timeout-seconds-after-init", "use --distributed-timeout-minutes"),
    ("ddp-impl lazy-mpu-init local-world-size deepspeed-mpi deepscale deepscale-config", _LAUNCH),
    ("create-all-gather-group disable-gloo-process-groups enable-gloo-process-groups *-process-group", _LAUNCH),
    ("use-sharp sharp-* nccl-communicator-config-path high-priority-stream-groups", _LAUNCH),
    ("use-one-* use-same-sampling-seed-across-dp-ranks freeze-all-layers", "remove the flag"),
)  # fmt: skip
"""Flags of the peers that megalm lacks (names and patterns, blank-separated): what to use instead."""


def unsupported_text(name: str) -> str | None:
    """What to say about a peer's flag that megalm lacks; None for a name that is not known there."""
    if name.lower() in NO_EFFECT:
        return None
    words = [(patterns.split(), instead) for patterns, instead in UNSUPPORTED]
    exact = [instead for known, instead in words if name.lower() in known]  # a whole name tells more than a pattern
    fitting = exact or [instead for known, instead in words if any(fnmatchcase(name.lower(), word) for word in known)]
    return f"--{name} is known in Megatron(-DeepSpeed) but not supported here; {fitting[0]}" if fitting else None
