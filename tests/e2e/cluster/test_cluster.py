"""The cluster of docs/deploying.md over SSH works on four machines: a laptop, a head and two workers.

Everything runs as a user would run it: `ray up`, `ray submit`, `ray job`, `serve deploy`, `ray down`, with
clusters/on-premises.yaml. Only what these machines lack is left out of that file: a GPU, and a package index.
The tests in this file run in their order on the same machines.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.cluster.machines import Machine, Network, copy_repository, missing, network

ROOT = Path(__file__).parents[3]
RUNS = "/root/rayft-runs"
LONG = {
    "optim": {"steps": 400},
    "evaluate": {"checkpoint_seconds": 1.0, "max_new_tokens": 4, "every": 40},
    "sweep": {
        "methods": {"lora": {"ranks": [4], "lr": [1e-2, 1e-3]}, "cla": {"ranks": [8], "lr": [1e-2]}},
        "lanes": 2,
        "grace": 400,
    },
}
"""Settings on top of the packaged `tiny`, with trials that take long enough to be interrupted."""

NODES = """
import json, ray
ray.init("auto", log_to_driver=False)
print(json.dumps([node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]))
"""

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """Boot the machines; the laptop has a checkout, the head's address and a token."""
    root = tmp_path_factory.mktemp("machines")
    with network(root, ROOT, ("laptop", "head", "one", "two")) as machines:
        laptop = machines["laptop"]
        checkout = laptop.home / "rayft"
        copy_repository(ROOT, checkout)
        tiny = yaml.safe_load((ROOT / "rayft/configs/tiny.yaml").read_text())
        own = {**tiny, **LONG, "name": "own", "output": f"{RUNS}/own"}
        own["data"] = {**tiny["data"], "train": 400}
        (checkout / "own.yaml").write_text(yaml.safe_dump(own))
        config = yaml.safe_load((ROOT / "clusters/on-premises.yaml").read_text())
        config["provider"] |= {
            "head_ip": machines["head"].address,
            "worker_ips": [machines["one"].address, machines["two"].address],
        }
        config["auth"]["ssh_user"] = "root"
        config["setup_commands"] = [one.replace("[demo,gpu]", "[demo]") for one in config["setup_commands"]]
        config["worker_setup_commands"] = []
        # One lane a worker.
        config["worker_start_ray_commands"][-1] += " --num-cpus=1"
        (checkout / "mine.yaml").write_text(yaml.safe_dump(config))
        with (laptop.home / ".bashrc").open("a") as file:
            file.write("export PATH=$HOME/rayft-env/bin:$PATH RAY_AUTH_MODE=token; cd ~/rayft\n")
        laptop.run("ray get-auth-token --generate")
        yield machines


def until(ready: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait for a value that is not empty."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := ready():
            return found
        time.sleep(1)
    raise TimeoutError(f"{what} did not happen within {seconds} s")


def nodes(net: Network) -> list[str]:
    """Return the addresses of the nodes of the cluster, according to its head."""
    (net["head"].home / "nodes.py").write_text(NODES)
    printed = net["head"].run("python ~/nodes.py 2> /dev/null", check=False).strip().splitlines()
    return sorted(json.loads(printed[-1])) if printed else []


def runs(net: Network, kind: str) -> list[dict[str, Any]]:
    """Return the tracked runs of a kind: name, status, and steps of the training loss."""
    script = f"""
import json, mlflow
client = mlflow.MlflowClient('http://{net["head"].address}:5000')
(experiment,) = [one for one in client.search_experiments() if one.name == 'rayft']
found = client.search_runs([experiment.experiment_id], "tags.`rayft.kind` = '{kind}'")
print(json.dumps([
    {{'name': r.info.run_name, 'status': r.info.status,
      'steps': [m.step for m in client.get_metric_history(r.info.run_id, 'train_loss')]}} for r in found]))
"""
    (net["head"].home / "runs.py").write_text(script)
    return json.loads(net["head"].run("python ~/runs.py 2> /dev/null").strip().splitlines()[-1])


def plain(text: str) -> str:
    """Return the text of a terminal as one line without colours."""
    return " ".join(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).split())


