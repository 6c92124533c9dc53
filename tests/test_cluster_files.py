"""The files that launch clusters: taken by Ray's own code, closed, and of the locked versions."""

import copy
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import MagicMock

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.autoscaler._private.util import prepare_config, validate_config

from orchestrator.surroundings import listeners
from tests.test_ui import status

ROOT = Path(__file__).parents[1]
LAUNCHED = ("ray_cluster.yaml", "cluster/gcp.yaml", "cluster/onprem.yaml")
CAPITALS = re.compile(r"\b[A-Z][A-Z0-9]+(?:[-.][A-Z0-9]+)+\b")


def load(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text())


def kuberay() -> dict[str, dict]:
    documents = yaml.safe_load_all((ROOT / "cluster" / "kuberay.yaml").read_text())
    return {document["kind"]: document for document in documents}


def locked(package: str) -> str:
    lock = (ROOT / "requirements.lock").read_text()
    return re.search(rf"^{re.escape(package)}(?:\[\w+\])?==(\S+)", lock, re.MULTILINE)[1]


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_accepts_the_file(name):
    validate_config(prepare_config(load(name)))


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_misspelt_key_is_noticed(name):
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config({**load(name), "idle_timeout_minute": 5}))


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_cluster_runs_the_locked_ray_and_is_closed(name):
    config = load(name)
    assert config["docker"]["image"] == f"rayproject/ray:{locked('ray')}-py311-gpu"
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config[commands] if "ray start" in command]
        assert len(starts) == 1
        assert "RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0" in starts[0]
    head = config["head_start_ray_commands"][-1]
    for option in ("--dashboard-host=127.0.0.1", "--num-cpus=0", "--num-gpus=0"):
        assert option in head
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]
    assert "pip install --require-hashes -r ~/supsup/requirements.lock" in config["setup_commands"]
    assert any("services.sh start /mnt/supsup/" in c for c in config["head_start_ray_commands"])
    assert set(config["rsync_exclude"]) >= {".git", ".venv", "data", "runs"}


@pytest.mark.parametrize("name", LAUNCHED[:2])
def test_the_cloud_costs_nothing_when_idle_but_the_head(name):
    config = load(name)
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert [kind["min_workers"] for kind in types.values()] == [0]
    assert all(kind["resources"]["GPU"] for kind in types.values())
    assert config["idle_timeout_minutes"] <= 10
    assert config["provider"]["cache_stopped_nodes"] is False


class CloudAskedError(Exception):
    """Ray wants to look up or change something in a cloud."""


def ray_module(name: str, monkeypatch):
    """Import what Ray does in a cloud, without that cloud's client: to ask it is an error."""
    modules = {
        "aws": ["boto3", "botocore", "boto3.resources.base", "botocore.client",
                "botocore.config", "boto3.exceptions", "botocore.exceptions"],
        "gcp": ["google_auth_httplib2", "googleapiclient", "googleapiclient.discovery",
                "googleapiclient.errors", "httplib2", "google.oauth2", "google.oauth2.credentials"],
    }  # fmt: skip
    for module in modules[name]:
        monkeypatch.setitem(sys.modules, module, MagicMock(__version__="2.0"))
    return importlib.import_module(f"ray.autoscaler._private.{name}.config")


def test_ray_makes_no_rule_that_lets_everybody_in_on_aws(monkeypatch):
    aws = ray_module("aws", monkeypatch)
    everybody = {"CidrIp": "0.0.0.0/0"}
    assert any(everybody in x.get("IpRanges", ()) for x in aws._create_default_inbound_rules([]))
    monkeypatch.setattr(aws, "_upsert_security_groups", MagicMock(side_effect=CloudAskedError))
    config = load("ray_cluster.yaml")
    assert aws._configure_security_group(copy.deepcopy(config)) == config
    assert "security_group" not in config["provider"]
    for kind in config["available_node_types"].values():
        assert kind["node_config"]["SecurityGroupIds"] == ["SECURITY-GROUP-ID"]
    del config["available_node_types"]["gpu_worker"]["node_config"]["SecurityGroupIds"]
    with pytest.raises(CloudAskedError):
        aws._configure_security_group(config)


def test_ray_picks_no_network_that_lets_everybody_in_on_google_cloud(monkeypatch):
    gcp = ray_module("gcp", monkeypatch)
    monkeypatch.setattr(gcp, "_list_subnets", MagicMock(side_effect=CloudAskedError))
    config = load("cluster/gcp.yaml")
    assert gcp._configure_subnet(config, compute=None) == config
    for kind in config["available_node_types"].values():
        (interface,) = kind["node_config"]["networkInterfaces"]
        assert interface["subnetwork"].endswith("/regions/us-west1/subnetworks/supsup")
    del config["available_node_types"]["head"]["node_config"]["networkInterfaces"]
    with pytest.raises(CloudAskedError):
        gcp._configure_subnet(config, compute=None)


