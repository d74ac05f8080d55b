#!/usr/bin/env bash
# Everything: set-up, lint, generated files, unit and kernel tests, scripts of the
# command line, the clouds' SDKs. Exit code 0 means that all of it passed.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin" GOTOOLCHAIN="${GOTOOLCHAIN:-local}"

step() { printf '\n== %s\n' "$1"; }

[ "$(id -u)" = 0 ] || echo "not root: tests that need network namespaces, BPF or Docker are skipped; as root all of them run"

step "set-up"
scripts/setup.sh

step "format, vet, staticcheck"
unformatted=$(gofmt -l cmd internal e2e scripts)
[ -z "$unformatted" ] || { echo "gofmt would change: $unformatted" >&2; exit 1; }
go vet ./...
go tool staticcheck ./...

step "Windows: vet, build, sizes"
scripts/windows.sh

step "generated files"
scripts/check-generated.sh

tools=$(mktemp -d)
go build -o "$tools/testlog" ./scripts/testlog

# "go test" does not say what it has skipped; testlog keeps a list.
tests() { go test -race -json ./... | "$tools/testlog" "$tools/skipped"; }

skips() {
  [ -e "$tools/skipped" ] || return 0
  step "skipped: $(wc -l < "$tools/skipped") tests"
  cut -f 1 "$tools/skipped" | sort | uniq -c | sort -rn
}
trap 'skips; rm -rf "$tools"' EXIT

step "tests"
tests

step "software development kits"
(cd e2e && go vet ./... && tests)
