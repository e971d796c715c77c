//! The driver service: decodes requests, passes them to the engine, and encodes the answers. Handlers that create or
//! remove something run as tasks of their own, so that they finish even if a dying agent drops the call.

use std::{collections::HashMap, path::Path, pin::Pin, time::Duration};

use tokio::sync::broadcast::error::RecvError;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Code, Request, Response, Status, Streaming};

use super::{
    convert, exec, fingerprint, identity, identity::task_id, options::TASK_OPTIONS, schema, service::DriverService,
    stats, status,
};
use crate::{
    ids::{AllocId, TaskId},
    pb::driver::{self as wire, driver_server::Driver},
    task::{
        Audience, Engine, Force, Inspection, LEGACY_HANDLE_VERSION, LegacyTask, TaskError, TaskHandle, signal_log_end,
    },
    text::{self, EXCERPT_MAX, MESSAGE_MAX},
};

/// The delay from `Init` to the first filling of the pool: some processes that get an `Init` live for only 12 ms.
const POOL_FILL_DELAY: Duration = Duration::from_secs(2);

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl DriverService {
    async fn start(&self, task: &wire::TaskConfig) -> Result<TaskHandle, Status> {
        identity::check_task(task).map_err(|error| status::from_config_error(&error))?;
        let request =
            convert::start_request(&self.settings()?, task).map_err(|error| status::from_config_error(&error))?;
        let engine = self.engine().await?;
        Box::pin(engine.start(request)).await.map_err(to_status)
    }

    /// Checks a request's task id, and opens the engine.
    async fn engine_and_id(&self, id: &str) -> Result<(Engine, TaskId), Status> {
        let id = task_id("task_id", id)?;
        Ok((self.engine().await?, id))
    }
}

/// Runs `body` to its end, even if the caller is dropped.
async fn run_detached<T: Send + 'static>(
    body: impl Future<Output = Result<T, Status>> + Send + 'static,
) -> Result<T, Status> {
    match tokio::spawn(body).await {
        Ok(outcome) => outcome,
        Err(join) => Err(status::new(Code::Internal, &format!("a request's handler did not finish: {join}"))),
    }
}

#[allow(clippy::needless_pass_by_value, reason = "map_err passes the error by value")]
fn to_status(error: TaskError) -> Status {
    status::from_task_error(&error)
}

fn unsupported(what: &str) -> Status {
    Status::unimplemented(format!("{what} is not supported by this driver"))
}

#[tonic::async_trait]
impl Driver for DriverService {
    type FingerprintStream = Answers<wire::FingerprintResponse>;
    type TaskStatsStream = Answers<wire::TaskStatsResponse>;
    type TaskEventsStream = Answers<wire::DriverTaskEvent>;
    type ExecTaskStreamingStream = Answers<wire::ExecTaskStreamingResponse>;

    async fn init(&self, _: Request<wire::InitRequest>) -> Result<Response<wire::InitResponse>, Status> {
        let this = self.clone();
        // An error here would make the agent kill the plugin. The fingerprint reports the error instead, and each call
        // tries again.
        if self.settings()?.enabled && this.engine().await.is_ok() {
            tokio::spawn(async move {
                tokio::time::sleep(POOL_FILL_DELAY).await;
                if let Ok(engine) = this.engine().await {
                    engine.fill_pools();
                }
            });
        }
        Ok(Response::new(wire::InitResponse {}))
    }

    async fn task_config_schema(
        &self,
        _: Request<wire::TaskConfigSchemaRequest>,
    ) -> Result<Response<wire::TaskConfigSchemaResponse>, Status> {
        Ok(Response::new(wire::TaskConfigSchemaResponse { spec: Some(schema::to_hclspec(TASK_OPTIONS)) }))
    }

    async fn capabilities(
        &self,
        _: Request<wire::CapabilitiesRequest>,
    ) -> Result<Response<wire::CapabilitiesResponse>, Status> {
        use wire::network_isolation_spec::NetworkIsolationMode as Mode;
        let capabilities = wire::DriverCapabilities {
            send_signals: true,
            exec: true,
            fs_isolation: wire::driver_capabilities::FsIsolation::Image.into(),
            network_isolation_modes: vec![Mode::Group.into(), Mode::Task.into()],
            disable_log_collection: self.settings()?.disable_log_collection,
            ..Default::default()
        };
        Ok(Response::new(wire::CapabilitiesResponse { capabilities: Some(capabilities) }))
    }

    async fn fingerprint(
        &self,
        _: Request<wire::FingerprintRequest>,
    ) -> Result<Response<Self::FingerprintStream>, Status> {
        let (send, receive) = tokio::sync::mpsc::channel(1);
        tokio::spawn(fingerprint::run(self.clone(), send));
        Ok(Response::new(Box::pin(ReceiverStream::new(receive))))
    }

