"""The sharding plan of decoder-only models."""

from megalm.parallel import styles
from megalm.parallel.styles import ShardingPlan

_LAYER = r"(layers\.\d+|mtp_layers\.\d+\.layer)"
_RELATIVE = rf"{_LAYER}\.attention\.relative"
_AHEAD = (r"mtp_layers\.\d+\.(embedding|hidden|final)_norm", r"mtp_layers\.\d+\.projection")

GPT_PLAN = ShardingPlan(
    (
        (r"embedding\.tokens", styles.vocabulary),
        (r"embedding\.positions", styles.positions),
        (r"embedding\.dropout", styles.dropout),
        (rf"{_LAYER}\.(attention|mlp)_norm", styles.replicated),
        (rf"{_LAYER}\.(attention|mlp)_output_norm", styles.replicated),
        (rf"{_LAYER}\.(attention|mlp)", styles.region_input),
        (rf"{_LAYER}\.attention\.wq", styles.column),
        (rf"{_LAYER}\.attention\.w[kv]", styles.kv_column),
        (rf"{_LAYER}\.attention\.q_norm", styles.q_norm),
        (rf"{_LAYER}\.attention\.k_norm", styles.k_norm),
        (rf"{_LAYER}\.attention\.core", styles.attention_core),
        (_RELATIVE, styles.rows_of_heads),
        (rf"{_LAYER}\.attention\.wo", styles.row),
        (rf"{_LAYER}\.mlp\.w_(gate|up)", styles.column),
        (rf"{_LAYER}\.mlp\.w_down", styles.row),
        (rf"{_LAYER}\.dropout", styles.dropout),
        (r"final_norm", styles.replicated),
        *((name, styles.replicated) for name in _AHEAD),
        (r"head", styles.head),
        (r"token_loss", styles.token_loss),
        (r"full_logits", styles.logits),
    ),
    optional=frozenset({r"embedding\.positions", rf"{_LAYER}\.(attention|mlp)_output_norm", _RELATIVE, *_AHEAD}),
)
