#!/usr/bin/env bash
# Creates an OCI image layout in DIR, with one image that contains a static busybox (tag latest).
#
#   scripts/busybox-image.sh DIR
#
# Needs umoci and busybox-static.
set -euo pipefail
dir=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -rf "$dir"
umoci init --layout "$dir"
umoci new --image "$dir:latest"
umoci unpack --image "$dir:latest" "$work/bundle"
root=$work/bundle/rootfs
mkdir -p "$root"/{bin,tmp,etc,root,proc,sys,dev,var}
cp "$(command -v busybox)" "$root/bin/busybox"
for applet in $(busybox --list); do
  [ "$applet" = busybox ] || ln -sf busybox "$root/bin/$applet"
done
printf 'root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n' > "$root/etc/passwd"
printf 'root:x:0:\nuser:x:1000:\nextra:x:2000:user\n' > "$root/etc/group"
umoci repack --image "$dir:latest" "$work/bundle"
umoci config --image "$dir:latest" --config.cmd /bin/sh --config.env PATH=/bin