    async fn recover_task(
        &self,
        request: Request<wire::RecoverTaskRequest>,
    ) -> Result<Response<wire::RecoverTaskResponse>, Status> {
        let request = request.into_inner();
        // Nomad leaves `task_id` empty; the id is in the handle's configuration.
        let handle = request.handle.ok_or_else(|| Status::invalid_argument("no handle to recover from"))?;
        let config = handle.config.unwrap_or_default();
        let id = task_id("handle.config.id", &config.id)?;
        let unrecoverable = |problem: String| to_status(TaskError::Unrecoverable { id: id.clone(), problem });
        if handle.version == LEGACY_HANDLE_VERSION {
            // The container's name contains the allocation's id and the task's name.
            for (field, text) in [("handle.config.alloc_id", &config.alloc_id), ("handle.config.name", &config.name)] {
                if text.is_empty() {
                    return Err(status::new(Code::InvalidArgument, &format!("request: {field} is empty")));
                }
            }
            let alloc_id = AllocId::new(&config.alloc_id)
                .map_err(|error| status::new(Code::InvalidArgument, &format!("request: handle.config: {error}")))?;
            let legacy = LegacyTask::of(&handle.driver_state, &alloc_id, &config.name);
            let engine = self.engine().await?;
            let ended = run_detached(async move { Ok(engine.end_legacy(legacy).await) }).await?;
            return Err(unrecoverable(match ended {
                Ok(ended) if ended.is_empty() => {
                    "it was started by nomad-driver-containerd, and its container is gone".to_owned()
                }
                Ok(ended) => format!(
                    "it was started by nomad-driver-containerd; its container {} was killed, so that the task does not run twice",
                    ended.join(", ")
                ),
                Err(error) => format!(
                    "it was started by nomad-driver-containerd; its container could not be killed and may still run: {}",
                    crate::error_chain(&error)
                ),
            }));
        }
        if handle.version != TaskHandle::VERSION {
            let problem =
                format!("its handle has version {}, but this driver uses {}", handle.version, TaskHandle::VERSION);
            return Err(unrecoverable(problem));
        }
        let handle = TaskHandle::decode(&handle.driver_state)
            .map_err(|error| unrecoverable(format!("its handle can't be decoded: {error}")))?;
        let engine = self.engine().await?;
        let id = id.clone();
        run_detached(async move { engine.recover(&id, &handle).await.map_err(to_status) }).await?;
        Ok(Response::new(wire::RecoverTaskResponse {}))
    }

    async fn start_task(
        &self,
        request: Request<wire::StartTaskRequest>,
    ) -> Result<Response<wire::StartTaskResponse>, Status> {
        let task = request.into_inner().task.ok_or_else(|| Status::invalid_argument("no task to start"))?;
        let this = self.clone();
        let handle = run_detached({
            let task = task.clone();
            async move {
                let outcome = Box::pin(this.start(&task)).await;
                if outcome.is_err() {
                    let paths = [&task.alloc_dir, &task.stdout_path, &task.stderr_path].map(Path::new);
                    signal_log_end(paths[0], paths[1], paths[2]);
                }
                outcome
            }
        });
        let handle = handle.await?;
        Ok(Response::new(wire::StartTaskResponse {
            handle: Some(wire::TaskHandle {
                version: TaskHandle::VERSION,
                config: Some(task),
                state: wire::TaskState::Running.into(),
                driver_state: handle.encode(),
            }),
            ..Default::default()
        }))
    }

    async fn wait_task(
        &self,
        request: Request<wire::WaitTaskRequest>,
    ) -> Result<Response<wire::WaitTaskResponse>, Status> {
        let (engine, id) = self.engine_and_id(&request.into_inner().task_id).await?;
        let exit = engine.wait(&id).await.map_err(to_status)?;
        Ok(Response::new(wire::WaitTaskResponse {
            result: Some(convert::exit_result(&exit)),
            err: text::sanitize(&convert::exit_message(&exit), MESSAGE_MAX),
        }))
    }

    async fn stop_task(
        &self,
        request: Request<wire::StopTaskRequest>,
    ) -> Result<Response<wire::StopTaskResponse>, Status> {
        let request = request.into_inner();
        let (engine, id) = self.engine_and_id(&request.task_id).await?;
        let timeout = convert::duration(request.timeout);
        run_detached(async move { engine.stop(&id, timeout, &request.signal).await.map_err(to_status) }).await?;
        Ok(Response::new(wire::StopTaskResponse {}))
    }

    async fn destroy_task(
        &self,
        request: Request<wire::DestroyTaskRequest>,
    ) -> Result<Response<wire::DestroyTaskResponse>, Status> {
        let request = request.into_inner();
        let (engine, id) = self.engine_and_id(&request.task_id).await?;
        let force = if request.force { Force::Yes } else { Force::No };
        run_detached(async move { engine.destroy(&id, force).await.map_err(to_status) }).await?;
        Ok(Response::new(wire::DestroyTaskResponse {}))
    }

