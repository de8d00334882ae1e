"""Pre-train an encoder: `deepspeed launch/pretrain_bert.py --config recipe.yaml`."""

from megalm.entry import main

if __name__ == "__main__":
    main(prog="pretrain_bert.py", defaults={"model_family": "bert", "objective": "masked"})
