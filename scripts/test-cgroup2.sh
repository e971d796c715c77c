#!/usr/bin/env bash
# The behaviour tests that meet cgroups, and the conformance rows, on version 2, which is what users have, in a virtual
# machine.
#
#   scripts/test-cgroup2.sh [FILTER...]     only these behaviour tests, by name
set -euo pipefail
cd "$(dirname "$0")/.."
# Resources, OOM, statistics, exec, stop, recovery, leaks, and what else a task is.
core=(lifecycle:: release:: ahead:: limits:: options:: stats:: exec:: stop:: recovery:: leaks:: cgroup2::)
suites=(behaviour conformance)
[ $# = 0 ] || { core=("$@") suites=(behaviour); }
directory=$PWD/target/cgroup2
mkdir -p "$directory"
built=$(cargo test --locked --no-run --test behaviour --test conformance --message-format=json 2>/dev/null |
  jq -r 'select(.profile.test == true and .target.kind == ["test"]) | "\(.target.name) \(.executable)"')
program() { sed -n "s/^$1 //p" <<< "$built" | tail -n1; }
for suite in "${suites[@]}"; do
  [ -x "$(program "$suite")" ] || { echo "cgroup2: the tests of $suite were not built" >&2; exit 1; }
done
# Emulation is some twenty times slower: a few at a time, and patience. What one suite finds must not hide the other's.
{
  cat << RUN
#!/bin/sh
export NOMAD_DRIVER_SHIM_TEST_PATIENCE=600
mkdir -p /var/tmp/bin
cd $PWD
code=0
cp $(program behaviour) /var/tmp/bin/behaviour
/var/tmp/bin/behaviour --color never --test-threads 2 ${core[*]} || code=1
RUN
  if [ "${#suites[@]}" = 2 ]; then
    cat << RUN
cp $(program conformance) /var/tmp/bin/conformance
/var/tmp/bin/conformance --color never --test-threads 3 --skip "a driver that" || code=1
RUN
  fi
  echo 'exit $code'
} > "$directory/run"
chmod +x "$directory/run"
log=$directory/log
began=$SECONDS code=0
scripts/cgroup2-vm.sh "$directory/run" > >(tee "$log") 2>&1 || code=$?
sleep 0.5
passed=$(sed -n 's/^test result: .* \([0-9]*\) passed.*/\1/p' "$log" | awk '{ sum += $1 } END { print sum + 0 }')
results=$(grep -c '^test result: ' "$log" || true)
printf 'cgroup2: %s tests passed inside, on %s, in %s s\n' "$passed" "$(ls "$directory/lib/modules")" "$((SECONDS - began))" >&2
[ "$code" = 0 ] && [ "$results" = "${#suites[@]}" ] && [ "$passed" -gt 0 ]