    async fn inspect_task(
        &self,
        request: Request<wire::InspectTaskRequest>,
    ) -> Result<Response<wire::InspectTaskResponse>, Status> {
        let (engine, id) = self.engine_and_id(&request.into_inner().task_id).await?;
        let inspection = engine.inspect(&id).await.map_err(to_status)?;
        let exit = inspection.exit.as_ref();
        let state = if exit.is_some() { wire::TaskState::Exited } else { wire::TaskState::Running };
        // Nomad's client dereferences the result and both times without checking for nil.
        let task = wire::TaskStatus {
            id: id.0,
            name: inspection.name.clone(),
            state: state.into(),
            started_at: Some(convert::timestamp(Some(inspection.started_at))),
            completed_at: Some(convert::timestamp(exit.map(|exit| convert::from_millis(exit.at)))),
            result: Some(exit.map(convert::exit_result).unwrap_or_default()),
        };
        Ok(Response::new(wire::InspectTaskResponse {
            task: Some(task),
            driver: Some(wire::TaskDriverStatus { attributes: attributes(&inspection) }),
            network_override: None,
        }))
    }

    async fn task_stats(
        &self,
        request: Request<wire::TaskStatsRequest>,
    ) -> Result<Response<Self::TaskStatsStream>, Status> {
        let request = request.into_inner();
        let (engine, id) = self.engine_and_id(&request.task_id).await?;
        let samples = stats::samples(engine, id, convert::duration(request.collection_interval)).await;
        Ok(Response::new(Box::pin(samples)))
    }

    async fn task_events(
        &self,
        _: Request<wire::TaskEventsRequest>,
    ) -> Result<Response<Self::TaskEventsStream>, Status> {
        let mut events = self.subscribe();
        let (send, receive) = tokio::sync::mpsc::channel(16);
        tokio::spawn(async move {
            loop {
                let event = tokio::select! {
                    event = events.recv() => event,
                    () = send.closed() => return,
                };
                match event {
                    Ok(event) if event.audience == Audience::HostOnly => {}
                    Ok(event) => {
                        if send.send(Ok(convert::event(event))).await.is_err() {
                            return;
                        }
                    }
                    Err(RecvError::Lagged(missed)) => {
                        tracing::warn!(missed, "the agent reads task events too slowly and has missed some");
                    }
                    Err(RecvError::Closed) => return,
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receive))))
    }

    async fn shutdown(&self, _: Request<wire::ShutdownRequest>) -> Result<Response<wire::ShutdownResponse>, Status> {
        // Records are written at each change, so there is nothing to flush, and tasks keep running.
        Ok(Response::new(wire::ShutdownResponse {}))
    }

    async fn signal_task(
        &self,
        request: Request<wire::SignalTaskRequest>,
    ) -> Result<Response<wire::SignalTaskResponse>, Status> {
        let request = request.into_inner();
        let (engine, id) = self.engine_and_id(&request.task_id).await?;
        engine.signal(&id, &request.signal).await.map_err(to_status)?;
        Ok(Response::new(wire::SignalTaskResponse {}))
    }

    async fn exec_task(
        &self,
        request: Request<wire::ExecTaskRequest>,
    ) -> Result<Response<wire::ExecTaskResponse>, Status> {
        let request = request.into_inner();
        let (engine, id) = self.engine_and_id(&request.task_id).await?;
        Box::pin(exec::run(&engine, id, request)).await.map(Response::new)
    }

    async fn exec_task_streaming(
        &self,
        request: Request<Streaming<wire::ExecTaskStreamingRequest>>,
    ) -> Result<Response<Self::ExecTaskStreamingStream>, Status> {
        let engine = self.engine().await?;
        let answers = Box::pin(exec::stream(&engine, request.into_inner())).await?;
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn create_network(
        &self,
        _: Request<wire::CreateNetworkRequest>,
    ) -> Result<Response<wire::CreateNetworkResponse>, Status> {
        Err(unsupported("CreateNetwork"))
    }

    async fn destroy_network(
        &self,
        _: Request<wire::DestroyNetworkRequest>,
    ) -> Result<Response<wire::DestroyNetworkResponse>, Status> {
        Err(unsupported("DestroyNetwork"))
    }
}

/// Returns the attributes that `InspectTask` adds for people, and for `run --time`.
fn attributes(inspection: &Inspection) -> HashMap<String, String> {
    let Inspection { record, phases, pid, .. } = inspection;
    let mut attributes = HashMap::from([
        ("container_id".to_owned(), record.intent.container_id.to_string()),
        ("image".to_owned(), text::sanitize(&record.intent.image, EXCERPT_MAX)),
        ("runtime".to_owned(), record.intent.runtime.clone()),
        ("cgroup".to_owned(), record.intent.cgroup.as_str().to_owned()),
        ("phase.shim_pooled".to_owned(), phases.pooled.to_string()),
    ]);
    attributes.extend(pid.map(|pid| ("pid".to_owned(), pid.to_string())));
    attributes.extend(phases.by_name().into_iter().filter_map(|(name, duration)| {
        Some((format!("phase.{name}_ms"), format!("{:.3}", duration?.as_secs_f64() * 1000.0)))
    }));
    attributes
}
