"""Run by the Python of SkyPilot's own environment: prints, as JSON, what SkyPilot makes of a task.

    python in_skypilot.py TASK

As the task stands, and with the resources that `sky jobs launch --gpus H100:8 --num-nodes 2` gives it: what it runs, on
what, and whether a managed job begins anew after an exit code that comes time and again.
"""

import asyncio
import json
import sys
from typing import Any

import sky
from sky.backends import CloudVmRayBackend
from sky.jobs.recovery_strategy import StrategyExecutor
from sky.utils import dag_utils

_EXIT_CODES = (75, 2, 134)
_TIMES = 5
_KILLED = 137  # what SkyPilot counts for the hosts of a job whose other host has failed


def main(file: str) -> None:
    tpu, gpu = _load(file), _load(file)
    gpu.set_resources_override({"accelerators": {"H100": 8}})
    gpu.num_nodes = 2
    begins_anew = {code: asyncio.run(_begins_anew(_load(file), code)) for code in _EXIT_CODES}
    print(json.dumps({"tpu": _described(tpu), "gpu": _described(gpu), "begins_anew": begins_anew}))


def _load(file: str) -> sky.Task:
    dag = dag_utils.load_chain_dag_from_yaml(file, [("BUCKET", "my-bucket")], [("HF_TOKEN", "hf_secret")])
    dag_utils.fill_default_config_in_dag_for_job_launch(dag)
    (task,) = dag.tasks
    return task


def _described(task: sky.Task) -> dict[str, Any]:
    (resources,) = task.resources
    return {
        "workdir": task.workdir,
        "setup": task.setup,
        "run": task.run,
        "environment": dict(task.envs),
        "secrets": sorted(task.secrets),
        "nodes": task.num_nodes,
        "cloud": str(resources.cloud),
        "accelerators": resources.accelerators,
        "use_spot": resources.use_spot,
    }


async def _begins_anew(task: sky.Task, exit_code: int) -> list[bool]:
    lock = asyncio.Lock()
    backend = CloudVmRayBackend()
    job = StrategyExecutor.make("cluster", backend, task, 1, 0, None, set(), lock, asyncio.Condition(lock))
    return [job.should_restart_on_failure([exit_code, _KILLED]) for _ in range(_TIMES)]


if __name__ == "__main__":
    main(sys.argv[1])
