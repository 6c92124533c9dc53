from pathlib import Path

import yaml

FILE = Path(__file__).parents[1] / "ray_cluster.yaml"


def test_ray_accepts_the_cluster_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load(FILE.read_text())))


def test_the_cluster_runs_the_locked_ray_and_is_closed():
    config = yaml.safe_load(FILE.read_text())
    lock = (FILE.parent / "requirements.lock").read_text()
    version = config["docker"]["image"].partition(":")[2].partition("-")[0]
    assert f"ray=={version} " in lock.replace("ray[default]", "ray")
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert all("RAY_AUTH_MODE=token" in c for c in config[commands] if "ray start" in c)
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"]["GPU"] == 0
