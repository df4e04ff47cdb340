"""Tune on a Ray cluster: `python recipes/launch/ray_train.py recipes/llava-1.5-7b.yaml 16`.

Ray Train starts a process for each GPU and tells it its rank, which is all that striate wants to know. The run folder
has to lie where all nodes see it. A worker that is lost is started again, and the run goes on from what was saved last.
"""

import sys
from pathlib import Path

import ray.train
from ray.train.torch import TorchTrainer

from striate.runs.cli import main


def tune(settings: dict[str, str]) -> None:
    """One process of the group."""
    status = main(["tune", "--config", settings["config"], "--resume", "auto"])
    if status:
        raise RuntimeError(f"striate tune ended with {status}")


if __name__ == "__main__":
    config, gpus = str(Path(sys.argv[1]).resolve()), int(sys.argv[2])
    TorchTrainer(
        tune,
        train_loop_config={"config": config},
        scaling_config=ray.train.ScalingConfig(num_workers=gpus, use_gpu=True),
        run_config=ray.train.RunConfig(failure_config=ray.train.FailureConfig(max_failures=10)),
    ).fit()
