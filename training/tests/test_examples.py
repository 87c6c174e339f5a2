"""The jobs in examples/: what they start exists, and a run is queued again only if it got further."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from mamba3_jepa.cli.flags import as_flag
from mamba3_jepa.settings.training import Phase1Settings

EXAMPLES = Path(__file__).parents[2] / "examples"
SRUN = """#!/bin/bash
echo "$@" > called
{run}
"""
SCONTROL = """#!/bin/bash
case "$1" in show) printf 'host7\\nhost8\\n' ;; requeue) echo "$2" > requeued ;; esac
"""


@pytest.mark.parametrize(
    ("run", "status", "requeued"),
    [
        ("touch -d '1 hour ago' run/phase1_last.pt; exit 1", 1, True),
        ("touch run/phase2_last.pt; exit 143", 143, True),
        ("exit 2", 2, False),
        ("touch run/phase1_last.pt; exit 0", 0, False),
    ],
    ids=["first save", "went on", "refused", "done"],
)
def test_slurm_job(tmp_path: Path, run: str, status: int, requeued: bool) -> None:
    (tmp_path / "run").mkdir()
    if "phase2" in run:
        (tmp_path / "run" / "phase2_last.pt").touch()
        os.utime(tmp_path / "run" / "phase2_last.pt", (1, 1))
    for name, text in (("srun", SRUN.format(run=run)), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "OUTPUT_DIR": "run", "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "host[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8",
    }  # fmt: skip
    command = ["bash", str(EXAMPLES / "slurm.sh"), "scripts/train_jepa.py", "--tiny"]
    done = subprocess.run(command, cwd=tmp_path, env=job, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert (tmp_path / "requeued").exists() == requeued
    called = (tmp_path / "called").read_text()
    assert called.startswith("torchrun --nnodes 2 --nproc-per-node 8 ")
    assert "--rdzv-endpoint host7:24711" in called
    assert called.endswith("scripts/train_jepa.py --tiny --output-dir run --resume\n")


def test_slurm_job_needs_a_folder() -> None:
    done = subprocess.run(["bash", str(EXAMPLES / "slurm.sh")], env={}, capture_output=True, text=True)
    assert done.returncode != 0
    assert "OUTPUT_DIR" in done.stderr


def test_kubernetes_job() -> None:
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert spec["completions"] == spec["parallelism"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    words = shlex.split(container["args"][0].partition("scripts/")[2])
    assert (EXAMPLES.parent / "training" / "scripts" / words[0]).is_file()
    flags = {word for word in words if word.startswith("--")}
    assert flags <= {as_flag(name) for name in Phase1Settings().to_dict()}
    assert "--resume" in flags
    nodes = shlex.split(container["args"][0])
    assert nodes[nodes.index("--nnodes") + 1] == str(spec["completions"])
    assert nodes[nodes.index("--nproc-per-node") + 1] == str(container["resources"]["limits"]["nvidia.com/gpu"])
