"""Pre-train a T5 without a checkout: `deepspeed --module megalm.pretrain_t5 --config recipe.yaml`."""

from megalm.entry import main

if __name__ == "__main__":
    main(prog="python -m megalm.pretrain_t5", defaults={"model_family": "t5", "objective": "span"})
