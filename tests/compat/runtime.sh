#!/bin/sh
# runc for privileged containers of docker 20.10, which asks for all capabilities that the kernel knows. A machine may
# lack some of them, and docker 23.0 and later ask only for those of their own bounding set (moby/moby#42933).
set -eu
file= key= previous=
for argument; do
  case $previous in
    --bundle) file=$argument/config.json key=process ;;
    --process) file=$argument key= ;;
  esac
  previous=$argument
done
if [ -n "$file" ]; then
  bounding=$(sed -n 's/^CapBnd:[[:space:]]*//p' /proc/self/status)
  # capsh(1) may be missing: jq reads the hexadecimal number. The names are in the kernel's order.
  jq --arg bounding "$bounding" --arg key "$key" '
    def bits: [explode[] | if . > 96 then . - 87 else . - 48 end | [8, 4, 2, 1][] as $bit | ((. / $bit | floor) % 2)] | reverse;
    ($bounding | bits) as $has |
    ("CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
      | split(" ") | to_entries | map(select($has[.key] == 1) | "CAP_" + .value)) as $all |
    (if $key == "" then ["capabilities"] else [$key, "capabilities"] end) as $path |
    setpath($path; getpath($path) | with_entries(if (.value // [] | length) > 0 then .value = $all else . end))' \
    "$file" > "$file.new"
  mv "$file.new" "$file"
fi
exec runc "$@"
