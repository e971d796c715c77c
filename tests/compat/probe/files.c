/* Files: mounts, devices, the root directory, the network's files, and what is hidden or read-only. */
static void mode_of(const char *kind, const char *path) {
    struct stat found;
    const char *key = key_of(kind, path);
    if (lstat(path, &found)) {
        say(key, "%s", error_name(errno));
        return;
    }
    char link[PATH_MAX] = "";
    if (S_ISLNK(found.st_mode)) {
        if (readlink(path, link, sizeof link - 1) < 0) return;
        say(key, "link %s", link);
    } else if (S_ISCHR(found.st_mode) || S_ISBLK(found.st_mode)) {
        say(key, "%c %d:%d %o %d:%d", S_ISCHR(found.st_mode) ? 'c' : 'b', major(found.st_rdev), minor(found.st_rdev),
            found.st_mode & 07777, found.st_uid, found.st_gid);
    } else {
        say(key, "%s %o %d:%d", S_ISDIR(found.st_mode) ? "directory" : S_ISREG(found.st_mode) ? "file" : "other",
            found.st_mode & 07777, found.st_uid, found.st_gid);
    }
}

/* Prints the modes of all entries below a directory. */
static void tree(const char *kind, const char *path, int depth) {
    DIR *directory = opendir(path);
    if (!directory) {
        say(key_of(kind, path), "%s", error_name(errno));
        return;
    }
    for (struct dirent *entry; (entry = readdir(directory));) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
        char child[PATH_MAX];
        snprintf(child, sizeof child, "%s/%s", strcmp(path, "/") ? path : "", entry->d_name);
        mode_of(kind, child);
        if (depth > 1 && entry->d_type == DT_DIR) tree(kind, child, depth - 1);
    }
    closedir(directory);
}

/* Prints the mounts: file system, attributes, propagation and, for file systems in memory, their own options. */
static void mounts(void) {
    FILE *file = fopen("/proc/self/mountinfo", "re");
    char *line = NULL;
    size_t size = 0;
    while (file && getline(&line, &size, file) > 0) {
        char root[PATH_MAX], target[PATH_MAX], attributes[1024], propagation[256] = "", type[64], super[4096] = "";
        int after = 0;
        if (sscanf(line, "%*s %*s %*s %4095s %4095s %1023s %n", root, target, attributes, &after) < 3) continue;
        char *rest = strstr(line + after - 1, " - ");
        if (!rest) continue;
        for (char *field = line + after; field < rest; field += strcspn(field, " ") + 1) {
            size_t kind = strcspn(field, ": ");
            snprintf(propagation + strlen(propagation), sizeof propagation - strlen(propagation), " %.*s", (int)kind, field);
        }
        sscanf(rest + 3, "%63s %*s %4095s", type, super);
        char key[PATH_MAX + 32];
        say(key_of("mount", target), "%s", type);
        snprintf(key, sizeof key, "%s attributes", target);
        say(key_of("mount", key), "%s", attributes);
        snprintf(key, sizeof key, "%s propagation", target);
        say(key_of("mount", key), "%s", *propagation ? propagation + 1 : "private");
        /* The options of a disk's file system, and its directories, are the host's. */
        int virtual = !strcmp(type, "proc") || !strcmp(type, "sysfs") || !strncmp(type, "cgroup", 6) || !strcmp(type, "devpts");
        if (virtual || !strcmp(type, "tmpfs")) {
            snprintf(key, sizeof key, "%s options", target);
            say(key_of("mount", key), "%s", super);
        }
        if (virtual) {
            snprintf(key, sizeof key, "%s root", target);
            say(key_of("mount", key), "%s", root);
        }
    }
    if (file) fclose(file);
    free(line);
}

