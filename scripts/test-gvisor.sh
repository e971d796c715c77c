#!/usr/bin/env bash
# Tests what is different with gVisor (tests/gvisor), compares a sandbox with one of docker (tests/compat), and runs the
# conformance rows for both ways to use gVisor: runsc behind runc's shim, and gVisor's own shim.
#
#   scripts/test-gvisor.sh [FILTER]     only tests whose name contains FILTER
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PWD/target/gvisor/bin:$PATH
say() { printf '\ngvisor: %s\n' "$*" >&2; }

say "$(runsc --version | tr '\n' ' ')"
cargo test --locked --test gvisor -- --ignored "$@"
# Attacks by mounts and links, in sandboxes. Two tests are skipped, because gVisor has neither the host's namespaces nor
# shared mounts, which they use.
say "attacks with runsc"
NOMAD_DRIVER_SHIM_TEST_RUNTIME=runsc cargo test --locked --test security -- mounts:: links:: \
  --skip every_bind_comes_from_the_bundle --skip volumes_spread_mounts_as_they_say
say "what a program sees, compared with docker run --runtime runsc"
NOMAD_DRIVER_SHIM_TEST_RUNTIME=runsc cargo test --locked --test compat
for runtime in runsc io.containerd.runsc.v1; do
  say "conformance with $runtime"
  NOMAD_DRIVER_SHIM_TEST_RUNTIME=$runtime cargo test --locked --test conformance -- --test-threads 3 "$@"
done
