# The two commands that matter: make demo, make test.
.PHONY: demo test windows attack build install generate lint bench fuzz setup

build:
	CGO_ENABLED=0 go build -trimpath -o bin/imdsgate ./cmd/imdsgate

# make install PREFIX=/usr: what was built is taken as it is, so that root needs no Go.
PREFIX ?= /usr/local

install: bin/imdsgate
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 755 bin/imdsgate $(DESTDIR)$(PREFIX)/bin/imdsgate

bin/imdsgate:
	$(MAKE) build

demo: build
	@bin/imdsgate demo

# Installs what is missing (Debian, as root), then runs everything.
test:
	@scripts/test.sh

# Attacks the running agent and proxy from real containers (root, Docker's engine):
# a row each, what stopped it, and a count. What goes wrong besides is on stderr.
attack:
	@report=$$(mktemp) && log=$$(mktemp) || exit 1; trap 'rm -f "$$report" "$$log"' EXIT; \
	PATH="$$PATH:/usr/sbin:/sbin" CI=true IMDSGATE_ATTACK_REPORT="$$report" \
		go test -count=1 -timeout 5m -run '^TestAttack$$' ./cmd/imdsgate >"$$log" 2>&1; code=$$?; \
	cat "$$report"; [ $$code = 0 ] || grep -q '^FAIL ' "$$report" || cat "$$log" >&2; exit $$code

setup:
	@scripts/setup.sh

# The programs for Windows, on amd64 and arm64, in bin; and their sizes.
windows:
	@scripts/windows.sh bin

# Needs clang and libbpf's headers; the result is committed.
generate:
	go generate ./internal/bpf

lint:
	go vet ./...
	go tool staticcheck ./...

# Measures side by side with nginx, HAProxy and Go's reverse proxy (root): a table, and
# build/bench.json. Takes twenty minutes; BENCH='-rounds 1 -only kept' less.
# See docs/benchmarks.md.
bench:
	@scripts/setup.sh
	@cd scripts/bench && PATH="$$PATH:/usr/sbin:/sbin" CI=true \
		go test -count=1 -timeout 2h -run '^TestBench$$' -full -out '$(CURDIR)/build/bench.json' $(BENCH)

# A minute for each fuzz target.
fuzz:
	@scripts/fuzz.sh 60s
