# What a developer and CI call. Only scripts/setup.sh installs or mounts anything on this machine.
CARGO ?= cargo
IMAGE ?=
DRIVER ?=
RUNTIME ?=

.PHONY: help demo bench test test-compat test-gvisor test-thousand test-cgroup2 test-security-cgroup2 test-races chaos chaos-cgroup2 test-matrix test-fresh lint build build-arm64 setup clean

## Prints this list.
help:
	@awk '/^## / {text = text " " substr($$0, 4); next} \
	  /^[a-z0-9-]+:/ && text != "" {sub(/:.*/, ""); sub(/\. .*/, ".", text); printf "make %-22s%s\n", $$0, text} \
	  {text = ""}' Makefile

## Installs and mounts what building, the demo and the tests need, and prints what it did.
setup:
	@scripts/setup.sh

## Runs a real container through the real plugin. IMAGE=registry/name takes any image, COMMAND="..." any command,
## RUNTIME=runsc another runtime; gVisor's is built first (needs Go) where it is not installed.
demo: setup
	@case "$(RUNTIME)" in *runsc*) command -v runsc >/dev/null || scripts/setup.sh gvisor ;; esac
	@RUNTIME="$(RUNTIME)" scripts/demo.sh $(IMAGE)

## What a task costs, side by side: target/bench/results.html. ARGS="--quick" for a first look.
bench: setup
	@scripts/bench.sh $(ARGS)

## All tests: unit, property, behaviour against real parts, conformance. DRIVER=/path/to/plugin runs the conformance rows
## on any driver instead (DRIVER_CONFIG='{...}': its plugin configuration, ARGS="B6": rows by name).
test:
	@scripts/setup.sh tests
	@if [ -n "$(DRIVER)" ]; then DRIVER="$(abspath $(DRIVER))" $(CARGO) test --locked --test conformance -- $(ARGS); \
	 else $(CARGO) test --locked; fi

## What is different with gVisor, and the conformance rows with it: docs/conformance.md. Builds it (needs Go).
test-gvisor:
	@scripts/setup.sh gvisor
	@scripts/test-gvisor.sh $(ARGS)

## A program in a task sees what it sees under `docker run`: compares with a real dockerd. ARGS="tmpfs" runs some cases.
## Then real programs (postgres, redis, nginx, a JVM, node, python, sshd, systemd, dockerd) do the same work on both sides.
test-compat:
	@scripts/setup.sh programs
	@$(CARGO) test --locked --test compat -- --include-ignored $(ARGS)

## The core of the behaviour tests on each pair of containerd (with its shim) and OCI runtime.
test-matrix:
	@scripts/setup.sh matrix
	@scripts/test-matrix.sh

## A thousand tasks alive at once, and what it costs to watch them: a release build, and minutes of the whole machine.
test-thousand: setup
	@$(CARGO) test --locked --release --test behaviour -- --ignored --skip on_purpose --nocapture --test-threads 1

## What meets cgroups, on version 2, in a virtual machine. ARGS="limits::" runs others.
test-cgroup2:
	@scripts/setup.sh cgroup2
	@scripts/test-cgroup2.sh $(ARGS)

## All attacks on cgroup version 2: half an hour. ARGS="mounts::" runs some.
test-security-cgroup2:
	@scripts/setup.sh cgroup2
	@SUITE=security scripts/test-cgroup2.sh $(or $(ARGS),::)

## Directories and links swapped for ten minutes while tasks start and stop, on each runtime.
test-races: setup
	@NOMAD_DRIVER_SHIM_TEST_RACE_SECONDS=300 $(CARGO) test --locked --test security -- races::

## Random commands and faults against the plugin, with a seed that is printed: docs/chaos.md. ARGS="--seed 5 --faults 200
## --mode base", ARGS="--aimed 500", ARGS="--soak 20000", ARGS="--plant intent --faults 300". ARGS="--agent nomad" has a real
## Nomad agent (NOMAD_BIN, or nomad in PATH) in the place of the stand-in.
chaos: setup
	@NOMAD_DRIVER_SHIM_CHAOS="$(ARGS)" $(CARGO) test --locked --test chaos -- --ignored --nocapture

## The same on cgroup version 2, in a virtual machine: ARGS="--faults 200 --mode base".
chaos-cgroup2:
	@scripts/setup.sh cgroup2
	@SUITE=chaos scripts/test-cgroup2.sh $(ARGS)

## In a bare chroot: only Debian, the Rust toolchain and this source.
test-fresh:
	@scripts/setup.sh fresh
	@scripts/test-fresh.sh

## Formatting, clippy, and licences and sources of dependencies.
lint:
	@$(CARGO) fmt --check
	@rustfmt --check init/main.rs
	@$(CARGO) clippy --locked --all-targets -- -D warnings
	@clippy-driver --edition 2024 --crate-name init -C panic=abort --emit=metadata -o target/init.rmeta init/main.rs -D warnings
	@RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --document-private-items
	@scripts/msrv.sh
	@if command -v cargo-deny >/dev/null; then cargo deny check licenses bans sources; \
	 else echo "lint: cargo-deny is not installed (cargo install cargo-deny --locked); skipped"; fi

## The program as it is installed.
build: setup
	@$(CARGO) build --release --locked

## The same for arm64, on any architecture.
build-arm64:
	@scripts/setup.sh arm64
	@CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
	 $(CARGO) build --release --locked --target aarch64-unknown-linux-gnu

## Removes what was built.
clean:
	@$(CARGO) clean
