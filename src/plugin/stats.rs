//! TaskStats: a task's resource usage in Nomad's units, sent at once and then at each interval until the task ends.

use std::{
    pin::Pin,
    sync::OnceLock,
    time::{Duration, SystemTime},
};

use futures_util::{Stream, stream};
use tokio::time::{Instant, sleep_until};
use tonic::Status;

use crate::{
    cgroup::{CpuUsage, MemoryUsage, Usage, cpu_percent},
    error_chain,
    ids::TaskId,
    pb::driver::{self as wire, cpu_usage::Fields as CpuField, memory_usage::Fields as MemoryField},
    task::{Compute, Engine, TaskMeter},
};

/// The interval if the agent asks for none. It is Nomad's own default.
const DEFAULT_INTERVAL: Duration = Duration::from_secs(1);
/// The shortest interval. Samples with an interval of zero would be taken without a pause.
const MIN_INTERVAL: Duration = Duration::from_millis(50);

/// The longest alignment step. Samples are taken at multiples of a quarter of their interval, but of no more than this,
/// counted from a moment that all streams share.
const ALIGNMENT_STEP_MAX: Duration = Duration::from_millis(250);

/// Returns usage samples until the task ends; a sample is taken when the agent can receive it. A task that is unknown
/// here gives an empty stream instead of an error: Nomad would log an error for each try. So does a task whose cgroup
/// can't be opened at the moment. Nomad asks again.
pub(crate) async fn samples(
    engine: Engine,
    id: TaskId,
    requested: Duration,
) -> impl Stream<Item = Result<wire::TaskStatsResponse, Status>> {
    let meter = match engine.meter(&id).await {
        Ok(meter) => meter,
        Err(error) => {
            tracing::debug!(task = id.0, error = error_chain(&error), "could not measure the usage of a task");
            None
        }
    };
    let sampler = meter.map(|meter| {
        let settings = engine.settings();
        Box::new(Sampler {
            ended: Box::pin(meter.ended()),
            id,
            meter,
            interval: settings
                .stats_interval
                .unwrap_or(if requested.is_zero() { DEFAULT_INTERVAL } else { requested })
                .max(MIN_INTERVAL),
            compute: settings.compute,
            due: Instant::now(),
            tried: None,
            before: None,
        })
    });
    // Each stream is one future, polled by its connection: a spawned task and a channel would cost as much as a sample.
    stream::unfold(sampler, |sampler| async {
        let mut sampler = sampler?;
        let stats = sampler.next().await?;
        Some((Ok(wire::TaskStatsResponse { stats: Some(stats) }), Some(sampler)))
    })
}

/// The state of one stream between its samples.
struct Sampler {
    id: TaskId,
    meter: TaskMeter,
    ended: Pin<Box<dyn Future<Output = ()> + Send>>,
    interval: Duration,
    compute: Compute,
    /// When the last sample was due.
    due: Instant,
    /// When the last sample was taken, or could not be taken.
    tried: Option<Instant>,
    before: Option<(Instant, CpuUsage)>,
}

impl Sampler {
    /// Waits until the next sample is due and takes it; `None` once the task has ended. A sample that can't be taken at
    /// the moment is left out.
    async fn next(&mut self) -> Option<wire::TaskStats> {
        let usage = loop {
            if let Some(then) = self.tried {
                self.due = align_up((self.due + self.interval).max(then), (self.interval / 4).min(ALIGNMENT_STEP_MAX));
                tokio::select! {
                    () = sleep_until(self.due) => {}
                    () = &mut self.ended => return None,
                }
            }
            self.tried = Some(Instant::now());
            match self.meter.usage() {
                Ok(usage) => break usage?,
                Err(error) => {
                    tracing::debug!(task = self.id.0, %error, "could not measure the usage of a task; the sample is left out");
                }
            }
        };
        let now = Instant::now();
        let between = |(then, cpu): (_, CpuUsage)| Percent::between(&cpu, &usage.cpu, now - then);
        let percent = self.before.map(between).unwrap_or_default();
        self.before = Some((now, usage.cpu));
        Some(wire::TaskStats {
            id: self.id.0.clone(),
            timestamp: Some(SystemTime::now().into()),
            agg_resource_usage: Some(wire::TaskResourceUsage {
                cpu: Some(cpu(&usage, percent, self.compute)),
                memory: Some(memory(&usage.memory)),
            }),
            resource_usage_by_pid: std::collections::HashMap::new(),
        })
    }
}

