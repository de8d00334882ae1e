"""The sharding plan of encoder-decoders."""

from megalm.parallel import styles
from megalm.parallel.styles import ShardingPlan

T5_PLAN = ShardingPlan(
    (
        (r"embedding\.tokens", styles.vocabulary),
        (r"embedding\.dropout", styles.dropout),
        (r"positions", styles.used_by_heads),
        (r"(encoder|decoder)_bias", styles.relative_bias),
        (r"layers\.\d+\.(attention|cross_attention|mlp)_norm", styles.replicated),
        (r"layers\.\d+\.(attention|mlp)", styles.region_input),
        (r"layers\.\d+\.cross_attention", styles.region_inputs),
        (r"layers\.\d+\.(cross_)?attention\.w[qkv]", styles.column),
        (r"layers\.\d+\.(cross_)?attention\.core", styles.attention_core),
        (r"layers\.\d+\.(cross_)?attention\.wo", styles.row),
        (r"layers\.\d+\.mlp\.w_(gate|up)", styles.column),
        (r"layers\.\d+\.mlp\.dropout", styles.channel_dropout),
        (r"layers\.\d+\.mlp\.w_down", styles.row),
        (r"layers\.\d+\.dropout", styles.dropout),
        (r"(encoder|final)_norm", styles.replicated),
        (r"(encoder|final)_dropout", styles.dropout),
        (r"head", styles.head),
        (r"token_loss", styles.token_loss),
        (r"full_logits", styles.logits),
    ),
)
