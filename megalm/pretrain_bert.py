"""Pre-train an encoder without a checkout: `deepspeed --module megalm.pretrain_bert --config recipe.yaml`."""

from megalm.entry import main

if __name__ == "__main__":
    main(prog="python -m megalm.pretrain_bert", defaults={"model_family": "bert", "objective": "masked"})
