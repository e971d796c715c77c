#!/usr/bin/env bash
# Runs the benchmark with the default plan and a release build. Writes target/bench/results.json, results.html and
# pictures.
#
#   scripts/bench.sh [ARG...]     further arguments of `nomad-driver-shim bench`
#
# On every host with systemd, /run is a file system in memory. Where it is not (in a container or a small virtual
# machine), the benchmark runs in a mount namespace with such a /run, which is the same for all that is measured.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "$(stat --file-system --format=%T /run)" != tmpfs ]; then
  exec unshare --mount --propagation private sh -c 'mount -t tmpfs tmpfs /run && exec "$0" "$@"' "$PWD/scripts/bench.sh" "$@"
fi
cargo build --release --locked
mkdir -p target/bench
# shellcheck disable=SC2016  # expanded by the inner shell
exec scripts/with-image.sh bash -c \
  'exec target/release/nomad-driver-shim bench --json target/bench/results.json --html target/bench/results.html --pictures target/bench/pictures "$@" "$IMAGE"' bench "$@"
