"""The kernels compiled for GPUs that are not here: enough registers, one barrier, nothing added atomically."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

MAIN = ("5,102400", "6,102400", "8,76800", "10,102400")
ENDS = (MAIN[0], MAIN[-1])  # the paper's setting, and that of most registers
USUAL = (90, ENDS)
REST = ("5,102400,sgd", "3,7", "1,102400", "3,1", "10,1000000")
OTHERS = ((90, (*MAIN[:-1], *REST)), (80, ENDS), (100, ENDS))


def compiled(capability, cases, cache):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.svgd.compiled", str(capability), *cases],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("capability", "cases"), [USUAL, *(pytest.param(*others, marks=pytest.mark.slow) for others in OTHERS)]
)
def test_compiles_for(capability, cases, tmp_path):
    found = compiled(capability, cases, tmp_path)
    assert len(found) == 2 * len(cases)
    for case in found:
        assert case["stack"] == case["local"] == 0, case  # M <= 10: no register spills
        assert case["float_atomics"] == 0, case  # sums in a fixed order: the same to the bit
        # one barrier of the grid in the fused kernel, none in the other; both draw a ticket at the end
        assert case["release"] == case["acquire"] == int(case["one_launch"]), case
        assert case["acq_rel"] == 1, case
    assert found[0]["held"]  # the paper's setting reads its inputs once


@pytest.mark.slow
def test_every_option_compiles(tmp_path):
    found = compiled(90, ["variants"], tmp_path)
    assert len(found) == 9
    assert found[-1]["kernel"] == "distances_kernel"
    assert found[-1]["release"] == found[-1]["acquire"] == found[-1]["acq_rel"] == 0
    for case in found:
        assert case["stack"] == case["local"] == case["float_atomics"] == 0, case
