#!/usr/bin/env bash
# Runs a command in the project's own environment: launchers/run.sh bmtpt source ..., launchers/run.sh deepspeed ...
# The first start makes .venv (see setup_env.sh), later ones go straight to the command. Paths are seen from where you are.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
[ $# -gt 0 ] || refuse "name a command, for example: launchers/run.sh bmtpt --help"
setup_env test,plot,triton </dev/null
exec "$@"
