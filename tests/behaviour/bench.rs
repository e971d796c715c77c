//! The benchmark measures what it claims to measure, and leaves nothing behind.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs,
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    process::Output,
};

use nomad_driver_shim::process::which;
use serde_json::Value;
use tokio::process::Command;

use crate::{
    archives::{layout, skopeo},
    support::{Env, Image, leak, program, script, services},
};

/// One benchmark with directories of its own.
struct Bench<'a> {
    env: &'a Env,
    image: String,
    json: PathBuf,
    run: PathBuf,
    state: PathBuf,
}

impl<'a> Bench<'a> {
    async fn new(env: &'a Env) -> Self {
        let [json, run, state] = ["results.json", "b-run", "b-state"].map(|name| env.dir.join(name));
        Self { env, image: env.busybox().await, json, run, state }
    }

    /// A command of the program with the benchmark's image and directories.
    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(program());
        command.arg(name).args(self.options()).arg(&self.image).current_dir(&self.env.dir);
        command
    }

    /// The options for the benchmark's directories and containerd.
    fn options(&self) -> Vec<OsString> {
        let path = |path: &Path| path.as_os_str().to_owned();
        let values = [
            ("--namespace", OsString::from(&self.env.namespace)),
            ("--address", path(&services().containerd)),
            ("--run-dir", path(&self.run)),
            ("--state-dir", path(&self.state)),
        ];
        values.into_iter().flat_map(|(name, value)| [name.into(), value]).collect()
    }

    /// Runs the benchmark with a plan.
    async fn measure(&self, plan: &str, options: &[&Path], path: &str) -> Output {
        let mut command = self.command("bench");
        command.arg("--plan").arg(self.plan(plan)).arg("--json").arg(&self.json).args(options).env("PATH", path);
        command.output().await.unwrap()
    }

    /// Writes a plan's file.
    fn plan(&self, plan: &str) -> PathBuf {
        let file = self.env.dir.join("plan.toml");
        fs::write(&file, plan).unwrap();
        file
    }

    fn results(&self) -> Value {
        serde_json::from_slice(&fs::read(&self.json).unwrap()).unwrap()
    }

    /// No mount is left, in this process or in one that lives on, and nothing is on disk but the image store, which
    /// `run` leaves as well.
    async fn has_left_nothing(&self) {
        for process in fs::read_dir("/proc").unwrap() {
            let mounts = fs::read_to_string(process.unwrap().path().join("mountinfo")).unwrap_or_default();
            assert!(!mounts.contains(self.env.dir.to_str().unwrap()), "{mounts}");
        }
        assert_eq!(leak::entries(&self.run), Vec::<String>::new());
        assert_eq!(leak::entries(&self.state), ["cli"]);
        assert_eq!(leak::entries(&self.state.join("cli/uppers")), Vec::<String>::new());
        let removed = self.command("rmi").output().await.unwrap();
        assert!(removed.status.success(), "{removed:?}");
    }
}

