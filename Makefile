# `make` says what there is. Nothing here needs more than Go 1.26, make and bash; a target that needs another program
# installs it, as root on Debian, or says at once how to get it. Development tools are built on their first use, see hack/tool.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Targets come in the order in which they are named, each with the whole machine for itself.
.NOTPARALLEL:

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
# How programs are built that ship: static, stripped, with no path of this machine in them.
BUILD = CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)'
# More arguments for `go test`, for instance TESTFLAGS='-run TestPrune -v'.
TESTFLAGS ?=
# Arguments of the bench, for instance BENCHFLAGS='--sizes small --repeats 3'.
BENCHFLAGS ?=
# Arguments of the simulation, for instance SCALEFLAGS='--agents 100 --idle 10s'.
SCALEFLAGS ?=
# How long each fuzz target runs in fuzz-short.
FUZZTIME ?= 10s
# How long the soak goes on, and the seed of its generator; empty: any.
SOAK ?= 30m
SEED ?=

API := pkg/api/v1alpha1
CHART := deploy/daemonset
# Renders do not depend on the Helm in use, or on a cluster.
HELM_FLAGS := --namespace imps-system --kube-version 1.36.3
# Every Go module of the repository: the product, the tools, and what tests build.
MODULES := $(shell find . -name go.mod -not -path './bin/*' -not -path './dist/*' -exec dirname {} + | sort)

# missing(program, packages): installs it, as root on Debian and its descendants; otherwise stops with the line that does.
missing = if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "make: installing $(2)" >&2; apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install --no-install-recommends -qq -y $(2) >&2; \
	else echo "make: $(1) is missing; as root: apt-get install --no-install-recommends -y $(2)" >&2; exit 1; fi

.PHONY: help
help: ## Print this list
	@echo 'make TARGET, where TARGET is one of:'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

##### Build, test, show

.PHONY: build
build: need-go ## Build bin/imps-node and bin/imps-credprovider
	$(BUILD) -o bin/ ./cmd/...

