#!/usr/bin/env bash
# Installs what tests/multinode needs on Debian and its like, as root; prints what it has added.
set -euo pipefail
[ "$(id -u)" = 0 ] || { echo "install.sh: start it as root" >&2 && exit 2; }
missing=()
command -v ip >/dev/null || missing+=(iproute2)
[ -x /usr/sbin/sshd ] || missing+=(openssh-server)
command -v ssh >/dev/null || missing+=(openssh-client)
command -v pdsh >/dev/null || missing+=(pdsh)
[ "${#missing[@]}" -gt 0 ] || { echo "install.sh: all is there" && exit 0; }
# no sshd of Debian's own is to start: the tests bring theirs
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
apt-get -qq update
DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}" >/dev/null
echo "install.sh: added ${missing[*]}; to remove: apt-get remove ${missing[*]}"
