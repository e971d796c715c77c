//! This driver behind a plugin with a fault: this test program runs again as a plugin that forwards all calls but one
//! or two. A row that does not notice its fault tests nothing.

use std::{
    path::PathBuf,
    pin::Pin,
    process::ExitCode,
    time::{Duration, Instant},
};

use libtest_mimic::Failed;
use nomad_driver_shim::{
    host::{Plugin, PluginCommand},
    ids::random_hex,
    pb::{
        base::{
            ConfigSchemaRequest, ConfigSchemaResponse, PluginInfoRequest, PluginInfoResponse, SetConfigRequest,
            SetConfigResponse,
            base_plugin_server::{BasePlugin, BasePluginServer},
        },
        driver::{
            driver_server::{Driver, DriverServer},
            *,
        },
        goplugin::{
            Empty,
            grpc_controller_server::{GrpcController, GrpcControllerServer},
        },
    },
};
use tokio::sync::Notify;
use tokio_stream::{StreamExt as _, wrappers::UnixListenerStream};
use tonic::{Request, Response, Status, Streaming, transport::Server};

use crate::{
    report::Report,
    row::{Row, Verdict},
    support::{patience, program},
};

const SWITCH: &str = "CONFORMANCE_FAULT";

/// A fault, and the rows that must turn red because of it.
pub(crate) struct Fault {
    name: &'static str,
    /// Completes the sentence "A driver that …".
    pub says: &'static str,
    red: &'static [&'static str],
    /// Some rows that the fault does not affect.
    green: &'static [&'static str],
}

pub(crate) const FAULTS: &[Fault] = &[
    Fault {
        name: "sleeps",
        says: "sleeps before a start and after a stop",
        red: &["6.3.5", "001-test-redis", "B1", "B3", "B4"],
        green: &["6.1.1", "B20"],
    },
    Fault {
        name: "later",
        says: "answers StartTask and starts afterwards",
        red: &["6.3.7", "B1", "B2", "B10"],
        green: &["B18", "B26"],
    },
    Fault { name: "signal", says: "ignores kill_signal", red: &["6.3.3", "B6"], green: &["6.3.4", "B4", "B7"] },
    Fault { name: "oom", says: "lies about OOM", red: &["6.3.19 OOM", "B15"], green: &["6.3.1", "6.3.19"] },
    Fault { name: "exec", says: "hands resizes of a session to nobody", red: &["6.1.6", "B13"], green: &["6.1.5"] },
];

/// Returns the fault that this process must show if it was started as a faulty plugin.
pub(crate) fn wanted() -> Option<&'static Fault> {
    let name = std::env::var(SWITCH).ok()?;
    FAULTS.iter().find(|fault| fault.name == name)
}

impl Fault {
    /// Runs the rows that must turn red, and some rows that must stay green.
    pub(crate) fn is_noticed(&self, report: &Report) -> Result<(), Failed> {
        let env = vec![(SWITCH.to_owned(), self.name.to_owned())];
        let driver = PluginCommand { env, ..PluginCommand::new(std::env::current_exe()?) };
        let is_in = |row: &Row, ids: &[&str]| ids.contains(&row.id);
        let rows: Vec<Row> =
            crate::rows().into_iter().filter(|row| is_in(row, self.red) || is_in(row, self.green)).collect();
        assert_eq!(rows.len(), self.red.len() + self.green.len(), "a row that is named here is not there");
        let mut wrong = Vec::new();
        for row in &rows {
            match (row.run(Some(driver.clone())), is_in(row, self.red)) {
                (Verdict::Red(_), true) | (Verdict::Green, false) => {}
                (Verdict::Red(why), false) => wrong.push(format!("{} is red: {why}", row.name())),
                (_, _) => wrong.push(format!("{} noticed nothing", row.name())),
            }
        }
        if wrong.is_empty() {
            report.add_fault(self.says, self.red);
            return Ok(());
        }
        Err(Failed::from(wrong.join("\n")))
    }
}

/// Serves this process as a plugin with the fault.
pub(crate) fn serve(fault: &'static Fault) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let args = Vec::new();
        let inner = Plugin::launch(&PluginCommand { args, ..PluginCommand::new(program()) }).await.unwrap();
        let directory = std::env::var_os("PLUGIN_UNIX_SOCKET_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        let socket = directory.join(format!("plugin-{}", random_hex(6)));
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let faulty = Faulty { inner: inner.channel(), fault: fault.name };
        let leave = std::sync::Arc::new(Notify::new());
        let serving = Server::builder()
            .add_service(BasePluginServer::new(faulty.clone()))
            .add_service(DriverServer::new(faulty))
            .add_service(GrpcControllerServer::new(Controller(leave.clone())))
            .serve_with_incoming(UnixListenerStream::new(listener));
        #[allow(clippy::print_stdout, reason = "the handshake")]
        {
            println!("1|2|unix|{}|grpc|", socket.display());
        }
        tokio::select! {
            served = serving => served.unwrap(),
            () = leave.notified() => {}
        }
        inner.shut_down().await;
        let _ = std::fs::remove_file(socket);
    });
    ExitCode::SUCCESS
}

struct Controller(std::sync::Arc<Notify>);

