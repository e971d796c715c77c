#!/usr/bin/env bash
# Tests on cgroup version 2, which is what users have, in a virtual machine that is booted twice:
# - with SELinux: the behaviour tests that depend on cgroups, the conformance rows, and attacks;
# - with AppArmor: the tests that need it, and nothing else.
#
#   scripts/test-cgroup2.sh [FILTER...]     only these behaviour tests, by name, in the first boot
#
# SUITE=security takes the filters as names of that suite's tests, and MODULE=apparmor the second boot:
#   SUITE=security MODULE=apparmor scripts/test-cgroup2.sh apparmor::
# SUITE=compat compares with docker, which needs no arguments to run all cases:
#   SUITE=compat scripts/test-cgroup2.sh tmpfs
# SUITE=chaos takes the arguments of NOMAD_DRIVER_SHIM_CHAOS (docs/chaos.md):
#   SUITE=chaos scripts/test-cgroup2.sh --faults 200
# NOMAD_DRIVER_SHIM_TEST_PROGRAM and NOMAD_DRIVER_SHIM_TEST_RUNTIME are passed to the tests in the virtual machine.
set -euo pipefail
cd "$(dirname "$0")/.."

# The tests that run without arguments, by parts of their names. The suite of an empty list is not run. Emulation is
# some twenty times slower than the machine itself, so each entry takes minutes.
#
# Resources, OOM, statistics, exec, stop, recovery, leaks, and the other basics of a task.
behaviour=(lifecycle:: release:: ahead:: limits:: options:: stats:: exec:: stop:: recovery:: leaks:: cgroup2:: first_process::an_oom)
# Attacks whose outcome may differ on cgroup version 2 or with this kernel.
security=(bounds::a_task bounds::neither mounts::a_link directories::no_user)
# Tests of the suite `security` that need AppArmor in the kernel.
apparmor=(apparmor::)

case $PWD/ in
  /run/* | /tmp/* | /var/tmp/*)
    echo "cgroup2: the virtual machine mounts file systems of its own at /run, /tmp and /var/tmp, and does not see $PWD; move the clone elsewhere" >&2
    exit 1 ;;
esac
directory=$PWD/target/cgroup2
mkdir -p "$directory"
log=$directory/log
: > "$log"
built=$(cargo test --locked --no-run --test behaviour --test chaos --test compat --test conformance --test security --message-format=json 2>/dev/null |
  jq -r 'select(.profile.test == true and .target.kind == ["test"]) | "\(.target.name) \(.executable)"')
program() { sed -n "s/^$1 //p" <<< "$built" | tail -n1; }

# suite NAME ARGUMENT...: prints the lines of the guest's script that run a suite. A failure of one suite does not
# prevent the next one from running.
suite() {
  local name=$1; shift
  [ -x "$(program "$name")" ] || { echo "cgroup2: the tests of $name were not built" >&2; exit 1; }
  # The program is copied to memory: each test starts it again and reads it in parts, which is slow over the network
  # file system.
  printf 'cp %q /var/tmp/bin/%s\n' "$(program "$name")" "$name"
  printf '/var/tmp/bin/%s --color never' "$name"; printf ' %q' "$@"; printf ' || code=1\n'
}

# boot MODULE: boots a virtual machine with this security module and runs the suites whose lines are on standard input.
# Fails unless all of them were run.
boot() {
  local module=$1 run=$directory/run-$1 suites began=$SECONDS code=0 part
  suites=$(cat)
  part=$(mktemp)
  {
    printf '#!/bin/sh\n# Emulation is slow, so time limits are longer.\nexport NOMAD_DRIVER_SHIM_TEST_PATIENCE=600\n'
    if [ -n "${NOMAD_DRIVER_SHIM_TEST_RUNTIME:-}" ]; then
      printf 'export NOMAD_DRIVER_SHIM_TEST_RUNTIME=%q\n' "$NOMAD_DRIVER_SHIM_TEST_RUNTIME"
    fi
    if [ -n "${NOMAD_DRIVER_SHIM_TEST_PROGRAM:-}" ]; then
      # The program is copied, because it may be in a temporary directory, of which the guest has its own.
      cp "$NOMAD_DRIVER_SHIM_TEST_PROGRAM" "$directory/program"
      printf 'export NOMAD_DRIVER_SHIM_TEST_PROGRAM=%q\n' "$directory/program"
    fi
    [ -z "${NOMAD_DRIVER_SHIM_CHAOS:-}" ] || printf 'export NOMAD_DRIVER_SHIM_CHAOS=%q\n' "$NOMAD_DRIVER_SHIM_CHAOS"
    printf 'mkdir -p /var/tmp/bin\ncd %q\ncode=0\n%s\nexit $code\n' "$PWD" "$suites"
  } > "$run"
  chmod +x "$run"
  scripts/cgroup2-vm.sh "$run" 6G "$module" > >(tee -a "$log" "$part") 2>&1 || code=$?
  sleep 0.5
  local wanted results passed
  wanted=$(grep -c '^cp ' <<< "$suites" || true)
  results=$(grep -c '^test result: ' "$part" || true)
  passed=$(sed -n 's/^test result: .* \([0-9]*\) passed.*/\1/p' "$part" | awk '{ sum += $1 } END { print sum + 0 }')
  rm -f "$part"
  printf 'cgroup2: %s tests passed inside, on %s with %s, in %s s\n' \
    "$passed" "$(ls "$directory/lib/modules")" "$module" "$((SECONDS - began))" >&2
  [ "$code" = 0 ] && [ "$results" = "$wanted" ] && [ "$passed" -gt 0 ]
}

if [ "${SUITE:-}" = chaos ]; then
  NOMAD_DRIVER_SHIM_CHAOS="$*"
  suite chaos --ignored --nocapture | boot "${MODULE:-selinux}"
  exit
fi
# Only the named tests, two at a time.
if [ $# -gt 0 ] || [ "${SUITE:-}" = compat ]; then
  suite "${SUITE:-behaviour}" --test-threads 2 "$@" | boot "${MODULE:-selinux}"
  exit
fi
failed=0
{
  [ "${#behaviour[@]}" = 0 ] || suite behaviour --test-threads 2 "${behaviour[@]}"
  [ "${#security[@]}" = 0 ] || suite security --test-threads 2 "${security[@]}"
  suite conformance --test-threads 3 --skip "a driver that"
} | boot selinux || failed=1
suite security --test-threads 3 "${apparmor[@]}" | boot apparmor || failed=1
exit $failed
