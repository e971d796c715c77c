#!/usr/bin/env bash
# Runs the benchmark with the default plan and a release build. Writes target/bench/results.json, results.html and
# pictures. /run is in memory for all that is measured (with-memory-run.sh).
#
#   scripts/bench.sh [ARG...]     further arguments of `nomad-driver-shim bench`
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --locked
mkdir -p target/bench
# shellcheck disable=SC2016  # expanded by the inner shell
exec scripts/with-memory-run.sh scripts/with-image.sh bash -c \
  'exec target/release/nomad-driver-shim bench --json target/bench/results.json --html target/bench/results.html --pictures target/bench/pictures "$@" "$IMAGE"' bench "$@"
