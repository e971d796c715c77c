/* The probe: prints what a program can see of its container, one `key<TAB>value` a line. The parts of this program are
 * concatenated before they are compiled. */
#include <arpa/inet.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <limits.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

/* Prints text with control characters and backslashes escaped. */
static void put(const char *text) {
    for (; *text; text++) {
        if (*text == '\n') fputs("\\n", stdout);
        else if (*text == '\t') fputs("\\t", stdout);
        else if ((unsigned char)*text < 32) printf("\\x%02x", *text);
        else putchar(*text);
    }
}

/* Prints a line. */
static void say(const char *key, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void say(const char *key, const char *format, ...) {
    static char value[1 << 16];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(value, sizeof value, format, arguments);
    va_end(arguments);
    put(key);
    putchar('\t');
    put(value);
    putchar('\n');
}

/* The name of an error, or "ok". */
static const char *error_name(int code) {
    return code ? strerrorname_np(code) : "ok";
}

/* Composes a key. The last eight are kept. */
static const char *key_of(const char *kind, const char *name) {
    static char keys[8][PATH_MAX + 64];
    static int next;
    char *key = keys[next++ % 8];
    snprintf(key, sizeof keys[0], "%s %s", kind, name);
    return key;
}

/* Reads a file. Returns the length, or -1 with errno. NUL becomes a blank, and trailing newlines are cut off. */
static ssize_t slurp(const char *path, char *into, size_t size) {
    int file = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (file < 0) return -1;
    size_t length = 0;
    ssize_t more = 0;
    while (length + 1 < size && (more = read(file, into + length, size - 1 - length)) > 0) length += more;
    int code = errno;
    close(file);
    if (more < 0) {
        errno = code;
        return -1;
    }
    for (size_t at = 0; at < length; at++)
        if (!into[at]) into[at] = ' ';
    while (length && (into[length - 1] == '\n' || into[length - 1] == ' ')) length--;
    into[length] = 0;
    return length;
}

/* Prints the content of a file, or the error of reading it. */
static void say_file(const char *key, const char *path) {
    static char text[1 << 16];
    if (slurp(path, text, sizeof text) < 0) say(key, "%s", error_name(errno));
    else say(key, "%s", text);
}
