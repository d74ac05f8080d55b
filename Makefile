# The two commands that matter: make demo, make test.
.PHONY: demo test build generate lint bench fuzz setup

build:
	CGO_ENABLED=0 go build -trimpath -o bin/imdsgate ./cmd/imdsgate

demo: build
	@bin/imdsgate demo

# Installs what is missing (Debian, as root), then runs everything.
test:
	@scripts/test.sh

setup:
	@scripts/setup.sh

# Needs clang and libbpf's headers; the result is committed.
generate:
	go generate ./internal/bpf

lint:
	go vet ./...
	go tool staticcheck ./...

bench:
	go test -run '^$$' -bench . -benchmem ./internal/imds ./internal/policy ./internal/gate

# A minute for each fuzz target.
fuzz:
	@scripts/fuzz.sh 60s
