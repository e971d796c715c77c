#!/usr/bin/env bash
# Runs a program as root in a virtual machine that has cgroup version 2 with all its controllers, and a security module:
# SELinux without a policy, or AppArmor. The machine runs this distribution's own kernel without KVM, and its root file
# system is this machine's, read-only. Whatever the program writes goes to memory and is lost afterwards.
#
#   scripts/cgroup2-vm.sh PROGRAM [MEMORY [MODULE]]
#
# PROGRAM is an absolute path. MEMORY is the virtual machine's memory, 6G by default. MODULE is selinux (the default) or
# apparmor.
# Prints what the program prints, and exits with its status.
set -euo pipefail
program=$(readlink -f "$1") memory=${2:-6G} module=${3:-selinux}
case $module in
  selinux) parameters="security=selinux selinux=1 enforcing=0" ;;
  apparmor) parameters="security=apparmor apparmor=1" ;;
  *) echo "cgroup2: the security module $module is not selinux or apparmor" >&2; exit 2 ;;
esac
script=$(readlink -f "$0")
cache=$(cd "$(dirname "$0")/.." && pwd)/target/cgroup2
mkdir -p "$cache" && cd "$cache"

[ -e boot ] || { echo "cgroup2: there is no kernel in $cache; run scripts/setup.sh cgroup2" >&2; exit 1; }
release=$(ls lib/modules)

# The initramfs contains what is needed to mount this machine's files read-only below a file system in memory, and the
# kernel modules that tests use.
if [ ! initramfs.gz -nt "$script" ]; then
  rm -rf initramfs && mkdir -p initramfs/{bin,modules}
  cp "$(command -v busybox)" initramfs/bin/
  depmod -b . "$release"
  for module in virtio_pci 9pnet_virtio 9p overlay veth bridge loop fuse vsock; do
    modprobe -d . -S "$release" --show-depends "$module" 2>/dev/null | awk '/^insmod/ {print $2}'
  done | awk '!seen[$0]++' | while read -r file; do
    cp "$file" initramfs/modules/
    basename "$file" >> initramfs/modules/order
  done
  cat > initramfs/init <<'INIT'
#!/bin/busybox sh
set -e
/bin/busybox --install /bin
export PATH=/bin
mkdir -p /proc /sys /dev /host /memory /root
mount -t proc proc /proc; mount -t devtmpfs dev /dev
while read -r module; do insmod "/modules/$module" || echo "cgroup2: no module $module"; done < /modules/order
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=loose,ro host /host
mount -t tmpfs -o size=80% memory /memory; mkdir /memory/upper /memory/work
mount -t overlay -o lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work root /root
program=$(tr ' ' '\n' < /proc/cmdline | sed -n 's/^program=//p')
mount --move /dev /root/dev; umount /proc
exec switch_root /root /bin/sh -c '
  mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t cgroup2 cgroup /sys/fs/cgroup
  mount -t securityfs securityfs /sys/kernel/security
  ! grep -q selinuxfs /proc/filesystems || mount -t selinuxfs selinux /sys/fs/selinux
  for place in /run /tmp /var/tmp; do mount -t tmpfs tmpfs $place; done
  mkdir -p /dev/pts /dev/shm /dev/mqueue
  mount -t devpts devpts /dev/pts; mount -t tmpfs shm /dev/shm; mount -t mqueue mqueue /dev/mqueue
  ip link set lo up
  export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
  "$0"; echo "cgroup2-exit-status $?"
  sync; echo o > /proc/sysrq-trigger; while :; do :; done' "$program"
INIT
  chmod +x initramfs/init
  (cd initramfs && find . | cpio --quiet -o -H newc | gzip -1) > initramfs.tmp
  mv initramfs.tmp initramfs.gz && rm -rf initramfs
fi

status=$(mktemp)
trap 'rm -f "$status"' EXIT
qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp 2 -m "$memory" -nographic -no-reboot -net none \
  -kernel "boot/vmlinuz-$release" -initrd initramfs.gz \
  -append "console=ttyS0 quiet panic=-1 mitigations=off $parameters program=$program" \
  -virtfs local,path=/,mount_tag=host,security_model=none,multidevs=remap,readonly=on < /dev/null 2>&1 |
  stdbuf -oL tr -d "\r" | tee >(sed -n 's/.*cgroup2-exit-status \([0-9]*\).*/\1/p' > "$status") | grep -av --line-buffered cgroup2-exit-status || true
sleep 0.3
code=$(cat "$status")
exit "${code:-125}"
