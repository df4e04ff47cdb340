"""Tune on a Ray cluster: `python recipes/launch/ray_train.py recipes/llava-1.5-7b.yaml 16`.

Ray Train starts so many processes, each with a GPU if the cluster has any, and tells each its rank, which is all that
striate wants to know. The run folder has to lie where all nodes see it. When a process is lost, all are started again,
and the run goes on from what was saved last. RAY_ADDRESS names the cluster; without it Ray starts one on this machine.
"""

import sys
from pathlib import Path

import ray
import ray.train
from ray.train.torch import TorchTrainer

from striate.runs.cli import main


def tune(settings: dict[str, str]) -> None:
    """One process of the group."""
    status = main(["tune", "--config", settings["config"], "--resume", "auto"])
    if status:
        raise RuntimeError(f"striate tune ended with {status}")


if __name__ == "__main__":
    config, processes = str(Path(sys.argv[1]).resolve()), int(sys.argv[2])
    ray.init()
    gpus = ray.cluster_resources().get("GPU", 0) > 0
    TorchTrainer(
        tune,
        train_loop_config={"config": config},
        scaling_config=ray.train.ScalingConfig(num_workers=processes, use_gpu=gpus),
        run_config=ray.train.RunConfig(failure_config=ray.train.FailureConfig(max_failures=10)),
    ).fit()
