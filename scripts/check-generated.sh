#!/usr/bin/env bash
# Makes the eBPF objects anew, in a copy, and compares with what is committed.
# Object files differ between versions of clang, so those are compared only where
# the version is the one that made them.
set -euo pipefail
cd "$(dirname "$0")/.."
want=$(cat internal/bpf/clang-version)
have=$(clang --version 2>/dev/null | head -n 1 || true)
if [ "$have" != "$want" ]; then
  echo "not compared: made by '$want', here is '${have:-no clang}'"
  exit 0
fi
before=$(cat internal/bpf/*_bpfel.* | sha256sum)
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -a internal/bpf/. "$copy"
go generate ./internal/bpf
after=$(cat internal/bpf/*_bpfel.* | sha256sum)
cp -a "$copy"/*_bpfel.* internal/bpf/
[ "$before" = "$after" ] || { echo "internal/bpf: generated files differ from their sources: run 'make generate'" >&2; exit 1; }
echo "internal/bpf: as committed"
