#!/usr/bin/env bash
# Runs a command while a registry on loopback serves a small image. The variable IMAGE tells the command the image's
# name.
#
#   scripts/with-image.sh COMMAND [ARG...]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=$here/../target/demo
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)
port=$("$here/free-port.sh")
printf 'version: 0.1\nstorage: {filesystem: {rootdirectory: %s}}\nhttp: {addr: "127.0.0.1:%s"}\n' \
  "$cache/registry" "$port" > "$cache/registry.yml"
docker-registry serve "$cache/registry.yml" > "$cache/registry.log" 2>&1 &
registry=$!
clean_up() { kill "$registry" 2>/dev/null || true; wait "$registry" 2>/dev/null || true; }
trap clean_up EXIT
for _ in $(seq 100); do
  (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && break
  kill -0 "$registry" 2>/dev/null || { cat "$cache/registry.log" >&2; exit 1; }
  sleep 0.05
done
export IMAGE=127.0.0.1:$port/demo/busybox:1
[ -e "$cache/image/index.json" ] || "$here/busybox-image.sh" "$cache/image"
skopeo copy --quiet --dest-tls-verify=false "oci:$cache/image:latest" "docker://$IMAGE"
"$@"
