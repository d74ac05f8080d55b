#!/usr/bin/env bash
# Everything: set-up, lint, generated files, unit and kernel tests, scripts of the
# command line, the clouds' SDKs. Exit code 0 means that all of it passed.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin" GOTOOLCHAIN="${GOTOOLCHAIN:-local}"

step() { printf '\n== %s\n' "$1"; }

step "set-up"
scripts/setup.sh

step "format, vet, staticcheck"
unformatted=$(gofmt -l cmd internal e2e)
[ -z "$unformatted" ] || { echo "gofmt would change: $unformatted" >&2; exit 1; }
go vet ./...
go tool staticcheck ./...
GOOS=windows go vet ./...

step "generated files"
scripts/check-generated.sh

step "tests"
go test -race ./...

step "software development kits"
(cd e2e && go vet ./... && go test -race ./...)
