/* The kernel: cgroups, kernel parameters, network interfaces and system calls. */
static void cgroup_files(const char *directory, const char *controller) {
    static const char *wanted[] = {"memory.limit_in_bytes", "memory.soft_limit_in_bytes", "memory.memsw.limit_in_bytes",
        "memory.swappiness", "memory.oom_control", "memory.use_hierarchy", "memory.kmem.limit_in_bytes", "memory.max", "memory.high",
        "memory.low", "memory.min", "memory.swap.max", "memory.oom.group", "cpu.shares", "cpu.cfs_quota_us", "cpu.cfs_period_us", "cpu.weight",
        "cpu.max", "cpu.idle", "cpu.rt_runtime_us", "cpuset.cpus", "cpuset.mems", "cpuset.cpus.effective", "cpuset.cpu_exclusive", "pids.max",
        "blkio.weight", "blkio.bfq.weight", "io.weight", "io.max", "freezer.state", "cgroup.freeze",
        "cgroup.controllers", "cgroup.subtree_control", "cgroup.type", "cgroup.max.depth", "notify_on_release",
        "net_cls.classid", "hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max"};
    for (size_t at = 0; at < sizeof wanted / sizeof *wanted; at++) {
        char path[PATH_MAX], name[PATH_MAX];
        snprintf(path, sizeof path, "%s/%s", directory, wanted[at]);
        if (access(path, F_OK)) continue;
        snprintf(name, sizeof name, "%s/%s", controller, wanted[at]);
        say_file(key_of("cgroup", name), path);
    }
    char path[PATH_MAX], name[PATH_MAX], text[4096];
    /* The order of the rules means nothing. */
    snprintf(path, sizeof path, "%s/devices.list", directory);
    if (slurp(path, text, sizeof text) > 0)
        for (char *rule = strtok(text, "\n"); rule; rule = strtok(NULL, "\n")) say(key_of("device rule", rule), "allowed");
    snprintf(path, sizeof path, "%s/cgroup.procs", directory);
    if (access(path, F_OK)) return;
    int file = open(path, O_WRONLY | O_CLOEXEC);
    snprintf(name, sizeof name, "%s writable", controller);
    say(key_of("cgroup", name), "%s", error_name(file < 0 ? errno : 0));
    if (file >= 0) close(file);
    snprintf(name, sizeof name, "%s contains this process", controller);
    ssize_t length = slurp(path, text, sizeof text);
    char pid[32];
    snprintf(pid, sizeof pid, "%d", getpid());
    int found = 0;
    for (char *line = strtok(length < 0 ? NULL : text, "\n"); line; line = strtok(NULL, "\n")) found |= !strcmp(line, pid);
    say(key_of("cgroup", name), "%s", length < 0 ? error_name(errno) : found ? "yes" : "no");
}

static void cgroups(void) {
    tree("cgroup entry", "/sys/fs/cgroup", 1);
    cgroup_files("/sys/fs/cgroup", "");
    DIR *directory = opendir("/sys/fs/cgroup");
    for (struct dirent *entry; directory && (entry = readdir(directory));) {
        char path[PATH_MAX];
        if (entry->d_name[0] == '.' || entry->d_type != DT_DIR) continue;
        snprintf(path, sizeof path, "/sys/fs/cgroup/%s", entry->d_name);
        cgroup_files(path, entry->d_name);
    }
    if (directory) closedir(directory);
    FILE *file = fopen("/proc/self/cgroup", "re");
    char *line = NULL;
    size_t size = 0;
    while (file && getline(&line, &size, file) > 0) {
        char controllers[256] = "", path[PATH_MAX] = "";
        sscanf(line, "%*[0-9]:%255[^:]:%4095[^\n]", controllers, path);
        if (!*controllers) sscanf(line, "%*[0-9]::%4095[^\n]", path);
        say(key_of("cgroup path", controllers), "%s", path);
    }
    if (file) fclose(file);
    free(line);
}

/* Prints all kernel parameters below a directory. */
static void parameters(const char *path) {
    DIR *directory = opendir(path);
    for (struct dirent *entry; directory && (entry = readdir(directory));) {
        char child[PATH_MAX];
        if (entry->d_name[0] == '.') continue;
        snprintf(child, sizeof child, "%s/%s", path, entry->d_name);
        if (entry->d_type == DT_DIR) parameters(child);
        else say_file(key_of("sysctl", child + strlen("/proc/sys/")), child);
    }
    if (directory) closedir(directory);
}

