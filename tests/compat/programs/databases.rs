//! Databases: an entry point as root drops its privileges, the data are in a VOLUME or in the host's directory.

use serde_json::{Value, json};

use super::{Life, Program, Step, until, writes};

/// The server that the entry point starts to make the database does not listen here.
const READY: &str = "pg_isready --host=127.0.0.1 --quiet";

/// The image of postgres.
fn postgres_image() -> Value {
    json!({
        "Entrypoint": ["/entry/postgres"], "Cmd": ["bash", "-c", "exec postgres"],
        "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"],
        "Volumes": {"/var/lib/postgresql/data": {}}, "ExposedPorts": {"5432/tcp": {}}, "StopSignal": "SIGINT",
    })
}

fn redis_image() -> Value {
    json!({
        "Entrypoint": ["/entry/redis"], "Cmd": ["redis-server"], "WorkingDir": "/data",
        "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        "Volumes": {"/data": {}}, "ExposedPorts": {"6379/tcp": {}},
    })
}

/// Makes a table and reads it.
fn first_queries() -> Vec<Step> {
    vec![
        until(READY),
        writes(
            "psql -U postgres -Atq app -c 'create table t as select generate_series(1, 10000) as n' \
             -c 'select count(*), sum(n) from t'",
            "10000|50005000\n",
        ),
        // The server runs as the user that it has become, and its data are that user's.
        writes("stat -c '%U %a' /var/lib/postgresql/data", "postgres 700\n"),
        writes("ps -o user= -p 1", "postgres\n"),
        // Dynamic shared memory for parallel workers is in /dev/shm.
        writes(
            "psql -U postgres -Atq app -c 'set max_parallel_workers_per_gather = 2' \
             -c 'set parallel_setup_cost = 0' -c 'set min_parallel_table_scan_size = 0' -c 'select max(n) from t'",
            "10000\n",
        ),
    ]
}

pub(super) fn programs() -> Vec<Program> {
    let bind = json!({"mounts": [{
        "type": "bind", "source": "{data}", "target": "/var/lib/postgresql/data", "options": ["rbind", "rw"],
    }]});
    let data = vec![until("redis-cli ping | grep -q PONG"), writes("redis-cli set a 1; redis-cli get a", "OK\n1\n")];
    let kept = vec![
        until("redis-cli ping | grep -q PONG"),
        writes("redis-cli get a; stat -c %U /data/dump.rdb", "1\nredis\n"),
    ];
    let bind_redis = json!({"mounts": [
        {"type": "bind", "source": "{data}", "target": "/data", "options": ["rbind", "rw"]},
    ]});
    vec![
        Program::new("postgres", postgres_image(), vec![Life::Service(first_queries(), 0)]),
        Program::new(
            "postgres with its data on the host",
            postgres_image(),
            vec![
                Life::Service(first_queries(), 0),
                Life::Service(
                    vec![until(READY), writes("psql -U postgres -Atq app -c 'select count(*) from t'", "10000\n")],
                    0,
                ),
            ],
        )
        .with("--volume {data}:/var/lib/postgresql/data", bind),
        Program::new("postgres with a read-only root", postgres_image(), vec![Life::Service(first_queries(), 0)]).with(
            "--read-only --tmpfs /tmp --tmpfs /run",
            json!({"readonly_rootfs": true, "mounts": [
                {"type": "tmpfs", "target": "/tmp", "options": ["rw", "nosuid", "nodev"]},
                {"type": "tmpfs", "target": "/run", "options": ["rw", "nosuid", "nodev"]},
            ]}),
        ),
        Program::new("redis", redis_image(), vec![Life::Service(data, 0), Life::Service(kept, 0)])
            .with("--volume {data}:/data", bind_redis),
        Program::new(
            "redis with a read-only root",
            redis_image(),
            vec![Life::Service(
                vec![
                    until("redis-cli ping | grep -q PONG"),
                    writes("redis-cli set a 1; redis-cli save; ls /data", "OK\nOK\ndump.rdb\n"),
                ],
                0,
            )],
        )
        .with("--read-only", json!({"readonly_rootfs": true})),
    ]
}
