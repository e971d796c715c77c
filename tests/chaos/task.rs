//! A task's files on the host: its allocation's directories, its log, and the file in which each start writes a line.

use std::{
    fs,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use nomad_driver_shim::{
    host::{Collector, Output, TaskDirs},
    pb::driver::{NetworkIsolationSpec, TaskConfig},
};
use tokio::sync::Mutex;

use crate::{
    model::STOPPED,
    node::Node,
    observe::MARK,
    step::{TaskNumber, Work},
    support::patience,
};

/// Time limit for the end of a log stream. A stream ends when its last writer has ended, and remains of a start hold
/// the stream open for the grace period.
const END: Duration = Duration::from_secs(25);
/// Time limit within which the collector of an ended attempt has reached the end of its stream.
const NEXT: Duration = Duration::from_secs(2);

/// The files of a task on the host.
pub(crate) struct TaskFiles {
    pub number: TaskNumber,
    dirs: TaskDirs,
    namespace: String,
    encoded: Vec<u8>,
    /// The network namespace of the task's group.
    network: Option<PathBuf>,
    /// The log collectors. `None` if the driver writes the log itself.
    collectors: Option<Mutex<[Vec<Collector>; 2]>>,
}

impl TaskFiles {
    pub(crate) fn new(number: TaskNumber, dirs: TaskDirs, namespace: &str, encoded: Vec<u8>) -> Self {
        Self {
            number,
            dirs,
            namespace: namespace.to_owned(),
            encoded,
            network: None,
            collectors: Some(Mutex::default()),
        }
    }

    /// Makes the task one whose log the driver writes itself.
    pub(crate) fn without_collectors(self) -> Self {
        Self { collectors: None, ..self }
    }

    /// Makes the task run in a group's network namespace.
    pub(crate) fn in_network(self, path: &Path) -> Self {
        Self { network: Some(path.to_owned()), ..self }
    }

    /// The task configuration that Nomad sends for an attempt.
    pub(crate) fn config(&self, attempt: u32) -> TaskConfig {
        let mut config = self.dirs.config(&attempt.to_string(), self.encoded.clone());
        config.env.insert(MARK.to_owned(), format!("{}/{}/{attempt}", self.namespace, self.number));
        config.env.insert("TASK".to_owned(), self.number.to_string());
        config.env.insert("ATTEMPT".to_owned(), attempt.to_string());
        config.network_isolation_spec = self.network.as_ref().map(|path| NetworkIsolationSpec {
            mode: 1,
            path: path.to_string_lossy().into_owned(),
            ..Default::default()
        });
        config
    }

    /// The text in front of the numbers in a line of the log.
    pub(crate) fn prefix(&self) -> String {
        format!("tick {} ", self.number)
    }

    /// Makes sure that a collector reads the log, as Nomad does before each start.
    pub(crate) async fn collect(&self) {
        let Some(collectors) = &self.collectors else { return };
        for (stream, fifo) in collectors.lock().await.iter_mut().zip([&self.dirs.stdout, &self.dirs.stderr]) {
            let is_read = match stream.last() {
                Some(former) => former.wait_for_end(NEXT).await.is_none(),
                None => false,
            };
            if !is_read {
                stream.push(Collector::start(fifo, Output::Memory));
            }
        }
    }

    /// The log that was written so far.
    pub(crate) async fn log(&self) -> String {
        match &self.collectors {
            Some(collectors) => collectors.lock().await[0].iter().map(Collector::text).collect(),
            None => {
                let path = self.dirs.alloc_dir.join(format!("alloc/logs/{}.stdout.0", self.dirs.name));
                fs::read_to_string(path).unwrap_or_default()
            }
        }
    }

    fn witness(&self) -> PathBuf {
        self.dirs.alloc_dir.join("alloc/data").join(format!("started-{}", self.number))
    }

    /// Waits for the end of the streams of a task that is over, and checks from its files how often the task ran.
    pub(crate) async fn finish(&self, node: &Node) {
        if let Some(collectors) = &self.collectors {
            let collectors = collectors.lock().await;
            for stream in collectors.iter().flatten() {
                let must_end = node.model().must_end_its_log(self.number);
                if stream.wait_for_end(if must_end { END } else { NEXT }).await.is_none() && must_end {
                    node.model().violated(format!("no end of the log of task {}", self.number));
                }
            }
        }
        for fifo in [&self.dirs.stdout, &self.dirs.stderr] {
            // Opening the FIFO releases a reader that is still waiting for its first writer.
            let _ = fs::OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(fifo);
        }
        self.check(node).await;
    }

    /// Waits, for some time, until a running attempt has written the line of its start: it may not have had a processor
    /// yet.
    pub(crate) async fn started(&self, attempt: u32) {
        let line = attempt.to_string();
        let deadline = tokio::time::Instant::now() + patience() / 12;
        while !fs::read_to_string(self.witness()).is_ok_and(|text| text.lines().any(|own| own == line))
            && tokio::time::Instant::now() < deadline
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Checks the log and the starts with the model.
    pub(crate) async fn check(&self, node: &Node) {
        let log = self.log().await;
        node.model().log(self.number, &self.prefix(), &log);
        let started = fs::read_to_string(self.witness()).unwrap_or_default();
        node.model().witness(self.number, &started);
    }
}

/// The script that a task runs: it notes its start, writes its lines, and ends as its work says.
pub(crate) fn script(work: Work) -> String {
    let begin = format!("echo $ATTEMPT >> /alloc/data/started-$TASK; trap 'exit {STOPPED}' TERM; trap '' USR1; i=0");
    let line = "echo \"tick $TASK $ATTEMPT $i\"; i=$((i+1))";
    match work {
        Work::Service => format!("{begin}; while :; do {line}; sleep 0.1; done"),
        Work::Batch { code, lines, pause_ms: 0 } => {
            format!("{begin}; while [ $i -lt {lines} ]; do {line}; done; exit {code}")
        }
        Work::Batch { code, lines, pause_ms } => {
            let pause = f64::from(pause_ms) / 1000.0;
            format!("{begin}; while [ $i -lt {lines} ]; do sleep {pause}; {line}; done; exit {code}")
        }
    }
}
