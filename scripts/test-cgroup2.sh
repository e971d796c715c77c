#!/usr/bin/env bash
# The behaviour tests that meet cgroups, on version 2, which is what users have, in a virtual machine.
#
#   scripts/test-cgroup2.sh [FILTER...]     other tests, by name
set -euo pipefail
cd "$(dirname "$0")/.."
# Resources, OOM, statistics, exec, stop, recovery, leaks, and what else a task is.
core=(lifecycle:: limits:: options:: stats:: exec:: stop:: recovery:: leaks:: cgroup2::)
[ $# = 0 ] || core=("$@")
directory=$PWD/target/cgroup2
mkdir -p "$directory"
tests=$(cargo test --locked --no-run --test behaviour --message-format=json 2>/dev/null |
  jq -r 'select(.profile.test == true and .target.name == "behaviour") | .executable' | tail -n1)
[ -x "$tests" ] || { echo "cgroup2: the tests were not built" >&2; exit 1; }
# Emulation is some twenty times slower: a few at a time, and patience.
cat > "$directory/run" <<RUN
#!/bin/sh
export NOMAD_DRIVER_SHIM_TEST_PATIENCE=600
mkdir -p /var/tmp/bin && cp $tests /var/tmp/bin/behaviour
cd $PWD && exec /var/tmp/bin/behaviour --color never --test-threads 2 ${core[*]}
RUN
chmod +x "$directory/run"
log=$directory/log
began=$SECONDS code=0
scripts/cgroup2-vm.sh "$directory/run" > >(tee "$log") 2>&1 || code=$?
sleep 0.5
passed=$(sed -n 's/^test result: .* \([0-9]*\) passed.*/\1/p' "$log" | tail -n1)
printf 'cgroup2: %s tests passed inside, on %s, in %s s\n' "${passed:-no}" "$(ls "$directory/lib/modules")" "$((SECONDS - began))" >&2
[ "$code" = 0 ] && [ "${passed:-0}" -gt 0 ]
