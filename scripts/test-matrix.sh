#!/usr/bin/env bash
# Runs the core of the behaviour tests with each pair of a containerd (with its shim) and an OCI runtime. The programs
# are this distribution's own and the newer ones that `scripts/setup.sh matrix` has built.
set -euo pipefail
cd "$(dirname "$0")/.."
matrix=$PWD/target/matrix
# The tests that depend on containerd, the shim or the runtime. All other tests have the same outcome with every
# version.
core=(lifecycle:: release:: stop:: recovery:: crash:: survival:: exec:: stats:: logs:: archives::every)
skip=(--skip three_hundred)
say() { printf '\nmatrix: %s\n' "$*" >&2; }

cargo test --locked --no-run
version() { "$@" 2>/dev/null | tr '\n' ' ' | tr -s ' '; echo; }
stores=("" "$matrix"/containerd-*)
runtimes=(crun runc "$matrix"/runc-*)
failed=() passed=()
for store in "${stores[@]}"; do
  for runtime in "${runtimes[@]}"; do
    name="${store:+$(basename "$store")}"; name="${name:-containerd-of-this-system} with $(basename "$runtime")"
    # A directory in front of PATH that contains only the programs of this pair.
    path=$matrix/path; rm -rf "$path"; mkdir -p "$path"
    [ -z "$store" ] || ln -s "$store"/containerd "$store"/containerd-shim-runc-v2 "$path"
    case $runtime in */*) ln -s "$runtime/runc" "$path/runc"; default=runc ;; *) default=$runtime ;; esac
    say "$name"
    PATH=$path:$PATH version containerd --version >&2
    PATH=$path:$PATH version containerd-shim-runc-v2 -v >&2
    PATH=$path:$PATH version "$default" --version >&2
    if PATH=$path:$PATH NOMAD_DRIVER_SHIM_TEST_RUNTIME=$default \
      cargo test --locked --quiet --test behaviour -- "${core[@]}" "${skip[@]}"; then
      passed+=("$name")
    else
      failed+=("$name")
    fi
  done
done
rm -rf "$matrix/path"
say "passed: ${#passed[@]}"; printf '  %s\n' "${passed[@]}" >&2
[ ${#failed[@]} = 0 ] || { say "FAILED: ${#failed[@]}"; printf '  %s\n' "${failed[@]}" >&2; exit 1; }
