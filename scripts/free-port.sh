#!/usr/bin/env bash
# Prints a TCP port on loopback on which no process listens.
set -euo pipefail
for _ in $(seq 100); do
  port=$((20000 + RANDOM % 20000))
  (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || { echo "$port"; exit 0; }
done
exit 1
