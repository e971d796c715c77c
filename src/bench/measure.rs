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
/// Fails when this driver's spec can't be read, or the benchmark's own files can't be used. A subject that fails is
/// left out from then on and listed in the results.
pub async fn run(plan: &Plan, workspace: &Workspace) -> Result<Results, BenchError> {
    let mut machine = Machine::describe();
    let allocs = workspace.allocs();
    fs::create_dir_all(&allocs).map_err(file(&allocs))?;
    let setup = Setup::new(plan, workspace).await?;
    let spec_hash = setup.spec_hash();
    let bench = Bench { plan, workspace, allocs, setup };
    let mut samples = Samples::default();
    let mut subjects = Vec::new();
    for subject in &plan.paths {
        match bench.setup.open(subject).await {
            Ok(subject) => subjects.push(Arc::new(subject)),
            Err(error) => samples.leave_out(&subject.name, &error),
        }
    }
    let outcome = bench.measure_all(&mut subjects, &mut samples).await;
    for subject in subjects {
        if let Ok(subject) = Arc::try_unwrap(subject) {
            subject.close().await;
        }
    }
    outcome?;
    machine.rate_noise(samples.work);
    machine.programs = machine::programs().await;
    let names = samples.names;
    let rows = summary::rows(&samples.main, &names);
    let first = names.first().cloned().unwrap_or_default();
    let mut series = summary::samples(&samples.main, &names);
    series.extend(summary::samples(&samples.details, &names));
    Ok(Results {
        version: 1,
        at: std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs()),
        machine,
        plan: plan.clone(),
        spec_hash,
        left_out: samples.left_out,
        definitions: METRICS.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect(),
        ratios: summary::ratios(&rows, &first),
        rows,
        details: summary::rows(&samples.details, &names),
        throughput: samples.throughput,
        memory: samples.memory,
        samples: series,
    })
}