static void kernel_parameters(void) {
    parameters("/proc/sys/net");
    parameters("/proc/sys/fs/mqueue");
    static const char *wanted[] = {"auto_msgmni", "msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni",
        "shm_rmid_forced", "hostname", "domainname", "pid_max", "cap_last_cap", "unprivileged_userns_clone"};
    for (size_t at = 0; at < sizeof wanted / sizeof *wanted; at++) {
        char path[PATH_MAX];
        snprintf(path, sizeof path, "/proc/sys/kernel/%s", wanted[at]);
        if (!access(path, F_OK)) say_file(key_of("sysctl kernel", wanted[at]), path);
    }
}

static void network(void) {
    struct ifaddrs *all = NULL;
    getifaddrs(&all);
    for (struct ifaddrs *one = all; one; one = one->ifa_next) {
        char key[128], address[256] = "";
        int family = one->ifa_addr ? one->ifa_addr->sa_family : 0;
        if (family == AF_INET || family == AF_INET6) {
            const void *number = family == AF_INET ? (void *)&((struct sockaddr_in *)one->ifa_addr)->sin_addr
                : (void *)&((struct sockaddr_in6 *)one->ifa_addr)->sin6_addr;
            /* A link-local address comes some time after the interface. */
            if (family == AF_INET6 && IN6_IS_ADDR_LINKLOCAL((const struct in6_addr *)number)) continue;
            inet_ntop(family, number, address, sizeof address);
            snprintf(key, sizeof key, "%s inet%s", one->ifa_name, family == AF_INET ? "" : "6");
            say(key_of("interface", key), "%s", address);
        } else {
            say(key_of("interface", one->ifa_name), "%s%s", one->ifa_flags & IFF_UP ? "up" : "down",
                one->ifa_flags & IFF_LOOPBACK ? " loopback" : "");
        }
    }
    static const struct { const char *name; int family, type, protocol; } sockets[] = {
        {"inet stream", AF_INET, SOCK_STREAM, 0}, {"inet dgram", AF_INET, SOCK_DGRAM, 0}, {"inet raw", AF_INET, SOCK_RAW, 1},
        {"inet ping", AF_INET, SOCK_DGRAM, 1}, {"inet6 stream", AF_INET6, SOCK_STREAM, 0}, {"unix stream", AF_UNIX, SOCK_STREAM, 0},
        {"netlink route", AF_NETLINK, SOCK_RAW, 0}, {"netlink audit", AF_NETLINK, SOCK_RAW, 9}, {"packet", AF_PACKET, SOCK_RAW, 0},
        {"vsock", 40, SOCK_STREAM, 0}, {"alg", 38, SOCK_SEQPACKET, 0}, {"bluetooth", 31, SOCK_RAW, 1}, {"can", 29, SOCK_RAW, 1},
        {"xdp", 44, SOCK_RAW, 0}};
    for (size_t at = 0; at < sizeof sockets / sizeof *sockets; at++) {
        int opened = socket(sockets[at].family, sockets[at].type | SOCK_CLOEXEC, sockets[at].protocol);
        say(key_of("socket", sockets[at].name), "%s", error_name(opened < 0 ? errno : 0));
        if (opened >= 0) close(opened);
    }
}

