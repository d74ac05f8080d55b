#!/usr/bin/env bash
# Installs what the tests drive and this machine lacks: Debian packages, as root.
# Prints what it installs, and nothing when nothing is missing.
set -euo pipefail

# program → package
declare -A need=(
  [curl]=curl [ip]=iproute2 [ss]=iproute2 [nft]=nftables [nginx]=nginx-light [clang]=clang [llvm-strip]=llvm
  [setpriv]=util-linux [nsenter]=util-linux [unshare]=util-linux [node]=nodejs [npm]=npm [gcc]=gcc
  [tc]=iproute2 [bpftool]=bpftool [iptables]=iptables [tar]=tar
  [docker]=docker.io [dockerd]=docker.io [containerd]=containerd [runc]=runc [docker-compose]=docker-compose
)
packages=()
for program in "${!need[@]}"; do
  PATH="$PATH:/usr/sbin:/sbin" command -v "$program" >/dev/null || packages+=("${need[$program]}")
done
[ -e /usr/include/bpf/bpf_helpers.h ] || packages+=(libbpf-dev)
# -race needs a C library to build against.
[ -e /usr/include/stdlib.h ] || packages+=(libc6-dev)
[ ${#packages[@]} -gt 0 ] || exit 0

mapfile -t packages < <(printf '%s\n' "${packages[@]}" | sort -u)
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "setup: missing: ${packages[*]}; install them (this script can on Debian, as root)" >&2
  [ "${CI:-}" = true ] && exit 1
  exit 0
fi
echo "setup: installing ${packages[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# Nothing that is installed here starts a service on the machine.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' > "$policy"
  chmod 755 "$policy"
  trap 'rm -f "$policy"' EXIT
fi
apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