def test_the_guide_opens_ssh_to_one_address_and_nothing_else():
    text = (ROOT / "docs" / "cluster.md").read_text().replace("\\\n", " ")
    rules = re.findall(
        r"^ *(?:aws ec2 authorize|gcloud compute firewall-rules).*", text, re.MULTILINE
    )
    assert len(rules) == 4
    inside = ("UserIdGroupPairs=[{GroupId=$group}]", "--source-ranges=10.0.0.0/20")
    for rule in rules:
        one_address = "22" in rule and '/32"' in rule
        assert one_address or any(group in rule for group in inside)


def test_ray_accepts_the_kubernetes_cluster():
    cluster = kuberay()["RayCluster"]
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    validate_config(config)
    head, workers = config["available_node_types"].values()
    assert (head["resources"]["CPU"], head["resources"]["GPU"]) == (0, 0)
    assert (workers["resources"]["GPU"], workers["min_workers"], workers["max_workers"]) == (
        1,
        0,
        8,
    )
    assert config["idle_timeout_minutes"] == 10
    assert cluster["spec"]["rayVersion"] == locked("ray")


def closed(**properties: object) -> dict:
    return {"type": "object", "additionalProperties": False, "properties": properties}


TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
GROUP = {"rayStartParams": {"additionalProperties": TEXT}, "template": {"required": ["spec"]}}
#: The fields of ray.io/v1 that the file uses, by the reference of KubeRay 1.5: a typing mistake in
#: one of them would be dropped in silence.
RAY_CLUSTER = closed(
    rayVersion=TEXT,
    authOptions=closed(mode={"enum": ["token"]}),
    enableInTreeAutoscaling={"const": True},
    autoscalerOptions=closed(
        version={"const": "v2"}, idleTimeoutSeconds=COUNT, resources={"type": "object"}
    ),
    headGroupSpec=closed(**GROUP),
    workerGroupSpecs={
        "items": closed(
            groupName=TEXT, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, **GROUP
        )
    },
)


def test_the_kubernetes_cluster_is_closed():
    documents = kuberay()
    cluster = documents["RayCluster"]["spec"]
    jsonschema.validate(cluster, RAY_CLUSTER)
    for document in documents.values():
        assert document["metadata"]["namespace"] == "supsup"
    policy = documents["NetworkPolicy"]["spec"]
    pods = {"podSelector": {"matchLabels": {"ray.io/cluster": "supsup"}}}
    assert policy == {**pods, "policyTypes": ["Ingress"], "ingress": [{"from": [pods]}]}
    pod = cluster["headGroupSpec"]["template"]["spec"]
    containers = {one["name"]: one for one in pod["containers"]}
    assert "--host=127.0.0.1" in containers["mlflow"]["args"]
    assert "listen_addresses=127.0.0.1" in containers["postgres"]["args"]
    assert documents["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    secrets = [
        e for one in containers.values() for e in one.get("env", ()) if "PASSWORD" in e["name"]
    ]
    assert len(secrets) == 3
    assert all("secretKeyRef" in secret["valueFrom"] for secret in secrets)


def test_images_are_pinned_and_the_container_holds_no_secret():
    text = (ROOT / "cluster" / "Containerfile").read_text()
    images = re.findall(r"image: (\S+)", (ROOT / "cluster" / "kuberay.yaml").read_text())
    images += re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    for image in images:
        assert re.search(r":\d+\.\d+", image), image
    assert "pip install --no-cache-dir --require-hashes -r requirements.lock" in text
    assert re.search(r"^USER (?!root)", text, re.MULTILINE)
    for source in re.findall(r"^COPY (.+) \./?\S*$", text, re.MULTILINE):
        for name in source.split():
            assert (ROOT / name).exists()
            assert name not in (".", "runs", "data")


@pytest.mark.parametrize("name", [*LAUNCHED, "cluster/kuberay.yaml"])
def test_what_is_to_be_filled_in_is_in_the_guide(name):
    guide = (ROOT / "docs" / "cluster.md").read_text()
    lines = [x.partition("#")[0] for x in (ROOT / name).read_text().splitlines()]
    for word in CAPITALS.findall("\n".join(lines)):
        assert word in guide, word


