#!/usr/bin/env bash
# Installs and mounts what the build, the demo and the tests need. No other script does that on this machine: the
# Makefile, CI, `make test-fresh` and the Vagrantfile all use this one, so that its list of packages is known to work. It
# prints a line for each change that it makes. It is quick when nothing is missing: it looks for commands first and asks
# the package manager only for the missing ones.
#
#   scripts/setup.sh            everything for `make demo` and `make build`
#   scripts/setup.sh tests      also what `make test` needs: docker's programs, unpacked into target/docker
#   scripts/setup.sh fresh      also what `make test-fresh` needs on the host (debootstrap)
#   scripts/setup.sh cgroup2    also what `make test-cgroup2` needs: an emulator, a kernel, and tools for an initramfs
#   scripts/setup.sh arm64      also what `make build-arm64` needs on another architecture: a cross compiler
#   scripts/setup.sh gvisor     also gVisor's runsc and its shim, built by Go, into target/gvisor; and what `tests` has
#   scripts/setup.sh programs   also Debian's packages of postgres, nginx, Java and others for `make test-compat`, unpacked by debootstrap
#   scripts/setup.sh matrix     also what `make test-matrix` needs: newer containerd, shim and runc, built by Go
set -euo pipefail

# The versions that `make test-matrix` tests in addition to this distribution's own.
matrix_containerd=2.4.2
matrix_runc=1.5.2
# A commit of gVisor's Go branch, of 2026-09-05; that branch has no tagged versions.
gvisor=v0.0.0-20260905035102-160fafc42237

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
changes=0
# Reports a change that this script has made.
did() { say "$*"; changes=$((changes + 1)); }

[ "$(uname -s)" = Linux ] || die "this driver runs on Linux only"
[ "$(id -u)" = 0 ] || die "needs root: containers, mounts and cgroups are made (try: sudo make ...)"

# Maps commands to Debian packages. The script looks for commands, not for packages, so that a containerd or runc that
# was installed in another way is left alone.
declare -A package_of=(
  [cc]=gcc [make]=make [git]=git
  [containerd]=containerd [containerd-shim-runc-v2]=containerd [ctr]=containerd
  [runc]=runc [crun]=crun
  [docker-registry]=docker-registry [umoci]=umoci [skopeo]=skopeo [htpasswd]=apache2-utils
  [ip]=iproute2 [iptables]=iptables [openssl]=openssl [jq]=jq [strace]=strace
)
case "${1:-}" in fresh | programs) package_of[debootstrap]=debootstrap ;; esac
[ "${1:-}" != arm64 ] || package_of[aarch64-linux-gnu-gcc]=gcc-aarch64-linux-gnu
[ "${1:-}" != cgroup2 ] || package_of+=(
  [qemu-system-x86_64]=qemu-system-x86 [cpio]=cpio [modprobe]=kmod [apparmor_parser]=apparmor
)

missing=()
for command in "${!package_of[@]}"; do
  command -v "$command" >/dev/null || missing+=("${package_of[$command]}")
done
# busybox must be static, because the test image contains no libraries.
if ! busybox true 2>/dev/null || ldd "$(command -v busybox)" >/dev/null 2>&1; then missing+=(busybox-static); fi
# Nomad's bridge mode needs the CNI plugins.
[ -e /opt/cni/bin/bridge ] || [ -e /usr/lib/cni/bridge ] || missing+=(containernetworking-plugins)
[ -e /etc/ssl/certs/ca-certificates.crt ] || missing+=(ca-certificates)
# aws-lc-sys compiles C code and needs the C library's headers.
[ -e /usr/include/stdlib.h ] || missing+=(libc6-dev)
[ "${1:-}" != arm64 ] || [ -e /usr/aarch64-linux-gnu/include/stdlib.h ] || missing+=(libc6-dev-arm64-cross)
# Tests compare this driver's seccomp filters with libseccomp's.
[ -e /usr/include/seccomp.h ] || missing+=(libseccomp-dev)

