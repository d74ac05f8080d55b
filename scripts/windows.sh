#!/usr/bin/env bash
# Vets and builds everything for Windows, on amd64 and arm64, and prints how large
# the programs are. The tests under Wine, which also say how long they take to start,
# are part of "go test": TestWindows and TestWindowsUnits.
#
#   scripts/windows.sh [folder for the programs]
set -euo pipefail
cd "$(dirname "$0")/.."
most=$((8 * 1024 * 1024)) # of the one that only forwards
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
out=${1:-$temporary}
mkdir -p "$out"

go build -o "$temporary/staticcheck" honnef.co/go/tools/cmd/staticcheck
GOOS=windows "$temporary/staticcheck" ./...

for arch in amd64 arm64; do
  export GOOS=windows GOARCH=$arch CGO_ENABLED=0
  go vet ./...
  go vet -tags forwardonly ./cmd/imdsgate
  go build -trimpath -ldflags "-s -w" -o "$out/imdsgate-$arch.exe" ./cmd/imdsgate
  go build -trimpath -ldflags "-s -w" -tags forwardonly -o "$out/imdsgate-forward-$arch.exe" ./cmd/imdsgate
  unset GOOS GOARCH CGO_ENABLED
  for program in imdsgate imdsgate-forward; do
    size=$(stat -c %s "$out/$program-$arch.exe")
    echo "$program-$arch.exe: $size bytes"
    [ "$program" = imdsgate ] || [ "$size" -le "$most" ] || { echo "$program-$arch.exe: more than $most bytes" >&2; exit 1; }
  done
done
