#!/bin/sh
# Runs dockerd in the network and mount namespaces that this script was started in, and plays its host. SIGTERM ends
# dockerd, and then the script removes everything that dockerd has left.
#
#   unshare --net --mount --propagation private dockerd.sh DIRECTORY CGROUP
#
# DIRECTORY gets dockerd's socket, images and containers. CGROUP is the parent of the containers' cgroups, a name that
# nothing else has. PATH finds dockerd and what it starts.
set -eu
directory=$1 cgroup=$2

# The sockets of another docker or containerd, which dockerd would use, are hidden.
mount -n -t tmpfs -o mode=755 tmpfs /run
# dockerd writes a key to /etc/docker.
mkdir -p "$directory/etc" "$directory/etc-work" "$directory/shared"
mount -n -t overlay -o "lowerdir=/etc,upperdir=$directory/etc,workdir=$directory/etc-work" overlay /etc
# On cgroup version 2, dockerd sets a limit on swap only if its own cgroup has one. The root cgroup has none.
if [ -e /sys/fs/cgroup/cgroup.procs ]; then
  echo +memory > /sys/fs/cgroup/cgroup.subtree_control
  mkdir -p "/sys/fs/cgroup/$cgroup-daemon"
  echo $$ > "/sys/fs/cgroup/$cgroup-daemon/cgroup.procs"
fi
# A mount that containers can share with this host.
mount -n -t tmpfs tmpfs "$directory/shared"
mount -n --make-shared "$directory/shared"
ip link set lo up
printf '{"runtimes": {"bounded": {"path": "%s"}, "runsc": {"path": "runsc"}}}' \
  "$(dirname "$(readlink -f "$0")")/runtime.sh" > "$directory/daemon.json"

setpriv --pdeathsig TERM dockerd --config-file "$directory/daemon.json" --host "unix://$directory/docker.sock" \
  --data-root "$directory/data" --exec-root /run/docker --pidfile /run/docker.pid --cgroup-parent "/$cgroup" \
  --storage-driver overlay2 --iptables=false --ip6tables=false --ip-masq=false --userland-proxy=false \
  --shutdown-timeout 1 > "$directory/log" 2>&1 &
daemon=$!
trap 'kill -TERM "$daemon" 2> /dev/null || true' TERM INT HUP
# A signal interrupts the first wait.
wait "$daemon" || true
wait "$daemon" || true

if [ -e /sys/fs/cgroup/cgroup.procs ]; then echo $$ > /sys/fs/cgroup/cgroup.procs; fi
find /sys/fs/cgroup -depth -type d -path "*/$cgroup*" -exec rmdir {} + 2> /dev/null || true
umount -n "$directory/shared" || true
rm -rf --one-file-system "$directory"