/* Calls a system call in a child, and prints the error or the signal. Arguments are such that the call does nothing. */
static void call(const char *name, long number, long a, long b, long c, long d, long e, long f) {
    fflush(stdout);
    pid_t child = fork();
    if (!child) {
        alarm(5);
        long result = syscall(number, a, b, c, d, e, f);
        _exit(result < 0 ? errno : 0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    if (WIFSIGNALED(status)) say(key_of("syscall", name), "killed by %s", sigabbrev_np(WTERMSIG(status)));
    else say(key_of("syscall", name), "%s", error_name(WEXITSTATUS(status)));
}

static void system_calls(void) {
    static const struct { const char *name; long number; } wanted[] = {
        {"acct", 163}, {"add_key", 248}, {"bpf", 321}, {"clock_adjtime", 305}, {"clock_settime", 227}, {"create_module", 174},
        {"delete_module", 176}, {"finit_module", 313}, {"init_module", 175}, {"get_kernel_syms", 177}, {"get_mempolicy", 239},
        {"set_mempolicy", 238}, {"mbind", 237}, {"migrate_pages", 256}, {"move_pages", 279}, {"ioperm", 173}, {"kcmp", 312},
        {"kexec_file_load", 320}, {"kexec_load", 246}, {"keyctl", 250}, {"lookup_dcookie", 212}, {"mount", 165}, {"umount2", 166},
        {"move_mount", 429}, {"fsopen", 430}, {"fsconfig", 431}, {"fsmount", 432}, {"fspick", 433}, {"open_tree", 428},
        {"mount_setattr", 442}, {"name_to_handle_at", 303}, {"open_by_handle_at", 304}, {"nfsservctl", 180},
        {"perf_event_open", 298}, {"pivot_root", 155}, {"process_vm_readv", 310}, {"process_vm_writev", 311}, {"ptrace", 101},
        {"query_module", 178}, {"quotactl", 179}, {"quotactl_fd", 443}, {"reboot", 169}, {"request_key", 249}, {"setns", 308},
        {"settimeofday", 164}, {"swapon", 167}, {"swapoff", 168}, {"sysfs", 139}, {"_sysctl", 156}, {"uselib", 134},
        {"userfaultfd", 323}, {"ustat", 136}, {"io_uring_setup", 425}, {"io_uring_enter", 426}, {"io_uring_register", 427},
        {"clone3", 435}, {"pidfd_open", 434}, {"pidfd_getfd", 438}, {"pidfd_send_signal", 424}, {"close_range", 436}, {"openat2", 437},
        {"faccessat2", 439}, {"epoll_pwait2", 441}, {"landlock_create_ruleset", 444}, {"landlock_add_rule", 445},
        {"landlock_restrict_self", 446}, {"memfd_secret", 447}, {"process_madvise", 440}, {"process_mrelease", 448},
        {"futex_waitv", 449}, {"set_mempolicy_home_node", 450}, {"cachestat", 451}, {"fchmodat2", 452}, {"map_shadow_stack", 453},
        {"futex_wake", 454}, {"futex_wait", 455}, {"futex_requeue", 456}, {"statmount", 457}, {"listmount", 458},
        {"lsm_get_self_attr", 459}, {"lsm_set_self_attr", 460}, {"lsm_list_modules", 461}, {"mseal", 462}, {"setxattrat", 463},
        {"getxattrat", 464}, {"listxattrat", 465}, {"removexattrat", 466}, {"open_tree_attr", 467}, {"sethostname", 170},
        {"setdomainname", 171}, {"syslog", 103}, {"chroot", 161}, {"fanotify_init", 300}, {"fanotify_mark", 301}, {"inotify_init1", 294},
        {"rseq", 334}, {"membarrier", 324}, {"pkey_alloc", 330}, {"preadv2", 327}, {"copy_file_range", 326}, {"statx", 332},
        {"io_setup", 206}, {"io_pgetevents", 333}, {"remap_file_pages", 216}, {"seccomp", 317}, {"memfd_create", 319}, {"execveat", 322},
        {"sched_setattr", 314}, {"modify_ldt", 154}, {"vmsplice", 278}, {"tuxcall", 184}, {"security", 185}, {"afs_syscall", 183},
        {"vserver", 236}, {"epoll_ctl_old", 214}, {"restart_syscall", 219}, {"unknown", 900}};
    for (size_t at = 0; at < sizeof wanted / sizeof *wanted; at++)
        call(wanted[at].name, wanted[at].number, -1, -1, -1, -1, -1, -1);
    static const struct { const char *name; long flag; } spaces[] = {{"mnt", 0x20000}, {"uts", 0x4000000}, {"ipc", 0x8000000},
        {"user", 0x10000000}, {"pid", 0x20000000}, {"net", 0x40000000}, {"cgroup", 0x2000000}, {"time", 0x80}};
    for (size_t at = 0; at < sizeof spaces / sizeof *spaces; at++) {
        char name[32];
        snprintf(name, sizeof name, "unshare %s", spaces[at].name);
        call(name, SYS_unshare, spaces[at].flag, 0, 0, 0, 0, 0);
    }
    static const long personalities[] = {0, 8, 0x20000, 0x20008, 0x40000, 0xffffffff};
    for (size_t at = 0; at < sizeof personalities / sizeof *personalities; at++) {
        char name[32];
        snprintf(name, sizeof name, "personality %lx", personalities[at]);
        call(name, SYS_personality, personalities[at], 0, 0, 0, 0, 0);
    }
}

int main(int count, char **arguments, char **variables) {
    /* `probe sleep` is the first process of a container in which other processes are executed. */
    if (count > 1 && !strcmp(arguments[1], "sleep")) {
        puts("ready");
        fflush(stdout);
        for (;;) pause();
    }
    /* Some properties of an executed process are set right after its start. */
    if (count > 1 && !strcmp(arguments[1], "settled")) usleep(300000);
    status();
    environment(variables);
    limits();
    namespaces();
    descriptors();
    terminal();
    identity();
    mounts();
    tree("device", "/dev", 3);
    tree("root", "/", 1);
    tree("root", "/etc", 1);
    paths();
    nodes();
    cgroups();
    kernel_parameters();
    network();
    system_calls();
    return fflush(stdout) ? 1 : 0;
}
