#!/usr/bin/env bash
# Runs a command with a /run in memory, as on every host with systemd. Where /run is on disk (in a container or a small
# virtual machine), the command gets a mount namespace with a /run of its own. The host's /run does not change. Of its
# content, the command sees only sockets: those of docker and podman, and each one that is named
#
# - in an argument, as by --address or --plugin-config, or in a plan (an argument that is a file NAME.toml);
# - in DOCKER_HOST, CONTAINER_HOST or NOMAD_DRIVER_SHIM_ADDRESS.
#
#   scripts/with-memory-run.sh COMMAND [ARG...]
set -euo pipefail

# Prints the paths below /run that are named. /var/run is a link to /run.
named_paths() {
  {
    printf '%s\n' /run/docker.sock /run/podman/podman.sock
    printf '%s\n' "${DOCKER_HOST:-}" "${CONTAINER_HOST:-}" "${NOMAD_DRIVER_SHIM_ADDRESS:-}" "$@"
    local argument
    for argument; do
      argument=${argument#--plan=}
      if [[ $argument == *.toml && -f $argument ]]; then cat -- "$argument"; fi
    done
  } | grep --only-matching --perl-regexp '(?<![\w.-])(/var)?/run/[\w./@:+-]+' | sed 's,^/var/run/,/run/,' | sort --unique
}

if [ "${1:-}" = --in-namespace ]; then
  shift
  # The new /run is filled beside the old one and then moved over it.
  new=$(mktemp --directory)
  mount --no-mtab -t tmpfs -o mode=0755 tmpfs "$new"
  while read -r path; do
    if [ -S "$path" ]; then
      mkdir --parents "$new$(dirname "${path#/run}")"
      touch "$new${path#/run}"
      mount --no-mtab --bind "$path" "$new${path#/run}"
    fi
  done < <(named_paths "$@")
  # The table of mounts that mount(8) keeps in /run is hidden by now.
  mount --no-mtab --move "$new" /run
  rmdir "$new"
  exec "$@"
fi
if [ "$(stat --file-system --format=%T /run)" = tmpfs ]; then exec "$@"; fi
exec unshare --mount --propagation private "$0" --in-namespace "$@"