/* Tells how a path may be opened. Nothing is read or written. */
static void access_of(const char *path) {
    struct stat found;
    char text[128] = "";
    if (lstat(path, &found)) {
        say(key_of("access", path), "%s", error_name(errno));
        return;
    }
    if (S_ISDIR(found.st_mode)) {
        int entries = 0;
        DIR *directory = opendir(path);
        while (directory && readdir(directory)) entries++;
        if (directory) closedir(directory);
        char child[PATH_MAX];
        snprintf(child, sizeof child, "%s/.probe", path);
        int made = mkdir(child, 0700) ? errno : 0;
        if (!made) rmdir(child);
        say(key_of("access", path), "directory %s, new entry %s", entries > 2 ? "with entries" : "empty", error_name(made));
        return;
    }
    int file = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    int reads = file < 0 ? errno : 0;
    if (file >= 0) close(file);
    file = open(path, O_WRONLY | O_NONBLOCK | O_APPEND | O_CLOEXEC);
    int writes = file < 0 ? errno : 0;
    if (file >= 0) close(file);
    snprintf(text, sizeof text, "read %s, write %s", error_name(reads), error_name(writes));
    say(key_of("access", path), "%s%s", S_ISCHR(found.st_mode) ? "device, " : "", text);
}

static void paths(void) {
    static const char *wanted[] = {"/", "/bin", "/tmp", "/root", "/run", "/dev", "/dev/shm", "/dev/mqueue", "/dev/pts", "/proc",
        "/sys", "/sys/fs/cgroup", "/sys/kernel", "/sys/module", "/sys/class/net", "/sys/kernel/security",
        "/sys/kernel/debug", "/sys/fs/selinux", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/passwd",
        "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
        "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/sys/devices/virtual/powercap",
        "/proc/scsi", "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger", "/proc/kallsyms",
        "/proc/kmsg", "/proc/mem", "/proc/modules", "/proc/config.gz", "/proc/kpagecount", "/proc/slabinfo",
        "/proc/vmallocinfo", "/proc/pagetypeinfo", "/proc/cpuinfo", "/proc/meminfo", "/proc/self/oom_score_adj",
        "/proc/sys/kernel/hostname", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/shmmax", "/proc/sys/vm/swappiness",
        "/proc/sys/net/core/somaxconn", "/proc/sys/net/ipv4/ip_forward", "/proc/sys/fs/mqueue/msg_max",
        "/proc/sys/kernel/ns_last_pid", "/proc/sys/fs/binfmt_misc", "/sys/kernel/vmcoreinfo", "/sys/devices/system/cpu",
        "/sys/devices/system/cpu/cpu0/thermal_throttle", "/sys/block", "/sys/bus", "/dev/null", "/dev/full", "/dev/console",
        "/dev/ptmx", "/dev/fuse", "/dev/net/tun", "/dev/kmsg", "/dev/mem", "/dev/loop-control"};
    for (size_t at = 0; at < sizeof wanted / sizeof *wanted; at++) access_of(wanted[at]);
    static const char *with_mode[] = {"/", "/dev", "/proc", "/sys", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf",
        "/etc/mtab", "/dev/shm", "/dev/mqueue"};
    for (size_t at = 0; at < sizeof with_mode / sizeof *with_mode; at++) mode_of("mode", with_mode[at]);
    static const char *with_text[] = {"/etc/hostname", "/etc/hosts", "/etc/resolv.conf"};
    for (size_t at = 0; at < sizeof with_text / sizeof *with_text; at++) say_file(key_of("text", with_text[at]), with_text[at]);
}

/* Tries to make device nodes and to open them. */
static void nodes(void) {
    static const struct { const char *name; mode_t kind; int major, minor; } wanted[] = {
        {"null", S_IFCHR, 1, 3}, {"mem", S_IFCHR, 1, 1}, {"kmsg", S_IFCHR, 1, 11}, {"tun", S_IFCHR, 10, 200},
        {"fuse", S_IFCHR, 10, 229}, {"loop0", S_IFBLK, 7, 0}, {"disk", S_IFBLK, 254, 0}, {"console", S_IFCHR, 5, 1},
        {"tty0", S_IFCHR, 4, 0}, {"random", S_IFCHR, 1, 8}};
    for (size_t at = 0; at < sizeof wanted / sizeof *wanted; at++) {
        char path[64];
        snprintf(path, sizeof path, "/tmp/node-%s", wanted[at].name);
        int made = mknod(path, wanted[at].kind | 0600, makedev(wanted[at].major, wanted[at].minor)) ? errno : 0;
        int file = made ? -1 : open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
        int opened = made ? 0 : file < 0 ? errno : 0;
        if (file >= 0) close(file);
        unlink(path);
        say(key_of("node", wanted[at].name), "made %s, opened %s", error_name(made), made ? "-" : error_name(opened));
    }
}
