#!/usr/bin/env bash
# Installs what the tests drive and this machine lacks: Debian packages, as root.
# Prints what it installs, and nothing when nothing is missing.
set -euo pipefail

# program → package
declare -A need=(
  [curl]=curl [ip]=iproute2 [ss]=iproute2 [nft]=nftables [nginx]=nginx-light [clang]=clang [llvm-strip]=llvm
  [setpriv]=util-linux [nsenter]=util-linux [unshare]=util-linux [node]=nodejs [npm]=npm [gcc]=gcc
  [tc]=iproute2 [bpftool]=bpftool [iptables]=iptables [tar]=tar
  [wrk]=wrk [haproxy]=haproxy [socat]=socat
  [docker]=docker.io [dockerd]=docker.io [containerd]=containerd [runc]=runc [docker-compose]=docker-compose
  [rsyslogd]=rsyslog [journalctl]=systemd
)
packages=()
for program in "${!need[@]}"; do
  PATH="$PATH:/usr/sbin:/sbin" command -v "$program" >/dev/null || packages+=("${need[$program]}")
done
[ -e /usr/include/bpf/bpf_helpers.h ] || packages+=(libbpf-dev)
# Windows' binary is run by it; only the 64-bit part, and no window.
[ "$(uname -m)" != x86_64 ] || [ -e /usr/lib/wine/wine64 ] || packages+=(wine64)
# -race needs a C library to build against.
[ -e /usr/include/stdlib.h ] || packages+=(libc6-dev)
# Go modules come over https. These are Debian's place for certificates, Fedora's, and Alpine's.
if [ -z "${SSL_CERT_FILE:-}${SSL_CERT_DIR:-}" ] &&
  [ ! -e /etc/ssl/certs/ca-certificates.crt ] && [ ! -e /etc/pki/tls/certs/ca-bundle.crt ] && [ ! -e /etc/ssl/cert.pem ]; then
  packages+=(ca-certificates)
fi
[ ${#packages[@]} -gt 0 ] || exit 0

mapfile -t packages < <(printf '%s\n' "${packages[@]}" | sort -u)
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "setup: missing: ${packages[*]}; on Debian: sudo apt-get install --no-install-recommends ${packages[*]}" >&2
  # Without these nothing can be built, so nothing can say that it is skipped.
  for package in "${packages[@]}"; do
    case "$package" in
    gcc | libc6-dev | ca-certificates)
      echo "setup: no test runs without $package" >&2
      exit 1
      ;;
    esac
  done
  [ "${CI:-}" = true ] && exit 1
  echo "setup: tests that need the others are skipped" >&2
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
