#!/usr/bin/env bash
# The demo: an image from a registry runs as a task, through the real handshake, containerd's store and a real shim.
#
#   scripts/demo.sh [IMAGE]      COMMAND="..." is run in it by `sh -c`
#
# Without IMAGE a small one is made and pushed to a registry that listens on loopback for as long as the demo runs.
set -euo pipefail
cd "$(dirname "$0")/.."
image=${1:-}
say() { printf '\ndemo: %s\n' "$*" >&2; }

say "building"
cargo build --locked
program=$PWD/target/debug/nomad-driver-shim

cache=$PWD/target/demo
mkdir -p "$cache"
registry=
clean_up() { [ -z "$registry" ] || { kill "$registry" 2>/dev/null || true; wait "$registry" 2>/dev/null || true; }; }
trap clean_up EXIT

if [ -z "$image" ]; then
  say "starting a registry on loopback"
  port=$(scripts/free-port.sh)
  printf 'version: 0.1\nstorage: {filesystem: {rootdirectory: %s}}\nhttp: {addr: "127.0.0.1:%s"}\n' \
    "$cache/registry" "$port" > "$cache/registry.yml"
  docker-registry serve "$cache/registry.yml" > "$cache/registry.log" 2>&1 &
  registry=$!
  for _ in $(seq 100); do
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && break
    kill -0 "$registry" 2>/dev/null || { cat "$cache/registry.log" >&2; exit 1; }
    sleep 0.05
  done
  image=127.0.0.1:$port/demo/busybox:1
  [ -e "$cache/image/index.json" ] || scripts/busybox-image.sh "$cache/image"
  skopeo copy --quiet --dest-tls-verify=false "oci:$cache/image:latest" "docker://$image"
fi

command=${COMMAND:-'echo "hello from a container: $(hostname), $(uname -r), process $$"; exit 7'}
for round in "pulls the image" "finds it in the store"; do
  say "nomad-driver-shim run --time $image   ($round)"
  code=0
  "$program" run --time "$image" sh -c "$command" || code=$?
  say "exit code $code"
  # 125 to 127 are ours: the container could not be started.
  [ "$code" -lt 125 ] || exit "$code"
done
