#!/usr/bin/env bash
# The demo: runs an image from a registry as a task, with the real plugin handshake, containerd's store and a real shim.
#
#   scripts/demo.sh [IMAGE]
#
# COMMAND="..." is the command that `sh -c` runs in the container, and RUNTIME=runsc runs it in a gVisor sandbox.
# Without IMAGE, the script makes a small image and pushes it to a registry that listens on loopback for as long as the
# demo runs.
set -euo pipefail
cd "$(dirname "$0")/.."
image=${1:-}
say() { printf '\ndemo: %s\n' "$*" >&2; }

say "building"
cargo build --locked
program=$PWD/target/debug/nomad-driver-shim

if [ -z "$image" ]; then
  say "starting a registry on loopback"
  # shellcheck disable=SC2016  # expanded by the inner shell
  exec scripts/with-image.sh bash -c 'exec scripts/demo.sh "$IMAGE"'
fi

options=()
case ${RUNTIME:-} in
  "") ;;
  *runsc*)
    options=(--runtime "$RUNTIME")
    # Without an installed runsc, `make demo` has built one here.
    command -v runsc >/dev/null || export PATH=$PWD/target/gvisor/bin:$PATH ;;
  *) options=(--runtime "$RUNTIME") ;;
esac

command=${COMMAND:-'echo "hello from a container: $(hostname), $(uname -r), process $$"; exit 7'}
for round in "pulls the image" "finds it in the store"; do
  say "nomad-driver-shim run --time $image   ($round)"
  code=0
  "$program" run --time "${options[@]}" "$image" sh -c "$command" || code=$?
  say "exit code $code"
  # Exit codes 125 to 127 are this driver's own: the container could not be started.
  [ "$code" -lt 125 ] || exit "$code"
done
