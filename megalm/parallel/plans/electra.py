"""The sharding plan of ELECTRA: an encoder's, with a generator's end in the middle and a discriminator's at the end."""

from megalm.parallel import styles
from megalm.parallel.plans.bert import ENCODER_LAYERS
from megalm.parallel.styles import ShardingPlan

ELECTRA_PLAN = ShardingPlan(
    (
        (r"embedding\.tokens", styles.vocabulary),
        (r"embedding\.(positions|token_types)", styles.positions),
        (r"embedding\.norm", styles.replicated),
        (r"embedding\.dropout", styles.dropout),
        (r"(generator\.)?projection", styles.replicated),
        *ENCODER_LAYERS,
        (r"(generator\.)?final_norm", styles.replicated),
        (r"generator\.lm_head", styles.replicated),
        (r"generator\.head", styles.head),
        (r"generator\.head_bias", styles.vocabulary_bias),
        (r"generator\.token_loss", styles.token_loss),
        (r"generator\.sampler", styles.token_sampler),
        (r"detector", styles.whole_sequence),
    ),
    optional=frozenset(
        {
            r"embedding\.(positions|token_types)",
            *(rf"generator\.{name}" for name in ("lm_head", "head", "head_bias", "token_loss", "sampler")),
        }
    ),
)