fn paths(kinds: &[&str]) -> String {
    kinds.iter().map(|kind| format!("[[paths]]\nname = '{kind}'\nkind = '{kind}'\n")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_path_is_measured_in_one_run() {
    let env = Env::new().await;
    let bench = Bench::new(&env).await;
    // The floor is measured only if its task is confined like runc's.
    let kinds = ["driver", "containerd", "runc", "crun", "floor"];
    let plan = format!(
        "count = 2\nblock = 1\ngap_ms = 1\nconcurrency = [2]\nconcurrent_count = 4\nidle_tasks = 2\n\
         sequences = [['start', 'wait', 'destroy'], ['start', 'stop', 'destroy']]\n{}",
        paths(&kinds)
    );
    let (html, pictures) = (env.dir.join("results.html"), env.dir.join("pictures"));
    let options = ["--html".as_ref(), html.as_path(), "--pictures".as_ref(), pictures.as_path()];
    let output = bench.measure(&plan, &options, &std::env::var("PATH").unwrap()).await;
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}\n{complained}");
    let results = bench.results();
    assert_eq!(results["left_out"], serde_json::json!({}), "{said}");
    let rows = results["rows"].as_array().unwrap();
    let has = |path: &str, mode: &str, metric: &str| {
        rows.iter().any(|row| {
            let same = row["path"] == path && row["mode"] == mode && row["metric"] == metric && row["concurrency"] == 1;
            let ordered = ["min_ms", "p50_ms", "p90_ms", "p99_ms", "max_ms"].map(|key| row[key].as_f64().unwrap());
            same && row["n"] == 2 && ordered.is_sorted() && ordered[0] > 0.0
        })
    };
    for path in kinds {
        for mode in ["back_to_back", "gaps"] {
            for metric in ["first_instruction", "first_byte", "exit_seen", "stop", "destroyed"] {
                assert!(has(path, mode, metric), "{path} {mode} {metric}: {said}");
            }
            // A foreground command has no answer before its end.
            assert_eq!(has(path, mode, "start_task"), !matches!(path, "runc" | "crun"), "{path}");
        }
    }
    let at_two: BTreeSet<&str> =
        results["throughput"].as_array().unwrap().iter().map(|one| one["path"].as_str().unwrap()).collect();
    assert_eq!(at_two, kinds.into());
    assert!(results["memory"].as_array().unwrap().iter().all(|one| one["total_kib"].as_u64().unwrap() > 1000));
    assert!(fs::read_to_string(&html).unwrap().contains("<svg"));
    let picture = fs::read_to_string(pictures.join("first_byte-gaps-1.svg")).unwrap();
    assert!(kinds.iter().all(|kind| picture.contains(&format!(">{kind}</text>"))), "{picture}");
    the_overview_has_the_figures(&said, &results, &kinds);
    bench.has_left_nothing().await;
    let compared =
        Command::new(program()).args(["bench", "--compare"]).args([&bench.json, &bench.json]).output().await.unwrap();
    assert!(String::from_utf8_lossy(&compared.stdout).contains("1.00"), "{compared:?}");
    env.finish().await;
}

/// The overview has a line for each path, with the figures of the results and the ratio to the first path.
fn the_overview_has_the_figures(said: &str, results: &Value, kinds: &[&str]) {
    let (_, table) = said.split_once("\nfirst_byte: ").unwrap_or_else(|| panic!("{said}"));
    let lines: Vec<Vec<&str>> =
        table.lines().skip(3).take(kinds.len()).map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines.len(), kinds.len(), "{said}");
    for (kind, line) in kinds.iter().zip(&lines) {
        let find = |list: &str, subject: &str, mode: &str| {
            let all = results[list].as_array().unwrap().iter();
            let mut same = all.filter(|one| {
                (&one[subject], &one["mode"], &one["metric"], &one["concurrency"])
                    == (&(*kind).into(), &mode.into(), &"first_byte".into(), &1.into())
            });
            same.next().cloned()
        };
        let mut expected = vec![(*kind).to_owned()];
        for mode in ["back_to_back", "gaps"] {
            let row = find("rows", "path", mode).unwrap();
            expected.push(row["n"].to_string());
            expected.extend(["min_ms", "p50_ms", "p99_ms"].map(|name| format!("{:.2}", row[name].as_f64().unwrap())));
            expected.extend(find("ratios", "to", mode).map(|ratio| format!("{:.3}", ratio["p50"].as_f64().unwrap())));
        }
        assert_eq!(*line, expected, "{said}");
    }
    for part in ["start_task: ", "destroyed: ", "stop: ", "driver: create", "tasks/s", "KiB/task"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(!said.contains("last_instruction_to_stopped"), "only --all prints all figures: {said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn images_in_files_are_measured_as_run_runs_them() {
    let env = Env::new().await;
    let mut bench = Bench::new(&env).await;
    let directory = layout(&Image::busybox(), &env.dir.join("layout"));
    skopeo(&directory, &format!("docker-archive:{}:app:1", env.dir.join("app.tar").display()));
    let plan = format!(
        "count = 1\nblock = 1\nmodes = ['back_to_back']\nconcurrency = []\nidle_tasks = 0\n\
         sequences = [['start', 'wait', 'destroy']]\n{}",
        paths(&["driver", "runc"])
    );
    let path = std::env::var("PATH").unwrap();
    for image in ["oci:layout", "oci:layout:one", "docker-archive:app.tar"] {
        bench.image = image.to_owned();
        let output = bench.measure(&plan, &["--all".as_ref()], &path).await;
        assert!(output.status.success(), "{image}: {output:?}");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(said.contains("destroyed: ") && said.contains("phase.own"), "{said}");
        assert!(!said.contains("left out"), "{said}");
        bench.has_left_nothing().await;
    }
    for image in ["oci:missing", "oci:layout:two", "docker-archive:missing.tar", "oci-archive:app.tar", "Not An Image"]
    {
        bench.image = image.to_owned();
        let measured = bench.measure(&plan, &[], &path).await;
        let run = bench.command("run").arg("true").output().await.unwrap();
        let complaints = [&measured, &run].map(|output| String::from_utf8_lossy(&output.stderr).into_owned());
        assert_eq!(complaints[0], complaints[1], "{image}");
        assert_eq!([measured.status.code(), run.status.code()], [Some(125); 2], "{image}: {complaints:?}");
        assert_eq!(complaints[0].lines().count(), 1, "{image}: {complaints:?}");
    }
    assert_eq!(leak::entries(&bench.run), Vec::<String>::new());
    assert_eq!(leak::entries(&bench.state), ["cli"]);
    env.finish().await;
}

/// The benchmark runs as `make bench` runs it where `/run` is on disk: with a `/run` of its own. containerd runs
/// outside, and so do the tasks of the test's `docker`, as dockerd's do; dockerd itself is not among what the tests
/// install.
#[tokio::test(flavor = "multi_thread")]
async fn daemons_outside_of_the_benchmarks_run_directory_are_measured() {
    let env = Env::new().await;
    let mut bench = Bench::new(&env).await;
    // A directory on disk stands for the host's `/run`, which no test may touch.
    let (host_run, programs, notes) = (env.dir.join("host-run"), env.dir.join("programs"), env.dir.join("notes"));
    for directory in [&host_run, &programs, &notes] {
        fs::create_dir(directory).unwrap();
    }
    let sockets =
        ["docker.sock", "named.sock", "other.sock"].map(|name| UnixListener::bind(host_run.join(name)).unwrap());
    let text = format!(
        r#"case "$1" in
        run)
            echo $$ > "{notes}/$4"
            local=${{6%:/local}}
            while [ "$1" != "{image}" ]; do shift; done
            shift 2
            exec nsenter --mount=/proc/{outside}/ns/mnt "$local/stamp" "$@";;
        stop) kill -TERM "$(cat "{notes}/$4")";;
        esac"#,
        notes = notes.display(),
        image = bench.image,
        outside = std::process::id(),
    );
    script(&programs.join("docker"), &text);
    bench.run = "/run/bench".into();
    let plan = format!(
        "count = 2\nblock = 1\ngap_ms = 1\nconcurrency = []\nidle_tasks = 0\n\
         sequences = [['start', 'wait', 'destroy'], ['start', 'stop', 'destroy']]\n{}",
        paths(&["driver", "containerd", "docker"])
    );
    let inside = r#"mount --no-mtab --bind "$1" /run && shift && exec "$@""#;
    let seen = r#"ls /run >&2; stat --file-system --format=%T /run >&2; exec "$@""#;
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", inside, "sh"]).arg(&host_run);
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/with-memory-run.sh"));
    command.args(["sh", "-c", seen, "sh"]).arg(program()).arg("bench").args(bench.options()).arg(&bench.image);
    command.arg("--plan").arg(bench.plan(&plan)).arg("--json").arg(&bench.json);
    command.env("PATH", format!("{}:{}", programs.display(), std::env::var("PATH").unwrap()));
    command.env("DOCKER_HOST", "unix:///var/run/named.sock").env_remove("CONTAINER_HOST");
    let output = command.output().await.unwrap();
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}\n{complained}");
    assert_eq!(complained, "docker.sock\nnamed.sock\ntmpfs\n");
    let results = bench.results();
    assert_eq!(results["left_out"], serde_json::json!({}), "{said}");
    let measured: BTreeSet<&str> =
        results["rows"].as_array().unwrap().iter().map(|row| row["path"].as_str().unwrap()).collect();
    assert_eq!(measured, ["driver", "containerd", "docker"].into());
    let left: BTreeSet<String> = leak::entries(&host_run).into_iter().collect();
    assert_eq!(left, ["docker.sock", "named.sock", "other.sock"].map(str::to_owned).into());
    assert_eq!(leak::entries(&bench.state), ["cli"]);
    drop(sockets);
    // Outside, this directory would be the host's.
    bench.run = env.dir.join("b-run");
    let removed = bench.command("rmi").output().await.unwrap();
    assert!(removed.status.success(), "{removed:?}");
    env.finish().await;
}