.PHONY: dist
dist: need-go ## Build both for amd64 and arm64, into dist/; the same source and VERSION give the same bytes
	@for arch in amd64 arm64; do \
		mkdir -p "dist/linux-$$arch"; \
		GOOS=linux GOARCH=$$arch $(BUILD) -o "dist/linux-$$arch/" ./cmd/...; \
	done; \
	cd dist && sha256sum linux-*/*

.PHONY: test
test: test-unit test-integration ## Run all tests: unit, then on a real API server (25 min; the first run some 15 more)

.PHONY: test-unit
test-unit: need-go need-race ## Run the unit tests, with the race detector
	CGO_ENABLED=1 go test -race $(TESTFLAGS) ./pkg/... ./cmd/...

# Two test binaries at a time: each has a control plane of its own, and waits much.
.PHONY: test-integration
test-integration: need-go need-race need-node ## Run the tests on a real API server, with the race detector
	go run ./test/cluster build
	@export IMPS_TEST_SKIPPED=$$(mktemp); trap 'rm -f "$$IMPS_TEST_SKIPPED"' EXIT; code=0; \
	CGO_ENABLED=1 go test -race -count=1 -p=2 -timeout=30m $(TESTFLAGS) ./test/... || code=$$?; \
	[ ! -s "$$IMPS_TEST_SKIPPED" ] || echo "$$(wc -l <"$$IMPS_TEST_SKIPPED") tests that need root on Linux were skipped"; \
	exit $$code

.PHONY: soak
soak: need-go need-race need-node ## Run imps under random changes and faults for SOAK (30m), from SEED; before, as root, 1,000 cells on a kubelet
	go run ./test/cluster build
	IMPS_TEST_CELLS=10 CGO_ENABLED=1 go test -race -count=1 -v -run TestEachCell ./test/node
	CGO_ENABLED=1 go run ./test/soak -for='$(SOAK)' $(if $(SEED),-seed='$(SEED)')

.PHONY: fuzz-short
fuzz-short: need-go ## Run each fuzz target for FUZZTIME (10s)
	go test -list '^Fuzz' ./pkg/... ./cmd/... \
		| awk '/^Fuzz/ {targets[n++] = $$1} /^ok/ {for (i = 0; i < n; i++) print $$2, targets[i]; n = 0}' \
		| while read -r package target; do \
			echo "$$package $$target"; \
			go test -run '^$$' -fuzz "^$$target\$$" -fuzztime '$(FUZZTIME)' "$$package" </dev/null || exit 1; \
		done

.PHONY: demo
demo: need-go need-node ## Show imps at work on a real API server; KEEP=1 leaves it running (first run: about 10 min)
	go run ./test/demo

.PHONY: bench
bench: need-go ## Measure imps beside plain clients, its provider beside ECR's (12 min); BENCHFLAGS=--help lists what else there is
	go run ./test/bench $(BENCHFLAGS)

.PHONY: scale
scale: need-go ## Run 1,000 agents on a real API server (10 min, 5 GiB); SCALEFLAGS=--help lists what else there is
	go run ./test/scale $(SCALEFLAGS)

##### Keep the repository in order

.PHONY: fmt
fmt: need-go ## Format all Go code
	golangci_lint=$$(hack/tool golangci-lint); "$$golangci_lint" fmt ./...

.PHONY: lint
lint: need-go ## Lint the Go code of every module
	@golangci_lint=$$(hack/tool golangci-lint); \
	for module in $(MODULES); do \
		packages=$$(cd "$$module" && go list ./... 2>/dev/null) || { echo "make: go list fails in $$module" >&2; exit 1; }; \
		[ -z "$$packages" ] || (cd "$$module" && "$$golangci_lint" run --config '$(CURDIR)/.golangci.yml' ./...); \
	done

.PHONY: generate
generate: need-go ## Write deepcopy functions and the CRD from the API types
	$(call write_generated,$(API),$(CHART)/crds)

.PHONY: golden
golden: need-go ## Write the chart's renders that are checked in
	$(call write_golden,$(CHART)/testdata)

.PHONY: verify
verify: verify-format verify-tidy verify-generated verify-golden verify-chart lint ## Fail on what is stale, untidy or a lint finding

.PHONY: verify-format
verify-format: need-go
	@files=$$("$$(go env GOROOT)/bin/gofmt" -l .); \
	[ -z "$$files" ] || { echo "make: not formatted; run make fmt:" >&2; echo "$$files" >&2; exit 1; }

.PHONY: verify-tidy
verify-tidy: need-go
	@untidy=; \
	for module in $(MODULES); do (cd "$$module" && go mod tidy -diff) || untidy+=" $$module"; done; \
	[ -z "$$untidy" ] || { echo "make: go.mod or go.sum is not tidy; run go mod tidy in:$$untidy" >&2; exit 1; }

.PHONY: verify-generated
verify-generated: need-go
	@tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	$(call write_generated,$$tmp,$$tmp/crds); \
	diff -u $(API)/zz_generated.deepcopy.go "$$tmp/zz_generated.deepcopy.go" && diff -ruN $(CHART)/crds "$$tmp/crds" \
		|| { echo "make: generated files are stale; run make generate" >&2; exit 1; }

.PHONY: verify-golden
verify-golden: need-go
	@tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	$(call write_golden,$$tmp); \
	diff -ruN --exclude='*.values.yaml' $(CHART)/testdata "$$tmp" \
		|| { echo "make: the chart renders otherwise than what is checked in; look at the difference, then run make golden" >&2; exit 1; }

.PHONY: verify-chart
verify-chart: need-go
	@helm=$$(hack/tool helm); \
	for values in $(CHART)/testdata/*.values.yaml; do \
		"$$helm" lint --strict --quiet $(HELM_FLAGS) --values "$$values" $(CHART); \
	done

.PHONY: tools
tools: need-go ## Build all development tools (they are built when needed, too)
	@for tool in hack/tools/*; do hack/tool "$${tool##*/}"; done

.PHONY: clean
clean: ## Remove what was built into this folder
	rm -rf bin dist coverage*

# write_generated(folder of Go files, folder of CRDs)
define write_generated
controller_gen=$$(hack/tool controller-gen); \
"$$controller_gen" object paths=./$(API) output:object:dir="$(1)"; \
"$$controller_gen" crd paths=./$(API) output:crd:dir="$(2)"
endef

# write_golden(folder)
define write_golden
helm=$$(hack/tool helm); \
for values in $(CHART)/testdata/*.values.yaml; do \
	name=$${values##*/}; \
	"$$helm" template imps-node $(CHART) $(HELM_FLAGS) --values "$$values" >"$(1)/$${name%.values.yaml}.golden.yaml"; \
done
endef

##### What must be there

.PHONY: need-go
need-go:
	@command -v go >/dev/null || { echo "make: go is missing; see https://go.dev/doc/install" >&2; exit 1; }

.PHONY: need-git
need-git:
	@command -v git >/dev/null || $(call missing,git,git)

# The race detector needs a C compiler and the C library's headers.
.PHONY: need-race
need-race:
	@echo '#include <stdlib.h>' | $$(CGO_ENABLED=1 go env CC) -E - >/dev/null 2>&1 || $(call missing,a C compiler,gcc libc6-dev)

# Nodes are for root on Linux alone; others go without.
.PHONY: need-node
need-node:
	@[ "$$(id -u)" != 0 ] || [ "$$(uname)" != Linux ] || { [ -x /usr/lib/cni/host-local ] && PATH="$$PATH:/usr/sbin" command -v runc >/dev/null; } \
		|| $(call missing,runc,runc containernetworking-plugins)