def test_ray_up_makes_a_cluster(net: Network) -> None:
    log = net["laptop"].disk / "up.log"
    assert net["laptop"].start("ray up -y mine.yaml", log).wait(400) == 0, log.read_text()[-3000:]
    addresses = sorted(net[name].address for name in ("head", "one", "two"))
    until(lambda: nodes(net) == addresses, 180, "the cluster of three nodes")
    for name in ("head", "one", "two"):
        where = net[name].run("python -c 'import rayft; print(rayft.__file__)'").strip()
        assert where == "/root/rayft-code/rayft/__init__.py", "the package is not the one that was mounted"


def test_the_tracking_server_listens_on_the_private_address_alone(net: Network) -> None:
    head = net["head"]
    assert head.run(f"curl -s http://{head.address}:5000/health") == "OK"
    assert "10.77.0.2:5000" in head.run("ss -tln")
    assert not re.search(r"(0\.0\.0\.0|\*):5000", head.run("ss -tln"))


def test_a_wrong_token_is_refused(net: Network) -> None:
    settings = f"RAY_ADDRESS={net['head'].address}:6379 RAY_AUTH_MODE=token RAY_AUTH_TOKEN={'0' * 64}"
    said = net["one"].run(
        f"{settings} rayft sweep tiny 2>&1; echo rc $?",
        check=False,
    )
    assert "rc 1" in said
    assert "refuses the token" in said


def test_a_sweep_survives_the_loss_of_a_worker(net: Network) -> None:
    laptop = net["laptop"]
    log = laptop.disk / "sweep.log"
    # The script is copied to the head by `ray submit`, a configuration by hand.
    laptop.run("ray rsync-up mine.yaml own.yaml /root/own.yaml")
    sweep = laptop.start("ray submit mine.yaml pipelines/sweep.py -- --config /root/own.yaml", log)
    trials = net["head"].home / "rayft-runs/own/trials"

    def busy() -> Machine | None:
        """Find a worker whose trial has a checkpoint at home, and is not done."""
        begun = {path.parent.parent.parent.name for path in trials.glob("*/checkpoint/*/state.json")}
        begun -= {path.parent.name for path in trials.glob("*/result.json")}
        for name in ("one", "two"):
            made = (net[name].home / ".cache/rayft/lanes").glob("*/made/root/rayft-runs/own/trials/*")
            if begun & {path.name for path in made}:
                return net[name]
        return None

    lost = until(lambda: busy() or sweep.poll() is not None, 240, "a checkpoint of a trial on a worker")
    assert isinstance(lost, Machine), plain(log.read_text())[-4000:]
    lost.lose()
    said = until(
        lambda: "its node was lost" in plain(log.read_text()) and plain(log.read_text()), 90, "the news"
    )
    assert lost.address in said
    # The sweep reports that a lane waits for a place. It uses the machine when that is back.
    until(lambda: "for a place in the cluster" in plain(log.read_text()), 60, "that it waits")
    lost.boot()
    assert sweep.wait(400) == 0, plain(log.read_text())[-4000:]
    results = [json.loads(path.read_text())["result"] for path in trials.glob("*/result.json")]
    assert len(results) == 3
    assert all(result["finished"] and result["steps"] == 400 for result in results)
    for path in trials.glob("*/result.json"):
        assert (path.parent / "adapter/adapter_model.safetensors").is_file(), "an adapter stayed on its node"
    tracked = {run["name"]: run for run in runs(net, "trial")}
    assert {run["status"] for run in tracked.values()} == {"FINISHED"}
    for run in tracked.values():
        assert run["steps"] == sorted(set(run["steps"])), "a step was tracked twice"


def test_the_lost_worker_joins_again(net: Network) -> None:
    until(lambda: len(nodes(net)) == 3, 240, "the worker's return")