/// Returns the first multiple of `step` at or after `wanted`, so that the samples of many tasks are taken and sent
/// together, which costs a third of separate samples.
fn align_up(wanted: Instant, step: Duration) -> Instant {
    static BEGAN: OnceLock<Instant> = OnceLock::new();
    let began = *BEGAN.get_or_init(Instant::now);
    let steps = (wanted - began).as_micros().div_ceil(step.as_micros());
    began + step * u32::try_from(steps).unwrap_or(u32::MAX)
}

/// Processor usage in percent of one processor: 100 is a whole processor.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Percent {
    total: f64,
    user: f64,
    system: f64,
}

impl Percent {
    fn between(before: &CpuUsage, after: &CpuUsage, time: Duration) -> Self {
        let share =
            |before: Option<u64>, after: Option<u64>| cpu_percent(before.unwrap_or(0), after.unwrap_or(0), time);
        Self {
            total: share(Some(before.total_ns), Some(after.total_ns)),
            user: share(before.user_ns, after.user_ns),
            system: share(before.system_ns, after.system_ns),
        }
    }
}

fn cpu(usage: &Usage, percent: Percent, compute: Compute) -> wire::CpuUsage {
    let CpuUsage { user_ns, system_ns, throttled_periods, throttled_ns, .. } = usage.cpu;
    let measured = [
        (CpuField::Percent, true),
        (CpuField::TotalTicks, compute.mhz_per_core() > 0.0),
        (CpuField::UserMode, user_ns.is_some()),
        (CpuField::SystemMode, system_ns.is_some()),
        (CpuField::ThrottledPeriods, throttled_periods.is_some()),
        (CpuField::ThrottledTime, throttled_ns.is_some()),
    ];
    wire::CpuUsage {
        percent: percent.total,
        user_mode: percent.user,
        system_mode: percent.system,
        total_ticks: percent.total / 100.0 * compute.mhz_per_core(),
        throttled_periods: throttled_periods.unwrap_or(0),
        throttled_time: throttled_ns.unwrap_or(0),
        measured_fields: measured.iter().filter(|(_, known)| *known).map(|(field, _)| i32::from(*field)).collect(),
    }
}

fn memory(usage: &MemoryUsage) -> wire::MemoryUsage {
    let measured = [
        (MemoryField::Rss, usage.rss),
        (MemoryField::Cache, usage.cache),
        (MemoryField::MaxUsage, usage.max_usage),
        (MemoryField::KernelUsage, usage.kernel),
        (MemoryField::KernelMaxUsage, usage.kernel_max),
        (MemoryField::Usage, usage.usage),
        (MemoryField::Swap, usage.swap),
    ];
    wire::MemoryUsage {
        rss: usage.rss.unwrap_or(0),
        cache: usage.cache.unwrap_or(0),
        max_usage: usage.max_usage.unwrap_or(0),
        kernel_usage: usage.kernel.unwrap_or(0),
        kernel_max_usage: usage.kernel_max.unwrap_or(0),
        usage: usage.usage.unwrap_or(0),
        swap: usage.swap.unwrap_or(0),
        measured_fields: measured
            .iter()
            .filter(|(_, value)| value.is_some())
            .map(|(field, _)| i32::from(*field))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spent(total_ns: u64) -> CpuUsage {
        CpuUsage { total_ns, user_ns: Some(total_ns / 2), ..Default::default() }
    }

    #[test]
    fn a_hundred_percent_is_one_core() {
        let second = Duration::from_secs(1);
        let percent = Percent::between(&spent(1_000_000_000), &spent(3_500_000_000), second);
        assert!((percent.total - 250.0).abs() < 1e-9 && (percent.user - 125.0).abs() < 1e-9, "{percent:?}");
        let nothing = Percent::between(&spent(5), &spent(3), Duration::ZERO);
        assert!(nothing.total.abs() < 1e-9, "no time has passed, and the counter was reset");
        let compute = Compute { total_mhz: 8000, cores: 4 };
        let wire = cpu(&Usage { cpu: spent(1), ..Default::default() }, percent, compute);
        assert!((wire.total_ticks - 5000.0).abs() < 1e-9, "{wire:?}");
        assert!(!wire.measured_fields.contains(&i32::from(CpuField::SystemMode)));
    }

    #[test]
    fn values_that_the_kernel_does_not_report_are_not_listed() {
        let usage = MemoryUsage { rss: Some(0), usage: Some(7), ..Default::default() };
        let wire = memory(&usage);
        assert_eq!(wire.measured_fields, [i32::from(MemoryField::Rss), i32::from(MemoryField::Usage)]);
    }
}
