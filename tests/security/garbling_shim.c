// A shim with garbled answers: a proxy before the real shim that spoils the first answer to each call of CALLS on each
// connection. Compiled by garbling_shim.rs.
//
// The frames are those of ttrpc (containerd/ttrpc, PROTOCOL.md): length and stream in four bytes each, a type and a
// byte of flags.
#include <arpa/inet.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define REAL "/usr/bin/containerd-shim-runc-v2"

// The names of the calls, as a request encodes them.
static const char *const CALLS[] = {"\x12\x04" "Wait", "\x12\x05" "State", "\x12\x06" "Delete"};
enum { COUNT = sizeof CALLS / sizeof *CALLS, MOST = 5 << 20 };

static struct sockaddr_un address = {AF_UNIX, "real-sock"};

static int whole(int fd, char *bytes, size_t count, int writes) {
    for (size_t at = 0; at < count;) {
        ssize_t done = writes ? write(fd, bytes + at, count - at) : read(fd, bytes + at, count - at);
        if (done <= 0) return 0;
        at += done;
    }
    return 1;
}

// Serves one connection of the plugin until it ends.
static void proxy(int plugin, int shim) {
    static char frame[10 + MOST];
    unsigned spoiled[COUNT] = {0}, stream, length;
    if (connect(shim, (void *)&address, sizeof address) < 0) return;
    struct pollfd ends[2] = {{plugin, POLLIN}, {shim, POLLIN}};
    while (poll(ends, 2, -1) > 0) {
        for (int from = 0; from < 2; from++) {
            if (!ends[from].revents) continue;
            if (!whole(ends[from].fd, frame, 10, 0)) return;
            memcpy(&length, frame, 4), memcpy(&stream, frame + 4, 4);
            length = ntohl(length);
            if (length > MOST || !whole(ends[from].fd, frame + 10, length, 0)) return;
            for (int call = 0; call < COUNT; call++) {
                if (from == 0 && !spoiled[call] && memmem(frame, 10 + length, CALLS[call], strlen(CALLS[call])))
                    spoiled[call] = stream;
                else if (from == 1 && spoiled[call] == stream)
                    memset(frame + 10, 0xff, length);
            }
            if (!whole(ends[!from].fd, frame, 10 + length, 1)) return;
        }
    }
}

int main(int argc, char **argv) {
    argv[0] = REAL;
    if (argc < 2 || !strcmp(argv[argc - 1], "delete") || !strcmp(argv[1], "-v")) return execv(REAL, argv);
    int plugins = dup(3), own = socket(AF_UNIX, SOCK_STREAM, 0);
    if (bind(own, (void *)&address, sizeof address) < 0 || listen(own, 100) < 0) return 1;
    if (!fork()) {
        // The real shim dies with the proxy. The plugin takes the proxy for the shim.
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        dup2(own, 3), close(own), close(plugins);
        return execv(REAL, argv);
    }
    close(own), close(3);
    signal(SIGPIPE, SIG_IGN);
    // A plugin has one connection at a time. The connection of the next plugin begins when this plugin's connection has
    // ended.
    if (!fork()) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (int fd; (fd = accept(plugins, NULL, NULL)) >= 0; close(fd)) {
            int shim = socket(AF_UNIX, SOCK_STREAM, 0);
            proxy(fd, shim);
            close(shim);
        }
        return 0;
    }
    close(plugins);
    wait(NULL);
    return 0;
}
