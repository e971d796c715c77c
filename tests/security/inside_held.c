// Calls that a confined task may not make, each with arguments that change nothing where the call is permitted. Prints
// one line for each call: its name, and "done" or the error. Compiled by inside_held.rs.
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define TRY(name, call) do { errno = 0; printf("%s %s\n", name, (call) >= 0 ? "done" : strerrorname_np(errno)); } while (0)
#define CALL(name, ...) TRY(#name, syscall(SYS_##name, __VA_ARGS__))

// Makes a device node and opens it.
static int node(const char *path, mode_t kind, unsigned major, unsigned minor) {
    unlink(path);
    if (mknod(path, kind | 0666, makedev(major, minor)) < 0) return -1;
    return open(path, O_RDONLY | O_NONBLOCK);
}

int main(void) {
    TRY("packet socket", socket(17, SOCK_RAW, 0));
    TRY("raw socket", socket(AF_INET, SOCK_RAW, 1));
    TRY("node of the log", node("/tmp/kmsg", S_IFCHR, 1, 11));
    TRY("node of a disk", node("/tmp/loop", S_IFBLK, 7, 0));
    TRY("mount", mount("none", "/tmp", "tmpfs", 0, ""));
    TRY("remount", mount("none", "/", NULL, MS_REMOUNT | MS_BIND, NULL));
    TRY("umount", umount2("/tmp", MNT_DETACH));
    TRY("unshare user", unshare(CLONE_NEWUSER));
    TRY("unshare mounts", unshare(CLONE_NEWNS));
    TRY("sethostname", sethostname("task", 4));
    CALL(pivot_root, "/", "/none");
    CALL(setns, open("/proc/self/ns/net", O_RDONLY), CLONE_NEWNET);
    CALL(fsopen, "tmpfs", 0);
    CALL(open_tree, AT_FDCWD, "/", 1);
    CALL(move_mount, -1, "", -1, "", 0);
    CALL(mount_setattr, -1, "", 0, NULL, 0);
    CALL(open_by_handle_at, AT_FDCWD, NULL, 0);
    CALL(bpf, 0, NULL, 0);
    CALL(perf_event_open, NULL, 0, -1, -1, 0);
    CALL(userfaultfd, 0);
    CALL(io_uring_setup, 1, NULL);
    CALL(add_key, "user", "x", "x", 1, -2);
    CALL(keyctl, 0, -2, 0);
    CALL(request_key, "user", "x", NULL, 0);
    CALL(init_module, NULL, 0, "");
    CALL(finit_module, -1, "", 0);
    CALL(delete_module, "none", 0);
    CALL(kexec_load, 0, 0, NULL, 1UL << 40);
    CALL(reboot, 0, 0, 0, NULL);
    CALL(swapon, NULL, 0);
    CALL(swapoff, NULL);
    CALL(acct, "/none");
    CALL(quotactl, 0, NULL, 0, NULL);
    CALL(settimeofday, NULL, NULL + 1);
    CALL(clock_settime, 0, NULL);
    CALL(fanotify_init, 0, 0);
    CALL(syslog, 3, NULL, 0);
    CALL(vhangup, 0);
    CALL(lookup_dcookie, 0UL, NULL, 0);
#ifdef SYS_iopl
    CALL(iopl, 3);
    CALL(ioperm, 0, 1, 1);
#endif
    return 0;
}
