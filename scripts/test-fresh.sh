#!/usr/bin/env bash
# Tests `make demo` and `make test` on a machine on which nothing is installed: a Debian (or Ubuntu) made by
# debootstrap, with make, this host's trust store and Rust toolchain, and a fresh clone of this repository. Everything
# else must come from the project's own set-up script.
#
#   scripts/test-fresh.sh [SUITE]      SUITE defaults to this host's
#
# The script runs in mount and pid namespaces of its own, so that all processes that it starts end with it.
set -euo pipefail
cd "$(dirname "$0")/.."
suite=${1:-$(. /etc/os-release && echo "$VERSION_CODENAME")}
root=${FRESH_ROOT:-/var/tmp/nomad-driver-shim-fresh}
main() {
say() { printf '\ntest-fresh: %s\n' "$*" >&2; }

if [ "${IN_NAMESPACE:-}" != yes ]; then
  export IN_NAMESPACE=yes
  exec unshare --mount --propagation private --pid --fork --kill-child "$0" "$suite"
fi

rm -rf --one-file-system "$root"
mkdir -p "$root"
say "debootstrap of $suite in $root"
debootstrap --variant=minbase --include=make,ca-certificates "$suite" "$root" > "$root.log" 2>&1 || { tail -n 20 "$root.log" >&2; exit 1; }

say "adding the Rust toolchain and this source ($(git rev-parse --short HEAD))"
# The root directory has to be a mount point: OCI runtimes remount "/" and replace it by pivot_root(2).
mount --bind "$root" "$root"
mkdir -p "$root/opt/rust" "$root/old"
mount --bind -o ro "$(rustc --print sysroot)" "$root/opt/rust"
cp /etc/resolv.conf "$root/etc/resolv.conf"
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
git clone --quiet . "$root/src"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/run"
cd "$root"
pivot_root . old
umount -l /old

inside() {
  /usr/bin/env -i HOME=/root TERM="${TERM:-dumb}" RUST_BACKTRACE=0 \
    PATH=/opt/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt CARGO_HTTP_CAINFO=/etc/ssl/certs/ca-certificates.crt \
    sh -c "cd /src && $1"
}
took() { say "$1 took $(( $(date +%s) - $2 )) s"; }

began=$(date +%s)
inside "make demo"
took "make demo, from nothing," "$began"
began=$(date +%s)
inside "make demo"
took "make demo, the second time," "$began"
began=$(date +%s)
inside "make test"
took "make test" "$began"
say "all commands succeeded"
}

# The commands are in a function, so that bash reads them all before it runs any: after pivot_root, bash can't read this
# file.
main "$@"
