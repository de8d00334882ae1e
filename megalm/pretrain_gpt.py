"""Pre-train a GPT without a checkout: `deepspeed --module megalm.pretrain_gpt --config recipe.yaml`."""

from megalm.entry import main

if __name__ == "__main__":
    main(prog="python -m megalm.pretrain_gpt")
