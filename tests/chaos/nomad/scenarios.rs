//! One fixed scenario for each temporary failure of the host. Services are registered while the failure lasts, the
//! driver's errors make Nomad try again, and the services run when the failure is over.

use std::{future::Future, ops::Range, path::PathBuf, sync::Arc, time::Duration};

use super::world::World;
use crate::{
    ground::Journal as _,
    observe,
    plan::Mode,
    step::{Call, Fault, OciRuntime, Place, TaskNumber, Work},
    world::{Outcome, Setting},
};

/// A failure that lasts for some seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failure {
    /// Each runtime that creates a container is killed.
    RuntimeKilled,
    /// No space is left on the disk of a directory.
    Full(Place),
    /// The plugin can open no further descriptor (EMFILE).
    NoDescriptors,
    /// The plugin and its children can start no process (EAGAIN).
    NoProcesses,
    /// The runtime takes longer to create a container than the shim is given for it, which is a minute.
    SlowRuntime,
}

impl Failure {
    /// The failures that are over soon.
    pub(super) const QUICK: [Self; 5] =
        [Self::RuntimeKilled, Self::Full(Place::Run), Self::Full(Place::State), Self::NoDescriptors, Self::NoProcesses];
    /// All failures.
    pub(super) const ALL: [Self; 6] = {
        let [first, second, third, fourth, fifth] = Self::QUICK;
        [first, second, third, fourth, fifth, Self::SlowRuntime]
    };
}

/// More services than there are idle shims and prepared root file systems (`shim.pool`).
const SERVICES: usize = 4;
/// Long enough for Nomad to try more than once, with its delay of a second.
const LASTS_MS: u64 = 5000;
/// Longer than the driver waits for the creation of a container.
const SLOW_MS: u64 = 64_000;
/// Interval between two searches for a runtime to kill.
const LOOK: Duration = Duration::from_millis(2);

/// Plays the scenarios on one node, one after the other.
pub(super) async fn play(binary: PathBuf, failures: &[Failure]) -> Outcome {
    let world = World::start(binary, Setting { mode: Mode::Base, plant: None, ignored: &[] }).await;
    let watches = world.watch();
    for (failure, index) in failures.iter().zip(0..) {
        world.record.note(&format!("step {index}: services are started beside {failure:?}"));
        scenario(&world, *failure, index).await;
        if !world.is_right() {
            break;
        }
    }
    if world.is_right() {
        world.clear().await;
    }
    watches.iter().for_each(tokio::task::JoinHandle::abort);
    world.finish().await
}

async fn scenario(world: &Arc<World>, failure: Failure, index: TaskNumber) {
    let services = index * SERVICES..(index + 1) * SERVICES;
    begin(world, failure, services.clone()).await;
    for number in services.clone() {
        world.run(number, Work::Service, OciRuntime::Crun).await;
    }
    world.ground.outlast().await;
    world.settle().await;
    let starts: Vec<(u32, u32)> = services.map(|number| world.record.model().starts(number)).collect();
    let refused: u32 = starts.iter().map(|(refused, _)| refused).sum();
    world.record.note(&format!("{failure:?}: {refused} failed starts of {SERVICES} services, which then run"));
    let mut model = world.record.model();
    // A start needs little space in the state directory, so all starts may succeed while it is full.
    if refused == 0 && failure != Failure::Full(Place::State) {
        model.violated(format!("no start has failed beside {failure:?}: the scenario has shown nothing"));
    }
    if starts.iter().any(|(_, started)| *started != 1) {
        model.violated(format!("beside {failure:?} services have not been started once each: {starts:?}"));
    }
}

/// Begins the failure, which ends by itself.
async fn begin(world: &Arc<World>, failure: Failure, services: Range<TaskNumber>) {
    let ms = LASTS_MS;
    match failure {
        Failure::Full(place) => world.ground.strike(Fault::Full { place, ms }).await,
        Failure::NoDescriptors => world.ground.strike(Fault::FewDescriptors { spare: 0, ms }).await,
        Failure::NoProcesses => world.ground.strike(Fault::NoProcesses { ms }).await,
        Failure::RuntimeKilled => {
            // The call takes long enough for the runtime to be found.
            world.ground.site.wrappers.stretch(Call::Create, 300, 0);
            let held = world.clone();
            lasting(world, async move {
                let over = tokio::time::Instant::now() + Duration::from_millis(ms);
                while tokio::time::Instant::now() < over {
                    kill_creating(&held);
                    tokio::time::sleep(LOOK).await;
                }
                held.ground.site.wrappers.stretch(Call::Create, 0, 0);
            });
        }
        Failure::SlowRuntime => {
            world.ground.site.wrappers.stretch(Call::Create, SLOW_MS, 0);
            let held = world.clone();
            lasting(world, async move {
                let over = tokio::time::Instant::now() + Duration::from_millis(SLOW_MS);
                while services.clone().all(|number| held.record.model().starts(number).0 == 0)
                    && tokio::time::Instant::now() < over
                {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                held.ground.site.wrappers.stretch(Call::Create, 0, 0);
            });
        }
    }
}

/// Runs a failure that this test causes itself.
fn lasting(world: &Arc<World>, failure: impl Future<Output = ()> + Send + 'static) {
    world.record.fault_begins();
    let record = world.record.clone();
    world.ground.lasting_task(async move {
        failure.await;
        record.fault_ends();
    });
}

fn kill_creating(world: &World) {
    let (dir, namespace) = (&world.record.dir, &world.record.namespace);
    let runtimes = observe::victims(crate::step::Target::Runtime, dir, namespace, 0);
    let creating = runtimes.into_iter().filter(|victim| observe::calls(victim.pid, Call::Create));
    for process in creating.filter_map(|victim| nomad_driver_shim::process::PidFd::open(victim.pid).ok()) {
        process.signal(libc::SIGKILL);
    }
}
