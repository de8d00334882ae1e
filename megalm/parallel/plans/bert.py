"""The sharding plan of encoder-only models."""

from megalm.parallel import styles
from megalm.parallel.styles import ShardingPlan

ENCODER_LAYERS = (
    (r"layers\.\d+\.(attention|mlp)(_output)?_norm", styles.replicated),
    (r"layers\.\d+\.(attention|mlp)", styles.region_input),
    (r"layers\.\d+\.attention\.wq", styles.column),
    (r"layers\.\d+\.attention\.w[kv]", styles.kv_column),
    (r"layers\.\d+\.attention\.q_norm", styles.q_norm),
    (r"layers\.\d+\.attention\.k_norm", styles.k_norm),
    (r"layers\.\d+\.attention\.core", styles.attention_core),
    (r"layers\.\d+\.attention\.wo", styles.row),
    (r"layers\.\d+\.mlp\.w_(gate|up)", styles.column),
    (r"layers\.\d+\.mlp\.w_down", styles.row),
    (r"layers\.\d+\.dropout", styles.dropout),
)

BERT_PLAN = ShardingPlan(
    (
        (r"embedding\.tokens", styles.vocabulary),
        (r"embedding\.(positions|token_types)", styles.positions),
        (r"embedding\.(norm|projection)", styles.replicated),
        (r"embedding\.dropout", styles.dropout),
        *ENCODER_LAYERS,
        (r"final_norm", styles.replicated),
        (r"lm_head", styles.replicated),
        (r"head", styles.head),
        (r"head_bias", styles.vocabulary_bias),
        (r"token_loss", styles.token_loss),
        (r"full_logits", styles.logits),
        (r"sentence_head", styles.whole_sequence),
    ),
    optional=frozenset({r"embedding\.(positions|token_types)", r"sentence_head"}),
)
