//! Runtimes of languages: they size themselves by the limits of the container.

use serde_json::json;

use super::{Life, Program};

const NODE: &str = "const os = require('os'), v8 = require('v8');
console.log('home', os.homedir(), process.env.HOME);
console.log('heap', Math.round(v8.getHeapStatistics().heap_size_limit / 1048576), 'MiB');
console.log('constrained', process.constrainedMemory && process.constrainedMemory());";

const PYTHON: &str = "import multiprocessing, multiprocessing.shared_memory, os, signal, socket, threading
def square(n): return n * n
if __name__ == '__main__':
    with multiprocessing.Pool(4) as pool: print(sum(pool.map(square, range(1000))))
    memory = multiprocessing.shared_memory.SharedMemory(create=True, size=1 << 20)
    memory.buf[0] = 7; print(memory.buf[0]); memory.close(); memory.unlink()
    threads = [threading.Thread(target=lambda: None) for _ in range(500)]
    [thread.start() for thread in threads]; [thread.join() for thread in threads]
    seen = []
    signal.signal(signal.SIGRTMIN + 3, lambda number, frame: seen.append(number))
    os.kill(os.getpid(), signal.SIGRTMIN + 3); print(seen == [signal.SIGRTMIN + 3])
    print('processors', len(os.sched_getaffinity(0)), 'umask %04o' % os.umask(0))
    print('user', os.getuid(), 'home', os.path.expanduser('~'))
    # The sockets of ping without privileges.
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
    listener = socket.socket(); listener.bind(('127.0.0.1', 80)); print('port 80')";

/// What a JVM takes for its machine: its limits, its heap and its processors.
const JVM: &str = "java -XshowSettings:system -XX:+PrintFlagsFinal -version 2>&1 | \
    grep -E 'Provider|Effective|Memory Limit|MaxHeapSize|ActiveProcessorCount' | tr -s ' '";

pub(super) fn programs() -> Vec<Program> {
    let path = "PATH=/usr/local/bin:/usr/bin:/bin";
    let image =
        |command: [&str; 3], user: &str| json!({"Cmd": command, "User": user, "Env": [path], "WorkingDir": "/tmp"});
    let shell = |script| image(["sh", "-c", script], "");
    let limited = json!({"cpuset_cpus": "0", "cpuset_mems": "0"});
    let processor = "--cpuset-cpus 0 --cpuset-mems 0";
    vec![
        Program::new(
            "JVM of 512 MiB",
            shell(JVM),
            vec![Life::Once(vec!["Memory Limit: 512.00M", "MaxHeapSize = 134217728"])],
        )
        .with(processor, limited.clone()),
        Program::new(
            "JVM of 1 GiB",
            shell(JVM),
            vec![Life::Once(vec!["Memory Limit: 1.00G", "MaxHeapSize = 268435456"])],
        )
        .memory(1024),
        Program::new(
            "node",
            image(["node", "-e", NODE], ""),
            vec![Life::Once(vec!["home /root", "constrained 536870912"])],
        )
        .with(processor, limited.clone()),
        Program::new(
            "node as a user that the image does not know",
            image(["node", "-e", NODE], "1001"),
            vec![Life::Once(vec!["home / /"])],
        ),
        Program::new(
            "python",
            image(["python3", "-c", PYTHON], "www-data"),
            vec![Life::Once(vec!["332833500", "port 80"])],
        )
        .with(processor, limited),
    ]
}
