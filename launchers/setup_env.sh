# shellcheck shell=bash
# Sourced by the launchers that bring their own environment. After `setup_env EXTRAS` (a list such as test,plot) the
# package is installed with the versions of constraints.txt in .venv at the repository's root, .venv/bin comes first in
# PATH (DeepSpeed looks for ninja there) and $root and $venv are set. A second call installs nothing.
#   PYTHON               the interpreter that makes .venv (default: the first of python3, python3.11, ... that is >= 3.11)
#   PIP_EXTRA_INDEX_URL  a further package index; without it PyTorch's index of CPU builds is one where there is no GPU
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"

refuse() {
    echo "$(basename "$0"): $1" >&2
    exit 2
}
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    if "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        python="$venv/bin/python"
        is_new_enough "$python" || refuse "$venv has a Python older than 3.11: remove that folder and start again"
        return
    fi
    local candidates=(python3 python3.11 python3.12 python3.13)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for python in "${candidates[@]}"; do
        if is_new_enough "$python"; then return; fi
    done
    refuse "no Python >= 3.11 among ${candidates[*]}: install one, or name one with PYTHON=/path/to/python"
}

# The Debian packages of what is missing. DeepSpeed compiles its CPU communication op when it first starts.
missing_packages() {
    local header='import os, sys, sysconfig; sys.exit(not os.path.isfile(sysconfig.get_path("include") + "/Python.h"))'
    echo '#include <vector>' | "${CXX:-c++}" -x c++ -fsyntax-only - >/dev/null 2>&1 || echo "g++"
    "$python" -c "$header" || echo "python3-dev"
    [ "$python" = "$venv/bin/python" ] || "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "python3-venv"
}

install_system() {
    local missing="$(missing_packages | xargs)"
    if [ -n "$missing" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "setup: installing $missing" >&2
        { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y $missing; } >&2 || true
        missing="$(missing_packages | xargs)"
    fi
    [ -z "$missing" ] || refuse "missing: $missing (Debian's names, for $python). Install them, then start again"
}

state() { # changes when the environment has to be made anew; a moved repository is one such case
    { cat "$root"/{setup.py,constraints.txt,pyproject.toml} && "$venv/bin/python" -V && echo "$root"; } | sha256sum
}

cpu_builds() { # where there is no NVIDIA GPU: PyPI's torch 2.13.0 brings gigabytes of CUDA, this index's 2.13.0+cpu none
    local index=https://download.pytorch.org/whl/cpu
    local ask="from urllib.request import *; urlopen('$index/torch/', timeout=5)"
    [ -z "${PIP_EXTRA_INDEX_URL:-}" ] && [ ! -e /dev/nvidiactl ] && ! command -v nvidia-smi >/dev/null || return 0
    ! "$venv/bin/python" -c "$ask" 2>/dev/null || echo "--extra-index-url $index"
}

install_package() {
    local index have free need=7 # GiB: .venv takes 5.6 with PyPI's torch, 3 with a CPU build; pip unpacks beside it
    [ "$python" = "$venv/bin/python" ] || "$python" -m venv "$venv"
    index="$(cpu_builds)" have="$(du -sk "$venv" | cut -f1)" free="$(df -Pk "$root" | awk 'NR == 2 { print $4 }')"
    [[ "$("$venv/bin/python" -m pip index versions $index torch 2>/dev/null)" != *+cpu* ]] || need=4
    [ $((have + free)) -ge $((need * 1048576)) ] || refuse "$root has $((free / 1024)) MiB free: .venv needs $need GiB"
    echo "setup: installing into $venv (1 to 5 minutes)" >&2
    (cd "$root" && "$venv/bin/python" -m pip install --quiet --no-input --progress-bar off --disable-pip-version-check \
        $index -c constraints.txt -e ".[$1]")
    state >"$venv/.installed-$1"
}

setup_env() {
    find_python
    install_system
    mkdir -p "$venv"
    exec 9>"$venv/.lock" # two starts at once: the second one waits, then finds everything there
    ! command -v flock >/dev/null || flock 9
    [ "$(state 2>/dev/null)" = "$(cat "$venv/.installed-$1" 2>/dev/null)" ] || install_package "$1"
    exec 9>&-
    export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
}
