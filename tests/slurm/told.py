"""A training script that trains nothing: each task adds a line on its launch to RUN/told and exits with RUN/code."""

import json
import os
import sys
from pathlib import Path

from megalm.config.merging.load import load
from megalm.distributed.environment import read_environment

if __name__ == "__main__":
    config = load(sys.argv[1:]).config
    environment = read_environment()
    run = Path(str(config.checkpoint.save))
    line = {
        "rank": environment.rank,
        "world_size": environment.world_size,
        "lr": config.optimizer.lr,
        "fresh": config.checkpoint.fresh,
        "start": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "job": os.environ["SLURM_JOB_ID"],
        "prompt": config.training.sample_prompt,
        "secret": os.environ.get("HF_TOKEN"),
    }
    with open(run / "told", "a") as stream:
        stream.write(json.dumps(line) + "\n")
    code = run / "code"
    sys.exit(int(code.read_text()) if code.exists() else 0)