#[tonic::async_trait]
impl GrpcController for Controller {
    async fn shutdown(&self, _: Request<Empty>) -> Result<Response<Empty>, Status> {
        self.0.notify_one();
        Ok(Response::new(Empty {}))
    }
}

#[derive(Clone)]
struct Faulty {
    inner: tonic::transport::Channel,
    fault: &'static str,
}

impl Faulty {
    fn driver(&self) -> driver_client::DriverClient<tonic::transport::Channel> {
        driver_client::DriverClient::new(self.inner.clone())
    }

    fn base(&self) -> nomad_driver_shim::pb::base::base_plugin_client::BasePluginClient<tonic::transport::Channel> {
        nomad_driver_shim::pb::base::base_plugin_client::BasePluginClient::new(self.inner.clone())
    }
}

/// Returns the five seconds for which the old driver sleeps, scaled with `patience()`.
fn long() -> Duration {
    patience() / 12
}

/// Writes the forwarding methods as `async_trait` would write them, since `async_trait` does not expand macros.
macro_rules! forward {
    ($client:ident: $($call:ident($request:ty) -> $answer:ty;)*) => {
        $(fn $call<'a, 'b>(
            &'a self,
            request: Request<$request>,
        ) -> Pin<Box<dyn Future<Output = Result<Response<$answer>, Status>> + Send + 'b>>
        where
            'a: 'b,
            Self: 'b,
        {
            let mut client = self.$client();
            Box::pin(async move { client.$call(request.into_inner()).await })
        })*
    };
}

#[tonic::async_trait]
impl BasePlugin for Faulty {
    forward! { base:
        plugin_info(PluginInfoRequest) -> PluginInfoResponse;
        config_schema(ConfigSchemaRequest) -> ConfigSchemaResponse;
        set_config(SetConfigRequest) -> SetConfigResponse;
    }
}

#[tonic::async_trait]
impl Driver for Faulty {
    type FingerprintStream = Streaming<FingerprintResponse>;
    type TaskStatsStream = Streaming<TaskStatsResponse>;
    type TaskEventsStream = Streaming<DriverTaskEvent>;
    type ExecTaskStreamingStream = Streaming<ExecTaskStreamingResponse>;

    forward! { driver:
        init(InitRequest) -> InitResponse;
        task_config_schema(TaskConfigSchemaRequest) -> TaskConfigSchemaResponse;
        capabilities(CapabilitiesRequest) -> CapabilitiesResponse;
        fingerprint(FingerprintRequest) -> Streaming<FingerprintResponse>;
        recover_task(RecoverTaskRequest) -> RecoverTaskResponse;
        destroy_task(DestroyTaskRequest) -> DestroyTaskResponse;
        inspect_task(InspectTaskRequest) -> InspectTaskResponse;
        task_stats(TaskStatsRequest) -> Streaming<TaskStatsResponse>;
        task_events(TaskEventsRequest) -> Streaming<DriverTaskEvent>;
        shutdown(ShutdownRequest) -> ShutdownResponse;
        signal_task(SignalTaskRequest) -> SignalTaskResponse;
        exec_task(ExecTaskRequest) -> ExecTaskResponse;
        create_network(CreateNetworkRequest) -> CreateNetworkResponse;
        destroy_network(DestroyNetworkRequest) -> DestroyNetworkResponse;
    }

    async fn start_task(&self, request: Request<StartTaskRequest>) -> Result<Response<StartTaskResponse>, Status> {
        let request = request.into_inner();
        match self.fault {
            "sleeps" => tokio::time::sleep(long()).await,
            "later" => {
                let config = request.task.clone();
                let mut driver = self.driver();
                tokio::spawn(async move {
                    tokio::time::sleep(long()).await;
                    driver.start_task(request).await
                });
                let handle = TaskHandle { version: 1, config, state: TaskState::Running.into(), ..Default::default() };
                return Ok(Response::new(StartTaskResponse { handle: Some(handle), ..Default::default() }));
            }
            _ => {}
        }
        self.driver().start_task(request).await
    }

    async fn stop_task(&self, request: Request<StopTaskRequest>) -> Result<Response<StopTaskResponse>, Status> {
        let mut request = request.into_inner();
        if self.fault == "signal" {
            request.signal.clear();
        }
        let timeout = request.timeout.and_then(|timeout| Duration::try_from(timeout).ok()).unwrap_or_default();
        let began = Instant::now();
        let answer = self.driver().stop_task(request).await;
        if self.fault == "sleeps" {
            tokio::time::sleep(timeout.max(long()).saturating_sub(began.elapsed())).await;
        }
        answer
    }

    async fn wait_task(&self, request: Request<WaitTaskRequest>) -> Result<Response<WaitTaskResponse>, Status> {
        let mut answer = self.driver().wait_task(request.into_inner()).await?;
        if let ("oom", Some(result)) = (self.fault, &mut answer.get_mut().result) {
            result.oom_killed = false;
        }
        Ok(answer)
    }

    async fn exec_task_streaming(
        &self,
        request: Request<Streaming<ExecTaskStreamingRequest>>,
    ) -> Result<Response<Streaming<ExecTaskStreamingResponse>>, Status> {
        let deaf = self.fault == "exec";
        let requests = request.into_inner().map_while(Result::ok).map(move |mut request| {
            if deaf {
                request.tty_size = None;
            }
            request
        });
        self.driver().exec_task_streaming(requests).await
    }
}
