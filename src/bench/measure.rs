//! Runs a plan: measures the subjects in turn, in blocks of tasks, so that other work of the machine affects all of
//! them alike.

use std::{collections::BTreeMap, fs, path::PathBuf, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::task::JoinSet;

use super::{
    BenchError, Machine, Mode, Plan, Results, Step, SubjectKind, SubjectPlan, Workspace, confinement, file,
    job::{Job, UNTIL_STOPPED},
    lifecycle::{Lifecycle, STEP_TIMEOUT, abandon, run_lifecycle, wait_until_stoppable, with_timeout},
    machine,
    setup::Setup,
    stamp::now,
    subject::{Backend, Subject},
    summary::{self, Key, METRICS, Measured, Memory, Throughput},
};
use crate::process::descendants;

/// The pause after a block of tasks, in which a subject can complete its work in the background.
const BACKGROUND_DELAY: Duration = Duration::from_millis(150);
/// The pause before the memory of idle tasks is counted, in which all work for their starts is completed.
const IDLE_DELAY: Duration = Duration::from_secs(3);

/// Carries out a plan.
///
/// # Errors
/// When this driver's spec can't be read, or the benchmark's own files can't be used. A subject that fails is left out
/// from then on and listed in the results.
pub async fn run(plan: &Plan, ground: &Workspace) -> Result<Results, BenchError> {
    let mut machine = Machine::look();
    let allocs = ground.allocs();
    fs::create_dir_all(&allocs).map_err(file(&allocs))?;
    let setup = Setup::new(plan, ground).await?;
    let spec_hash = setup.spec_hash();
    let bench = Bench { plan, workspace: ground, allocs, setup };
    let mut taken = Samples::default();
    let mut paths = Vec::new();
    for path in &plan.paths {
        match bench.setup.open(path).await {
            Ok(path) => paths.push(Arc::new(path)),
            Err(error) => taken.leave_out(&path.name, &error),
        }
    }
    let outcome = bench.measure_all(&mut paths, &mut taken).await;
    for path in paths {
        if let Ok(path) = Arc::try_unwrap(path) {
            path.close().await;
        }
    }
    outcome?;
    machine.rate_noise(taken.work);
    machine.programs = machine::programs().await;
    let names = taken.names;
    let rows = summary::rows(&taken.main, &names);
    let first = names.first().cloned().unwrap_or_default();
    let mut samples = summary::samples(&taken.main, &names);
    samples.extend(summary::samples(&taken.details, &names));
    Ok(Results {
        version: 1,
        at: std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs()),
        machine,
        plan: plan.clone(),
        spec_hash,
        left_out: taken.left_out,
        definitions: METRICS.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect(),
        ratios: summary::ratios(&rows, &first),
        rows,
        details: summary::rows(&taken.details, &names),
        throughput: taken.throughput,
        memory: taken.memory,
        samples,
    })
}

/// What has been measured so far.
#[derive(Default)]
struct Samples {
    /// The names of the subjects, by the index that keys of samples use.
    names: Vec<String>,
    left_out: BTreeMap<String, String>,
    main: Measured,
    details: Measured,
    throughput: Vec<Throughput>,
    memory: Vec<Memory>,
    /// The times of the fixed work that shows how quiet the machine was.
    work: Vec<u64>,
}

impl Samples {
    /// Leaves a subject out from now on, because of an error.
    fn leave_out(&mut self, path: &str, error: &BenchError) {
        self.left_out.insert(path.to_owned(), crate::error_chain(error));
    }

    fn is_left_out(&self, path: &Subject) -> bool {
        self.left_out.contains_key(&path.name)
    }

    /// Adds the samples of one task.
    fn note(&mut self, life: Lifecycle, path: usize, mode: Mode, concurrency: usize) {
        let key = |metric: String| Key { path, mode, concurrency, metric };
        for (metric, value) in life.main {
            self.main.entry(key(metric.to_owned())).or_default().push(value);
        }
        for (metric, value) in life.details {
            self.details.entry(key(metric)).or_default().push(value);
        }
    }
}

/// One run of a plan.
struct Bench<'a> {
    plan: &'a Plan,
    workspace: &'a Workspace,
    allocs: PathBuf,
    setup: Setup<'a>,
}

