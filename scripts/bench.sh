#!/usr/bin/env bash
# The benchmark with the default plan, as it is installed (a release build): target/bench/results.json and .html.
#
#   scripts/bench.sh [ARG...]     further arguments of `nomad-driver-shim bench`
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --locked
mkdir -p target/bench
# shellcheck disable=SC2016  # expanded by the inner shell
exec scripts/with-image.sh bash -c \
  'exec target/release/nomad-driver-shim bench --json target/bench/results.json --html target/bench/results.html --pictures target/bench/pictures "$@" "$IMAGE"' bench "$@"