/// The test's runtime knows a task only a while after its start, as crun 1.8 does, and refuses the third `kill`.
#[tokio::test(flavor = "multi_thread")]
async fn a_path_that_fails_is_left_out_from_then_on_and_leaves_nothing() {
    let env = Env::new().await;
    let bench = Bench::new(&env).await;
    let (notes, programs) = (env.dir.join("notes"), env.dir.join("programs"));
    fs::create_dir(&notes).unwrap();
    fs::create_dir(&programs).unwrap();
    let text = format!(
        r#"cd {notes} || exit 1
        for last; do :; done
        case " $* " in
        *" state "*)
            if ! [ -e "$last" ]; then
                : > "$last"
                echo "not noted yet" >&2
                exit 1
            fi
            : > "$last.known";;
        *" kill bench-"*" TERM ")
            id=${{*#* kill }}
            id=${{id% TERM}}
            [ -e "$id.known" ] || {{ echo "$id is not known" >&2; exit 1; }}
            echo >> kills
            [ "$(wc -l < kills)" -lt 3 ] || {{ echo "no third kill" >&2; exit 1; }};;
        esac
        exec {real} "$@""#,
        notes = notes.display(),
        real = which(Path::new("runc")).unwrap().display(),
    );
    script(&programs.join("runc"), &text);
    let plan = format!(
        "count = 3\nblock = 1\ngap_ms = 1\nconcurrency = []\nidle_tasks = 0\n\
         sequences = [['start', 'stop', 'destroy']]\n{}",
        paths(&["driver", "runc"])
    );
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
    let output = bench.measure(&plan, &[], &path).await;
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!((output.status.code(), complained.as_ref()), (Some(1), ""), "{said}");
    assert!(said.contains("left out: runc: runc: could not stop the task: no third kill"), "{said}");
    let results = bench.results();
    let counts = |path: &str| -> Vec<u64> {
        let rows = results["rows"].as_array().unwrap().iter();
        rows.filter(|row| row["path"] == path && row["metric"] == "stop").filter_map(|row| row["n"].as_u64()).collect()
    };
    assert_eq!((counts("driver"), counts("runc")), (vec![3, 3], vec![1]), "{said}");
    bench.has_left_nothing().await;
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_plans_are_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let plan = directory.path().join("plan.toml");
    for (text, part) in [("counts = 3", "counts"), ("count = 0", "nothing would be measured")] {
        fs::write(&plan, text).unwrap();
        let output = Command::new(program()).args(["bench", "busybox", "--plan"]).arg(&plan).output().await.unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(125) && said.contains("plan.toml") && said.contains(part), "{said}");
    }
    let output = Command::new(program()).args(["bench", "busybox", "--paths", "x"]).output().await.unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("\"x\" is not in the plan"), "{output:?}");
}
