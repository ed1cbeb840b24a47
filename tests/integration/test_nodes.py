"""A sweep whose lane runs on a node with another disk, which has none of the command's files."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from rayft.files import hash_content
from rayft.flow.config import load_config
from rayft.report.record import SweepRecord
from tests.integration.nodes import Nodes, log_of, two_nodes
from tests.mlflow_server import MlflowServer
from tests.processes import process

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def configure(nodes: Nodes, tiny_folder: Path) -> Path:
    """Configure a sweep of an adapter and of the whole model; only the head has the base and the data."""
    private = nodes.root / "private"
    shutil.copytree(tiny_folder, private / "base")
    rows = [{"prompt": f"{one} + {one} =", "completion": f" {2 * one}"} for one in range(40)]
    (private / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tiny = load_config("tiny", [f"output={nodes.root / 'out'}"]).model_dump(mode="json")
    tiny["model"] = {"name": str(private / "base")}
    tiny["data"] = {
        "source": "jsonl", "name": str(private / "rows.jsonl"), "train": 24, "val": 4, "test": 4,
        "max_length": 64,
    }  # fmt: skip
    tiny["optim"]["steps"] = tiny["sweep"]["grace"] = 4
    tiny["evaluate"] |= {"every": 2, "trail": True, "checkpoint_seconds": 0.0}
    tiny["sweep"]["methods"] = {"lora": {"ranks": [4], "lr": [1e-2]}, "full": {"lr": [1e-3]}}
    tiny["sweep"]["executor"] = "auto"
    (nodes.root / "own.yaml").write_text(yaml.safe_dump(tiny))
    return nodes.root / "own.yaml"


def test_base_data_adapters_checkpoints_and_models_are_transferred(
    tiny_folder: Path, server: MlflowServer
) -> None:
    with two_nodes(("private", "out", "cache")) as nodes:
        config, out = configure(nodes, tiny_folder), nodes.root / "out"
        settings = {
            "RAY_ADDRESS": f"127.0.0.1:{nodes.port}", "MLFLOW_TRACKING_URI": server.uri,
            "RAYFT_CACHE": str(nodes.root / "cache"),
        }  # fmt: skip
        command = [sys.executable, "-m", "rayft.cli", "sweep", str(config)]
        with process(command, nodes.root / "sweep.log", **settings) as sweep:
            assert sweep.wait(400) == 0, log_of(nodes.root)
        record = SweepRecord.load(out / "sweep.json")
        assert {trial.method: trial.status for trial in record.trials} == {
            "lora": "finished",
            "full": "finished",
        }
        assert all(trial.test for trial in record.trials), "what was trained elsewhere was not scored"
        for trial in record.trials:
            folder = Path(trial.folder)
            result = json.loads((folder.parent / "result.json").read_text())
            assert result["result"]["folder"] == str(folder)
            if trial.method == "full":
                hashes = {path.name: hash_content(path) for path in folder.iterdir()}
                assert hashes == result["hashes"]
            else:
                assert sorted(path.name for path in (folder.parent / "trail").iterdir()) == [
                    "step-000002", "step-000004",
                ]  # fmt: skip
            (checkpoint,) = (folder.parent / "checkpoint").glob("step-*")
            assert (checkpoint / "state.json").is_file()
        # Only the tracking spool stays on the node, and served adapters have names that every node can read.
        assert {path.name for path in nodes.there(out).iterdir()} <= {"spool"}
        assert not [*nodes.there(nodes.root / "cache").glob("lanes/*")]
        served = yaml.safe_load((out / "serve.yaml").read_text())
        assert served["registry"] == server.uri
        assert all(source.startswith("models:/") for source in served["adapters"].values())