impl Bench<'_> {
    /// Measures everything, interleaved. A subject that fails once is left out from then on; its earlier samples stay.
    async fn measure_all(&self, paths: &mut Vec<Arc<Subject>>, taken: &mut Samples) -> Result<(), BenchError> {
        // A first round that is not measured pulls images, fills caches and pools, and finds the subjects that don't
        // work.
        let mut warm = Vec::new();
        for path in paths.drain(..) {
            let mut outcome: Result<(), BenchError> = Ok(());
            for sequence in &self.plan.sequences {
                outcome = match Job::new(&self.allocs, sequence) {
                    Ok(job) => run_lifecycle(&path, job, sequence).await.map(drop),
                    Err(error) => Err(error),
                };
                if outcome.is_err() {
                    break;
                }
            }
            match outcome {
                Ok(()) => warm.push(path),
                Err(error) => {
                    taken.leave_out(&path.name, &error);
                    if let Ok(path) = Arc::try_unwrap(path) {
                        path.close().await;
                    }
                }
            }
        }
        if let Some(index) = warm.iter().position(|path| matches!(path.backend, Backend::Floor { .. }))
            && let Some(problem) = self.confinement_difference(&warm[index]).await?
        {
            taken.left_out.insert(warm.remove(index).name.clone(), problem);
        }
        *paths = warm;
        taken.names = paths.iter().map(|path| path.name.clone()).collect();
        tokio::time::sleep(BACKGROUND_DELAY * 4).await;
        for mode in &self.plan.modes {
            for sequence in &self.plan.sequences {
                self.measure_one_at_a_time(paths, *mode, sequence, taken).await?;
            }
        }
        for concurrency in &self.plan.concurrency {
            self.measure_concurrently(paths, *concurrency, taken).await?;
        }
        if self.plan.idle_tasks > 0 {
            for path in paths.iter().filter(|path| path.has_daemons()) {
                if taken.is_left_out(path) {
                    continue;
                }
                let mut jobs = Vec::new();
                match self.measure_idle_memory(path, &mut jobs).await {
                    Ok(memory) => taken.memory.push(memory),
                    Err(error) => {
                        taken.leave_out(&path.name, &error);
                        for job in jobs {
                            abandon(path, job).await;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Returns how the confinement of the floor's task differs from the confinement of runc's task, or why that is not
    /// known; `None` if it doesn't differ. A floor that confines its task less would be no fair lower bound.
    async fn confinement_difference(&self, floor: &Subject) -> Result<Option<String>, BenchError> {
        let runc = match self.setup.open(&SubjectPlan::new("confinement", SubjectKind::Runc)).await {
            Ok(runc) => runc,
            Err(error) => return Ok(Some(format!("it can't be compared with runc: {}", crate::error_chain(&error)))),
        };
        let mut portraits = Vec::new();
        for path in [&runc, floor] {
            let job = Job::new(&self.allocs, &UNTIL_STOPPED)?;
            let portrait = async {
                with_timeout(&path.name, "start", path.start(&job)).await?;
                wait_until_stoppable(path, &job).await?;
                let pid = with_timeout(&path.name, "report the pid of its task", path.pid(&job)).await?;
                Ok::<_, BenchError>(confinement::read_confinement(pid))
            };
            let portrait = portrait.await;
            abandon(path, job).await;
            match portrait {
                Ok(portrait) => portraits.push(portrait),
                Err(error) => return Ok(Some(crate::error_chain(&error))),
            }
        }
        let differences = confinement::differences(&portraits[0], &portraits[1]);
        Ok((!differences.is_empty()).then(|| format!("not confined as runc's task: {}", differences.join("; "))))
    }

    /// Runs the tasks of a sequence one at a time, in blocks of one subject after another.
    async fn measure_one_at_a_time(
        &self,
        paths: &[Arc<Subject>],
        mode: Mode,
        sequence: &[Step],
        taken: &mut Samples,
    ) -> Result<(), BenchError> {
        let mut done = 0;
        let mut round = 0;
        while done < self.plan.count {
            let block = self.plan.block.min(self.plan.count - done);
            for n in 0..paths.len() {
                // Each round begins with another subject.
                let index = (n + round) % paths.len();
                let path = &paths[index];
                for _ in 0..block {
                    if taken.is_left_out(path) {
                        break;
                    }
                    let job = Job::new(&self.allocs, sequence)?;
                    if mode == Mode::Gaps {
                        tokio::time::sleep(Duration::from_millis(self.plan.gap_ms)).await;
                    }
                    match run_lifecycle(path, job, sequence).await {
                        Ok(life) => taken.note(life, index, mode, 1),
                        Err(error) => taken.leave_out(&path.name, &error),
                    }
                    (self.workspace.on_progress)(1);
                }
                tokio::time::sleep(BACKGROUND_DELAY).await;
                taken.work.push(machine::fixed_work());
            }
            done += block;
            round += 1;
        }
        Ok(())
    }

    /// Runs `concurrency` tasks at once, and measures the throughput.
    async fn measure_concurrently(
        &self,
        paths: &[Arc<Subject>],
        concurrency: usize,
        taken: &mut Samples,
    ) -> Result<(), BenchError> {
        let Some(sequence) = self.plan.sequences.iter().find(|sequence| sequence.contains(&Step::Wait)) else {
            return Ok(());
        };
        // Each subject gets two turns, so that a slow phase of the machine affects more than one subject.
        let turn = self.plan.concurrent_count.div_ceil(2);
        let mut sums: Vec<(usize, u64, u64)> = vec![(0, 0, 0); paths.len()];
        for _ in 0..2 {
            for (index, path) in paths.iter().enumerate() {
                if taken.is_left_out(path) {
                    continue;
                }
                let mut jobs = Vec::new();
                for _ in 0..turn {
                    jobs.push(Job::new(&self.allocs, sequence)?);
                }
                let jobs = Arc::new(Mutex::new(jobs));
                let (began, ticks) = (now(), machine::cpu_ticks());
                let mut workers = JoinSet::new();
                for _ in 0..concurrency {
                    let (path, jobs, sequence) = (path.clone(), jobs.clone(), sequence.clone());
                    let tick = self.workspace.on_progress;
                    workers.spawn(async move {
                        let mut lives = Vec::new();
                        loop {
                            let job = jobs.lock().pop();
                            let Some(job) = job else { return Ok::<_, BenchError>(lives) };
                            lives.push(run_lifecycle(&path, job, &sequence).await?);
                            tick(1);
                        }
                    });
                }
                while let Some(worker) = workers.join_next().await {
                    let lives = worker.unwrap_or_else(|error| {
                        Err(BenchError::Precondition { path: path.name.clone(), problem: error.to_string() })
                    });
                    match lives {
                        Ok(lives) => {
                            lives.into_iter().for_each(|life| taken.note(life, index, Mode::BackToBack, concurrency));
                        }
                        // The other workers complete their current task and begin no further one.
                        Err(error) => {
                            taken.leave_out(&path.name, &error);
                            jobs.lock().clear();
                        }
                    }
                }
                let sum = &mut sums[index];
                sum.1 += now() - began;
                // Work in the background counts as well: it uses the processor for these tasks.
                tokio::time::sleep(BACKGROUND_DELAY * 4).await;
                *sum = (sum.0 + turn, sum.1, sum.2 + machine::cpu_ticks() - ticks);
            }
        }
        #[allow(clippy::cast_precision_loss, reason = "counts of tasks, ticks and nanoseconds of a run")]
        for (path, (tasks, nanoseconds, ticks)) in paths.iter().zip(sums) {
            if taken.is_left_out(path) {
                continue;
            }
            taken.throughput.push(Throughput {
                path: path.name.clone(),
                concurrency,
                tasks,
                per_second: (tasks as f64 / (nanoseconds as f64 / 1e9) * 10.0).round() / 10.0,
                // USER_HZ is 100 on every Linux (time(7)).
                cpu_ms_per_task: (ticks as f64 * 10.0 / tasks as f64 * 10.0).round() / 10.0,
            });
        }
        Ok(())
    }

    /// Starts idle tasks, and counts the memory of all processes that a subject runs for them.
    async fn measure_idle_memory(&self, path: &Subject, jobs: &mut Vec<Job>) -> Result<Memory, BenchError> {
        for _ in 0..self.plan.idle_tasks {
            jobs.push(Job::new(&self.allocs, &UNTIL_STOPPED)?);
            with_timeout(&path.name, "start an idle task", path.start(&jobs[jobs.len() - 1])).await?;
        }
        tokio::time::sleep(IDLE_DELAY).await;
        let mut all: BTreeMap<u32, String> = BTreeMap::new();
        let name = |pid: u32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned();
        let unlisted = |source| BenchError::File { path: "/proc".into(), source };
        for daemon in path.daemons() {
            all.extend(descendants(daemon).map_err(unlisted)?.into_iter().chain([daemon]).map(|pid| (pid, name(pid))));
        }
        if let Backend::Containerd { .. } = path.backend {
            // The daemon itself, which another process may have started, and the shims that it has started for these
            // tasks.
            let daemon = tokio::net::UnixStream::connect(&self.workspace.address).await;
            let daemon = daemon.and_then(|stream| stream.peer_cred()).ok().and_then(|peer| peer.pid());
            all.extend(daemon.map(|pid| (pid.cast_unsigned(), name(pid.cast_unsigned()))));
            for job in jobs.iter() {
                all.extend(machine::processes(&format!("-id {}", job.id)).map_err(unlisted)?);
            }
        }
        // The tasks' own processes are the same for every subject, so they are not counted.
        all.retain(|_, name| name != "stamp");
        let mut parts: BTreeMap<String, (usize, u64)> = BTreeMap::new();
        for (pid, name) in all {
            let part = parts.entry(name).or_default();
            *part = (part.0 + 1, part.1 + machine::pss_kib(pid));
        }
        let total_kib = parts.values().map(|(_, kib)| kib).sum();
        let tasks = jobs.len();
        while let Some(job) = jobs.last() {
            with_timeout(&path.name, "stop an idle task", path.stop(job)).await?;
            with_timeout(&path.name, "remove an idle task", path.destroy(job)).await?;
            if let Some(job) = jobs.pop() {
                job.clear(STEP_TIMEOUT).await?;
            }
        }
        #[allow(clippy::cast_precision_loss, reason = "kibibytes")]
        let per_task_kib = (total_kib as f64 / tasks as f64 * 10.0).round() / 10.0;
        Ok(Memory { path: path.name.clone(), tasks, total_kib, per_task_kib, parts })
    }
}
