"""Pre-train a T5: `deepspeed launch/pretrain_t5.py --config launch/recipes/quickstart-t5.yaml`."""

from megalm.entry import main

if __name__ == "__main__":
    main(prog="pretrain_t5.py", defaults={"model_family": "t5", "objective": "span"})
