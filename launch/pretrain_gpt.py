"""Pre-train a GPT: `deepspeed launch/pretrain_gpt.py --config launch/recipes/quickstart.yaml`."""

from megalm.entry import main

if __name__ == "__main__":
    main(prog="pretrain_gpt.py")
