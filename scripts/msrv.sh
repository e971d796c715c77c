#!/usr/bin/env bash
# Checks that the oldest Rust that Cargo.toml promises (`rust-version`) still compiles everything, where rustup has that
# toolchain. Where it does not, this says so and succeeds.
set -euo pipefail
cd "$(dirname "$0")/.."
version=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml)
if ! command -v rustup > /dev/null || ! rustup toolchain list | grep -q "^$version"; then
  echo "msrv: Rust $version is not installed (rustup toolchain install $version); NOT CHECKED" >&2
  exit 0
fi
# A directory of its own: the two compilers would rebuild everything for each other.
CARGO_TARGET_DIR=target/msrv rustup run "$version" cargo check --locked --all-targets
echo "msrv: Rust $version compiles everything" >&2