@pytest.fixture
def acted(tmp_path):
    """Run services.sh with tools that note what they are asked."""
    folder, tools, log = tmp_path / "services", tmp_path / "tools", tmp_path / "log"
    (folder / "postgres").mkdir(parents=True)
    (folder / "postgres" / "PG_VERSION").touch()
    (folder / "password").write_text("x\n")
    tools.mkdir()
    lock = folder / "postgres" / "postmaster.pid"
    acts = {
        "pg_ctl": f'[ -f {lock} ] && [ "$1" = start ] && exit 1\necho pg_ctl $1 >> {log}',
        "psql": "echo 1",
        "mlflow": f"echo mlflow $1 >> {log}\nsleep 100",
    }
    for name, act in acts.items():
        (tools / name).write_text(f"#!/bin/sh\n{act}\n")
        (tools / name).chmod(0o755)

    def do(action: str, seconds: float = 0.5) -> list[str]:
        log.write_text("")
        command = ["bash", str(ROOT / "cluster" / "services.sh"), action, str(folder)]
        path = f"{tools}:{os.environ['PATH']}"
        subprocess.run(command, env=os.environ | {"PATH": path}, check=True, timeout=60)
        deadline = time.monotonic() + seconds
        while "mlflow server" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        return log.read_text().splitlines()

    return folder, do


def test_a_process_with_the_number_of_another_machine_is_no_service(acted):
    folder, do = acted
    lock, noted = folder / "postgres" / "postmaster.pid", folder / "mlflow.pid"
    with subprocess.Popen(["sleep", "100"]) as stranger:
        try:
            lock.write_text(f"{stranger.pid}\n{folder}/postgres\n")
            noted.write_text(f"{stranger.pid}\n")
            assert do("stop") == []
            assert stranger.poll() is None
            noted.write_text(f"{stranger.pid}\n")
            assert do("start", 10) == ["pg_ctl start", "mlflow server"]
            assert not lock.exists()
            do("stop")
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_services_that_run_are_not_started_again_and_are_stopped(acted):
    folder, do = acted
    assert do("start", 10) == ["pg_ctl start", "mlflow server"]
    noted = folder / "mlflow.pid"
    mlflow = Path("/proc") / noted.read_text().strip()
    postgres = [
        sys.executable,
        "-c",
        "import time; time.sleep(100)",
        "-D",
        str(folder / "postgres"),
    ]
    with subprocess.Popen(postgres) as running:
        try:
            (folder / "postgres" / "postmaster.pid").write_text(f"{running.pid}\n")
            assert do("start") == []
            assert do("stop") == ["pg_ctl stop"]
        finally:
            running.kill()
    assert not noted.exists()
    deadline = time.monotonic() + 10
    while mlflow.exists() and mlflow.joinpath("cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def services(free_port):
    """Run the services of a head; PostgreSQL as nobody where the tests are root's."""
    folder = Path(tempfile.mkdtemp(prefix="supsup-services-"))
    tools = folder / "bin"
    tools.mkdir()
    if os.geteuid() == 0:
        folder.chmod(0o755)
        os.chown(folder, 65534, 65534)
        for name in ("initdb", "pg_ctl"):
            tool = tools / name
            tool.write_text(
                f"#!/bin/sh\nchown 65534 {folder}/password\nexec setpriv --reuid=65534 "
                f'--regid=65534 --clear-groups {shutil.which(name)} "$@"\n'
            )
            tool.chmod(0o755)
    python = Path(sys.executable).parent
    environment = os.environ | {
        "POSTGRES_PORT": str(free_port + 1),
        "MLFLOW_PORT": str(free_port),
        "PATH": f"{tools}:{python}:{os.environ['PATH']}",
    }

    def do(action: str) -> str:
        command = ["bash", str(ROOT / "cluster" / "services.sh"), action, str(folder)]
        return subprocess.run(
            command, env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=100
        ).stdout

    yield folder, do
    do("stop")
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.skipif(not shutil.which("initdb"), reason="there is no PostgreSQL here")
def test_the_services_of_a_head_listen_on_loopback_alone(services, free_port):
    from sweeps.doctor import storage

    folder, do = services
    for _ in range(2):
        assert do("start") == f"source {folder}/environment\n"
    root = f"http://127.0.0.1:{free_port}"
    deadline = time.monotonic() + 200
    while status(root) != 200:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert status(root, host="elsewhere.example") == 403
    environment = folder / "environment"
    assert environment.stat().st_mode & 0o077 == 0
    studies = re.search(r"SUPSUP_STORAGE=(\S+)", environment.read_text())[1]
    assert "empty, the first sweep makes its tables" in storage(studies)[0].text
    assert storage(studies.replace("/studies", "/mlflow"))[0].level == "fail"
    password = (folder / "password").read_text().strip()
    assert not any(password in read(path) for path in Path("/proc").glob("[0-9]*/cmdline"))
    loopback = {"127.0.0.1", "::ffff:127.0.0.1"}
    ours = {free_port, free_port + 1}
    assert {ip for _, ip, port in listeners() if port in ours} <= loopback


def read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
