#!/usr/bin/env bash
# The benchmark with the default plan, as it is installed (a release build): target/bench/results.json and .html.
#
#   scripts/bench.sh [ARG...]     further arguments of `nomad-driver-shim bench`
# /run is in memory, as on every host with systemd: where it is not (a container, a small virtual machine), it is so for
# this run, for all that is measured alike.
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