def test_results_can_be_copied_to_the_laptop(net: Network) -> None:
    net["laptop"].run(f"ray rsync-down mine.yaml {RUNS}/own/ own/")
    assert (net["laptop"].home / "rayft/own/winner/adapter_config.json").is_file()
    assert (net["laptop"].home / "rayft/own/report.html").is_file()


def test_the_result_is_served_from_the_registry_to_callers_with_a_key(net: Network) -> None:
    head, laptop = net["head"], net["laptop"]
    deployed = yaml.safe_load((head.home / "rayft-runs/own/deploy.yaml").read_text())
    arguments = deployed["applications"][0]["args"]
    assert arguments["adapters"]["own"] == "models:/own/1"
    key = "a-key-of-this-test-alone"
    digest = hashlib.sha256(key.encode()).hexdigest()
    arguments |= {"host": "0.0.0.0", "keys": [{"name": "me", "sha256": digest}]}  # noqa: S104
    (head.home / "serve.yaml").write_text(yaml.safe_dump(deployed))
    url = f"http://{head.address}:{arguments['port']}"
    body = json.dumps({"model": "own", "prompt": "hello", "max_tokens": 4, "temperature": 0})
    (laptop.home / "body.json").write_text(body)

    def ask(key: str) -> tuple[str, str]:
        printed = laptop.run(
            f"curl -s -w '%{{http_code}}' {url}/v1/completions -H 'content-type: application/json' "
            f"-H 'authorization: Bearer {key}' -d @$HOME/body.json",
            check=False,
        )
        return printed[-3:], printed[:-3]

    laptop.run("ray exec mine.yaml 'serve deploy ~/serve.yaml'", 200)
    until(lambda: ask(key)[0] == "200", 240, "an answer")
    assert "RUNNING" in laptop.run("ray exec mine.yaml 'serve status'", 200)
    assert ask("another")[0] == "401"
    assert json.loads(ask(key)[1])["model"] == "own"
    laptop.run("ray exec mine.yaml 'serve shutdown -y'", 200)


def test_a_job_that_is_stopped_ends_its_runs_and_continues(net: Network) -> None:
    laptop = net["laptop"]
    forward = laptop.start("ray dashboard mine.yaml", laptop.disk / "dashboard.log")
    here = "export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265;"
    submit = (
        f"{here} ray job submit --no-wait --submission-id {{}} --working-dir . -- "
        "python pipelines/sweep.py --config own.yaml --set name=job --set output=null "
        "--set optim.steps=200 --set sweep.grace=200"
    )
    try:
        until(
            lambda: (
                "OK"
                in laptop.run("curl -s http://127.0.0.1:8265/api/version > /dev/null && echo OK", check=False)
            ),
            60,
            "the forwarded port",
        )
        laptop.run(submit.format("first"), 200)
        trials = net["head"].home / "rayft-runs/job/trials"
        until(lambda: [*trials.glob("*/checkpoint/*/state.json")], 240, "a checkpoint of a job's trial")
        laptop.run(f"{here} ray job stop first", 240)
        sweep = [run for run in runs(net, "sweep") if run["name"] == "job"]
        assert [run["status"] for run in sweep] == ["KILLED"]
        assert "RUNNING" not in {run["status"] for run in runs(net, "trial")}
        saved = {path.parent.name for path in trials.glob("*/checkpoint/*/state.json")}
        assert saved
        laptop.run(submit.format("second"), 200)
        status = f"{here} ray job status second"
        until(lambda: "Status for job" not in laptop.run(status), 400, "its end")
        assert "'second' succeeded" in laptop.run(status)
        assert [run["status"] for run in runs(net, "sweep") if run["name"] == "job"] == ["FINISHED"]
    finally:
        forward.kill()


def test_ray_down_ends_it(net: Network) -> None:
    net["laptop"].run("ray down -y mine.yaml", 120)
    assert "ray::" not in net["head"].run("ps ax")
    assert "raylet" not in net["head"].run("ps ax")