/// The samples and figures that were measured so far.
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
    fn leave_out(&mut self, subject: &str, error: &BenchError) {
        self.left_out.insert(subject.to_owned(), crate::error_chain(error));
    }

    fn is_left_out(&self, subject: &Subject) -> bool {
        self.left_out.contains_key(&subject.name)
    }

    /// Adds the samples of one task.
    fn add(&mut self, lifecycle: Lifecycle, subject: usize, mode: Mode, concurrency: usize) {
        let key = |metric: String| Key { subject, mode, concurrency, metric };
        for (metric, value) in lifecycle.main {
            self.main.entry(key(metric.to_owned())).or_default().push(value);
        }
        for (metric, value) in lifecycle.details {
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
    async fn measure_all(&self, subjects: &mut Vec<Arc<Subject>>, samples: &mut Samples) -> Result<(), BenchError> {
        // A first round that is not measured pulls images, fills caches and pools, and finds the subjects that don't
        // work.
        let mut working = Vec::new();
        for subject in subjects.drain(..) {
            let mut outcome: Result<(), BenchError> = Ok(());
            for sequence in &self.plan.sequences {
                outcome = match Job::new(&self.allocs, sequence) {
                    Ok(job) => run_lifecycle(&subject, job, sequence).await.map(drop),
                    Err(error) => Err(error),
                };
                if outcome.is_err() {
                    break;
                }
            }
            match outcome {
                Ok(()) => working.push(subject),
                Err(error) => {
                    samples.leave_out(&subject.name, &error);
                    if let Ok(subject) = Arc::try_unwrap(subject) {
                        subject.close().await;
                    }
                }
            }
        }
        if let Some(index) = working.iter().position(|subject| matches!(subject.backend, Backend::Floor { .. }))
            && let Some(problem) = self.confinement_difference(&working[index]).await?
        {
            samples.left_out.insert(working.remove(index).name.clone(), problem);
        }
        *subjects = working;
        samples.names = subjects.iter().map(|subject| subject.name.clone()).collect();
        tokio::time::sleep(BACKGROUND_DELAY * 4).await;
        for mode in &self.plan.modes {
            for sequence in &self.plan.sequences {
                self.measure_one_at_a_time(subjects, *mode, sequence, samples).await?;
            }
        }
        for concurrency in &self.plan.concurrency {
            self.measure_concurrently(subjects, *concurrency, samples).await?;
        }
        if self.plan.idle_tasks > 0 {
            for subject in subjects.iter().filter(|subject| subject.has_daemons()) {
                if samples.is_left_out(subject) {
                    continue;
                }
                let mut jobs = Vec::new();
                match self.measure_idle_memory(subject, &mut jobs).await {
                    Ok(memory) => samples.memory.push(memory),
                    Err(error) => {
                        samples.leave_out(&subject.name, &error);
                        for job in jobs {
                            abandon(subject, job).await;
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
        let mut confinements = Vec::new();
        for subject in [&runc, floor] {
            let job = Job::new(&self.allocs, &UNTIL_STOPPED)?;
            let confinement_of_task = async {
                with_timeout(&subject.name, "start the task", subject.start(&job)).await?;
                wait_until_stoppable(subject, &job).await?;
                let pid = with_timeout(&subject.name, "report the pid of its task", subject.pid(&job)).await?;
                Ok::<_, BenchError>(confinement::read_confinement(pid))
            };
            let confinement_of_task = confinement_of_task.await;
            abandon(subject, job).await;
            match confinement_of_task {
                Ok(confinement_of_task) => confinements.push(confinement_of_task),
                Err(error) => return Ok(Some(crate::error_chain(&error))),
            }
        }
        let differences = confinement::differences(&confinements[0], &confinements[1]);
        Ok((!differences.is_empty()).then(|| format!("not confined as runc's task: {}", differences.join("; "))))
    }

    /// Runs the tasks of a sequence one at a time, in blocks of one subject after another.
    async fn measure_one_at_a_time(
        &self,
        subjects: &[Arc<Subject>],
        mode: Mode,
        sequence: &[Step],
        samples: &mut Samples,
    ) -> Result<(), BenchError> {
        let mut done = 0;
        let mut round = 0;
        while done < self.plan.count {
            let block = self.plan.block.min(self.plan.count - done);
            for n in 0..subjects.len() {
                // Each round begins with another subject.
                let index = (n + round) % subjects.len();
                let subject = &subjects[index];
                for _ in 0..block {
                    if samples.is_left_out(subject) {
                        break;
                    }
                    let job = Job::new(&self.allocs, sequence)?;
                    if mode == Mode::Gaps {
                        tokio::time::sleep(Duration::from_millis(self.plan.gap_ms)).await;
                    }
                    match run_lifecycle(subject, job, sequence).await {
                        Ok(lifecycle) => samples.add(lifecycle, index, mode, 1),
                        Err(error) => samples.leave_out(&subject.name, &error),
                    }
                    (self.workspace.on_progress)(1);
                }
                tokio::time::sleep(BACKGROUND_DELAY).await;
                samples.work.push(machine::fixed_work());
            }
            done += block;
            round += 1;
        }
        Ok(())
    }

    /// Runs `concurrency` tasks at once, and measures the throughput.
    async fn measure_concurrently(
        &self,
        subjects: &[Arc<Subject>],
        concurrency: usize,
        samples: &mut Samples,
    ) -> Result<(), BenchError> {
        let Some(sequence) = self.plan.sequences.iter().find(|sequence| sequence.contains(&Step::Wait)) else {
            return Ok(());
        };
        // Each subject gets two turns, so that a slow phase of the machine affects more than one subject.
        let turn = self.plan.concurrent_count.div_ceil(2);
        let mut sums: Vec<(usize, u64, u64)> = vec![(0, 0, 0); subjects.len()];
        for _ in 0..2 {
            for (index, subject) in subjects.iter().enumerate() {
                if samples.is_left_out(subject) {
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
                    let (subject, jobs, sequence) = (subject.clone(), jobs.clone(), sequence.clone());
                    let tick = self.workspace.on_progress;
                    workers.spawn(async move {
                        let mut lifecycles = Vec::new();
                        loop {
                            let job = jobs.lock().pop();
                            let Some(job) = job else { return Ok::<_, BenchError>(lifecycles) };
                            lifecycles.push(run_lifecycle(&subject, job, &sequence).await?);
                            tick(1);
                        }
                    });
                }
                while let Some(worker) = workers.join_next().await {
                    let lifecycles = worker.unwrap_or_else(|error| {
                        Err(BenchError::Precondition { subject: subject.name.clone(), problem: error.to_string() })
                    });
                    match lifecycles {
                        Ok(lifecycles) => {
                            lifecycles
                                .into_iter()
                                .for_each(|lifecycle| samples.add(lifecycle, index, Mode::BackToBack, concurrency));
                        }
                        // The other workers complete their current task and begin no further one.
                        Err(error) => {
                            samples.leave_out(&subject.name, &error);
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
        for (subject, (tasks, nanoseconds, ticks)) in subjects.iter().zip(sums) {
            if samples.is_left_out(subject) {
                continue;
            }
            samples.throughput.push(Throughput {
                path: subject.name.clone(),
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
    async fn measure_idle_memory(&self, subject: &Subject, jobs: &mut Vec<Job>) -> Result<Memory, BenchError> {
        for _ in 0..self.plan.idle_tasks {
            jobs.push(Job::new(&self.allocs, &UNTIL_STOPPED)?);
            with_timeout(&subject.name, "start an idle task", subject.start(&jobs[jobs.len() - 1])).await?;
        }
        tokio::time::sleep(IDLE_DELAY).await;
        let mut all: BTreeMap<u32, String> = BTreeMap::new();
        let name = |pid: u32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned();
        let unlisted = |source| BenchError::File { path: "/proc".into(), source };
        for daemon in subject.daemons() {
            all.extend(descendants(daemon).map_err(unlisted)?.into_iter().chain([daemon]).map(|pid| (pid, name(pid))));
        }
        if let Backend::Containerd { .. } = subject.backend {
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
            with_timeout(&subject.name, "stop an idle task", subject.stop(job)).await?;
            with_timeout(&subject.name, "remove an idle task", subject.destroy(job)).await?;
            if let Some(job) = jobs.pop() {
                job.clear(STEP_TIMEOUT).await?;
            }
        }
        #[allow(clippy::cast_precision_loss, reason = "kibibytes")]
        let per_task_kib = (total_kib as f64 / tasks as f64 * 10.0).round() / 10.0;
        Ok(Memory { path: subject.name.clone(), tasks, total_kib, per_task_kib, parts })
    }
}
