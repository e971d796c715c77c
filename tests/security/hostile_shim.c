// A shim that lies. The name of its file selects the lie: WHEN-HOW, where WHEN is the first call that the shim does not
// answer correctly ("connect" or "create"), and HOW is what the shim does instead. Compiled by hostile_shim.rs.
//
// The frames are those of ttrpc (containerd/ttrpc, PROTOCOL.md): length and stream in four bytes each, a type and a
// byte of flags.
#include <arpa/inet.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static int listener = 3;

static int read_whole(int fd, void *into, size_t count) {
    for (size_t at = 0; at < count;) {
        ssize_t got = read(fd, (char *)into + at, count - at);
        if (got <= 0) return 0;
        at += got;
    }
    return 1;
}

static int write_whole(int fd, const void *from, size_t count) {
    for (size_t at = 0; at < count;) {
        ssize_t put = write(fd, (const char *)from + at, count - at);
        if (put <= 0) return 0;
        at += put;
    }
    return 1;
}

static int send_frame(int fd, unsigned length, unsigned stream, const void *payload, size_t count) {
    unsigned char head[10] = {0};
    unsigned words[2] = {htonl(length), htonl(stream)};
    memcpy(head, words, 8);
    head[8] = 2;
    return write_whole(fd, head, sizeof head) && write_whole(fd, payload, count);
}

static void flood(int fd, size_t total) {
    static char block[64 << 10];
    memset(block, 'A', sizeof block);
    for (size_t at = 0; at < total && write_whole(fd, block, sizeof block); at += sizeof block) {}
}

// A refusal with a text of 8000 bytes: Response { status { code = 2, message } }.
static void refuse(int fd, unsigned stream) {
    static char body[8008] = "\x0a\xc5\x3e\x08\x02\x12\xc0\x3e";
    memset(body + 8, 'x', 8000);
    send_frame(fd, sizeof body, stream, body, sizeof body);
}

static void lie(const char *how, int fd, unsigned stream) {
    if (!strcmp(how, "exits")) exit(1);
    if (!strcmp(how, "killed")) raise(SIGKILL);
    if (!strcmp(how, "closes")) close(fd);
    if (!strcmp(how, "silent")) pause();
    if (!strcmp(how, "garbage")) flood(fd, 8 << 20);
    if (!strcmp(how, "4gib")) send_frame(fd, 0xffffffff, stream, "", 0), flood(fd, 8 << 20);
    if (!strcmp(how, "2gib")) send_frame(fd, 0x7fffffff, stream, "", 0), flood(fd, 8 << 20);
    if (!strcmp(how, "5mib")) send_frame(fd, 5 << 20, stream, "", 0), flood(fd, 5 << 20);
    if (!strcmp(how, "stream")) send_frame(fd, 0, stream + 2, "", 0);
    if (!strcmp(how, "nonsense")) send_frame(fd, 4, stream, "\xff\xff\xff\xff", 4);
    if (!strcmp(how, "short")) send_frame(fd, 100, stream, "\x12", 1), close(fd);
    if (!strcmp(how, "text")) refuse(fd, stream);
    if (!strcmp(how, "log")) flood(2, 128 << 20), exit(1);
}

int main(int argc, char **argv) {
    signal(SIGPIPE, SIG_IGN);
    const char *when = strrchr(argv[0], '/') + 1, *how = strchr(when, '-') + 1;
    // The `delete` command, which the plugin calls to clean up after a dead shim.
    if (argc > 1 && !strcmp(argv[argc - 1], "delete")) {
        if (!strcmp(how, "killed")) flood(1, 128 << 20), flood(2, 128 << 20);
        return 0;
    }
    int creates = !strncmp(when, "create", 6);
    if (!creates && (!strcmp(how, "exits") || !strcmp(how, "log"))) lie(how, -1, 0);
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        if (fd < 0) return 1;
        for (;;) {
            unsigned char head[10];
            static char request[1 << 20];
            unsigned words[2];
            if (!read_whole(fd, head, sizeof head)) break;
            memcpy(words, head, 8);
            unsigned length = ntohl(words[0]), stream = ntohl(words[1]);
            if (length > sizeof request || !read_whole(fd, request, length)) break;
            if (!creates || memmem(request, length, "\x12\x06" "Create", 8)) lie(how, fd, stream);
            // An empty answer, which reports success for every call.
            else if (!send_frame(fd, 0, stream, "", 0)) break;
            if (memmem(request, length, "\x12\x08" "Shutdown", 10)) return 0;
        }
        close(fd);
    }
}