if [ ${#missing[@]} -gt 0 ]; then
  command -v apt-get >/dev/null || die "missing: ${missing[*]} (Debian package names); install them with this system's package manager"
  readarray -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
  say "installing ${missing[*]} ..."
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq || say "the package lists could not all be refreshed; going on with those that could"
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  did "installed ${missing[*]}"
fi

# Rust: uses the installed version if it is new enough, else the distribution's rustup, else reports what is needed.
want=1.88
new_enough() {
  command -v cargo >/dev/null || return 1
  local have; have=$(cargo --version 2>/dev/null | awk '{print $2}') || return 1
  [ "$(printf '%s\n%s\n' "$want" "$have" | sort -V | head -n1)" = "$want" ]
}
if ! new_enough; then
  if ! command -v rustup >/dev/null && command -v apt-get >/dev/null && apt-get install -y -qq rustup >/dev/null 2>&1; then
    did "installed rustup"
  fi
  if command -v rustup >/dev/null; then
    rustup default stable >/dev/null
    did "installed Rust's stable toolchain with rustup, and made it the default"
  fi
  new_enough || die "Rust $want or newer is needed (found: $(cargo --version 2>/dev/null || echo none)); install it with rustup, or from your distribution, and run this again"
fi

if [ "${1:-}" = arm64 ] && command -v rustup >/dev/null &&
  ! rustup target list --installed | grep -q '^aarch64-unknown-linux-gnu$'; then
  rustup -q target add aarch64-unknown-linux-gnu
  did "installed Rust's target aarch64-unknown-linux-gnu with rustup"
fi

# Builds the newer programs of the matrix, and gVisor, from their projects' source at pinned versions. This needs a
# current Go, which no Debian release has; nothing else here needs Go.
target=$(cd "$(dirname "$0")/.." && pwd)/target
build() {
  local directory=$1; shift
  [ ! -e "$directory/.done" ] || return 0
  command -v go >/dev/null || die "building $* needs Go 1.25 or newer; install it from the Go project, and run this again"
  say "building $* ..."
  (cd /; GOBIN=$directory GOTOOLCHAIN=local GOFLAGS=-trimpath go install "$@") || die "go install $* failed; is $(go version) new enough?"
  touch "$directory/.done"
  did "built $* in $directory"
}
if [ "${1:-}" = gvisor ]; then
  # Without cgo: runsc executes itself again inside of a sandbox, where there are no libraries.
  export CGO_ENABLED=0
  build "$target/gvisor/runsc-$gvisor" "gvisor.dev/gvisor/runsc@$gvisor"
  build "$target/gvisor/shim-$gvisor" "gvisor.dev/gvisor/shim@$gvisor"
  mkdir -p "$target/gvisor/bin"
  ln -sf "../runsc-$gvisor/runsc" "$target/gvisor/bin/runsc"
  ln -sf "../shim-$gvisor/shim" "$target/gvisor/bin/containerd-shim-runsc-v1"
fi
if [ "${1:-}" = matrix ]; then
  matrix=$target/matrix
  build "$matrix/containerd-$matrix_containerd" \
    "github.com/containerd/containerd/v2/cmd/containerd@v$matrix_containerd" \
    "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2@v$matrix_containerd"
  build "$matrix/runc-$matrix_runc" "github.com/opencontainers/runc@v$matrix_runc"
fi

# tests/compat compares with docker. Its packages are unpacked, not installed: they would start dockerd on this machine.
# In some releases, docker's command line is in a package of its own.
if case "${1:-}" in tests | programs | gvisor) true ;; *) false ;; esac &&
  ! { command -v dockerd && command -v docker; } >/dev/null && [ ! -e "$target/docker/.done" ]; then
  mkdir -p "$target/docker"
  (
    cd "$target/docker"
    for package in docker.io docker-cli tini libdevmapper1.02.1; do
      apt-cache show "$package" >/dev/null 2>&1 || continue
      apt-get download -qq "$package" 2>/dev/null || { apt-get update -qq && apt-get download -qq "$package"; }
    done >&2
    for package in ./*.deb; do dpkg-deb -x "$package" .; done
    rm -f ./*.deb
    [ -x usr/sbin/dockerd ] || [ -x usr/bin/dockerd ]
    [ -x usr/bin/docker ]
  ) || die "docker's packages could not be downloaded or unpacked"
  touch "$target/docker/.done"
  did "unpacked docker's packages in $target/docker"
fi

# The layer of real programs that tests/compat runs in containers. Nothing of it is installed on this machine.
if [ "${1:-}" = programs ] && [ ! -e "$target/programs/layer.tar.gz" ]; then
  packages=postgresql,redis-server,nginx-light,default-jre-headless,nodejs,python3,openssh-server,openssh-client,sudo
  packages+=,systemd,systemd-sysv,docker.io,procps,iproute2
  root=$target/programs/root
  . /etc/os-release
  components=main
  [ "$ID" != ubuntu ] || components=main,universe
  say "unpacking real programs of $VERSION_CODENAME in $root ..."
  rm -rf --one-file-system "$root"
  mkdir -p "$root"
  debootstrap --variant=minbase --components="$components" --include="$packages" "$VERSION_CODENAME" "$root" \
    > "$target/programs/log" 2>&1 || { tail -n 20 "$target/programs/log" >&2; die "debootstrap failed"; }
  rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale,info}/* "$root"/dev/*
  tar -C "$root" --numeric-owner --xattrs --xattrs-include='*' -czf "$target/programs/layer.tar.gz.part" .
  mv "$target/programs/layer.tar.gz.part" "$target/programs/layer.tar.gz"
  rm -rf --one-file-system "$root"
  did "unpacked real programs in $target/programs"
fi

# The virtual machine of `make test-cgroup2` boots this distribution's own kernel. The package is unpacked, not installed.
if [ "${1:-}" = cgroup2 ] && [ ! -e "$target/cgroup2/boot" ]; then
  mkdir -p "$target/cgroup2"
  (
    cd "$target/cgroup2" &&
      package=$(apt-cache depends linux-image-amd64 | awk '/Depends:/ {print $2; exit}') &&
      apt-get download -qq "$package" 2>/dev/null &&
      dpkg-deb -x "$package"_*.deb . && rm -f ./*.deb
  ) || die "the kernel of linux-image-amd64 could not be downloaded or unpacked"
  did "unpacked the kernel $(ls "$target/cgroup2/lib/modules") in $target/cgroup2"
fi

# crun refuses a hybrid host (cgroup v1 with a cgroup2 file system mounted as well) while any controller is not mounted
# as v1. Mounting the missing controllers changes no existing hierarchy. This is skipped on a cgroup v2 host, which is
# what users have.
if [ -d /sys/fs/cgroup/memory ] && [ ! -e /sys/fs/cgroup/cgroup.controllers ]; then
  for controller in hugetlb perf_event net_cls net_prio; do
    grep -q "^$controller[[:space:]].*1$" /proc/cgroups || continue
    mountpoint -q "/sys/fs/cgroup/$controller" && continue
    grep -qE " - cgroup .*\b$controller\b" /proc/self/mountinfo && continue
    mkdir -p "/sys/fs/cgroup/$controller"
    if mount -t cgroup -o "$controller" cgroup "/sys/fs/cgroup/$controller" 2>/dev/null; then
      did "mounted the cgroup v1 controller $controller at /sys/fs/cgroup/$controller"
    else
      rmdir "/sys/fs/cgroup/$controller" 2>/dev/null || true
      say "note: cgroup v1 controller $controller could not be mounted; crun may refuse this host"
    fi
  done
fi
[ "$changes" != 0 ] || say "nothing to do"
