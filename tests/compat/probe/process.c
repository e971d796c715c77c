/* The process: its identity, environment, limits, namespaces, signals and descriptors. */
static void status(void) {
    static const char *wanted[] = {"Umask", "Uid", "Gid", "FDSize", "Groups", "NStgid", "NSpid", "SigQ", "SigBlk", "SigIgn",
        "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "Speculation_Store_Bypass",
        "SpeculationIndirectBranch", "Cpus_allowed_list", "Mems_allowed_list", "CoreDumping", "THP_enabled", "SigCgt", "PPid"};
    FILE *file = fopen("/proc/self/status", "re");
    char *line = NULL;
    size_t size = 0;
    while (file && getline(&line, &size, file) > 0) {
        line[strcspn(line, "\n")] = 0;
        char *value = strchr(line, ':');
        if (!value) continue;
        *value++ = 0;
        while (isspace((unsigned char)*value)) value++;
        for (size_t at = 0; at < sizeof wanted / sizeof *wanted; at++)
            if (!strcmp(line, wanted[at])) say(key_of("status", line), "%s", value);
    }
    if (file) fclose(file);
    free(line);
}

static void environment(char **variables) {
    for (; *variables; variables++) {
        char name[256];
        size_t length = strcspn(*variables, "=");
        snprintf(name, sizeof name, "%.*s", (int)length, *variables);
        say(key_of("env", name), "%s", (*variables)[length] ? *variables + length + 1 : "");
    }
}

static void limits(void) {
    static const char *names[] = {"cpu", "fsize", "data", "stack", "core", "rss", "nproc", "nofile", "memlock", "as",
        "locks", "sigpending", "msgqueue", "nice", "rtprio", "rttime"};
    for (int kind = 0; kind < 16; kind++) {
        struct rlimit limit;
        getrlimit(kind, &limit);
        say(key_of("rlimit", names[kind]), "%lld:%lld", (long long)limit.rlim_cur, (long long)limit.rlim_max);
    }
}

static void namespaces(void) {
    static const char *names[] = {"cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"};
    for (int at = 0; at < 8; at++) {
        char path[64], link[64] = "";
        snprintf(path, sizeof path, "/proc/self/ns/%s", names[at]);
        if (readlink(path, link, sizeof link - 1) < 0) snprintf(link, sizeof link, "%s", error_name(errno));
        say(key_of("namespace", names[at]), "%s", link);
    }
}

static void descriptors(void) {
    for (int number = 0; number < 64; number++) {
        char path[64], link[PATH_MAX] = "", name[16];
        snprintf(path, sizeof path, "/proc/self/fd/%d", number);
        ssize_t length = readlink(path, link, sizeof link - 1);
        if (length < 0) continue;
        struct stat found;
        fstat(number, &found);
        const char *kind = S_ISFIFO(found.st_mode) ? "pipe" : S_ISSOCK(found.st_mode) ? "socket"
            : S_ISCHR(found.st_mode) ? link : S_ISREG(found.st_mode) ? link : "other";
        snprintf(name, sizeof name, "%d", number);
        say(key_of("descriptor", name), "%s %s", kind, fcntl(number, F_GETFL) & O_NONBLOCK ? "nonblocking" : "blocking");
    }
}

static void terminal(void) {
    char name[PATH_MAX] = "";
    say("terminal stdin", "%s", isatty(0) ? (ttyname_r(0, name, sizeof name) ? "no name" : name) : "no");
    say("terminal stdout", "%d", isatty(1));
    say("terminal stderr", "%d", isatty(2));
    int file = open("/dev/tty", O_RDWR | O_CLOEXEC);
    say("terminal /dev/tty", "%s", error_name(file < 0 ? errno : 0));
    if (file >= 0) {
        say("terminal foreground", "%d", tcgetpgrp(file) == getpgrp());
        close(file);
    }
}

static void identity(void) {
    struct utsname names;
    char text[PATH_MAX];
    uname(&names);
    say("hostname", "%s", names.nodename);
    say("domainname", "%s", names.domainname);
    say("kernel", "%s %s %s", names.sysname, names.release, names.machine);
    say("directory", "%s", getcwd(text, sizeof text) ? text : error_name(errno));
    say("process id", "%d", getpid());
    say("process parent", "%d", getppid());
    say("process leads", "session %d group %d", getsid(0) == getpid(), getpgrp() == getpid());
    say("process nice", "%d", getpriority(PRIO_PROCESS, 0));
    say("process scheduler", "%d", sched_getscheduler(0));
    say("process io priority", "%ld", syscall(SYS_ioprio_get, 1, 0));
    say("process personality", "%x", personality(0xffffffff));
    say("process dumpable", "%d", prctl(PR_GET_DUMPABLE));
    say("process securebits", "%d", prctl(PR_GET_SECUREBITS));
    say("process keeps capabilities", "%d", prctl(PR_GET_KEEPCAPS));
    say("process timer slack", "%d", prctl(PR_GET_TIMERSLACK));
    say("process subreaper", "%d", prctl(PR_GET_CHILD_SUBREAPER, text) ? -1 : *(int *)text);
    say("process dies with its parent", "%d", prctl(PR_GET_PDEATHSIG, text) ? -1 : *(int *)text);
    static const char *files[] = {"cmdline", "comm", "oom_score_adj", "coredump_filter", "loginuid", "sessionid",
        "uid_map", "gid_map", "setgroups", "attr/current", "attr/exec", "attr/keycreate", "cpuset", "wchan"};
    for (size_t at = 0; at < sizeof files / sizeof *files; at++) {
        snprintf(text, sizeof text, "/proc/self/%s", files[at]);
        say_file(key_of("process", files[at]), text);
    }
    say_file("first process cmdline", "/proc/1/cmdline");
    sigset_t pending;
    sigpending(&pending);
    say("process pending signals", "%d", !sigisemptyset(&pending));
}
