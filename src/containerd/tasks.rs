//! containerd's own calls for containers and tasks. The driver never starts tasks this way. The benchmark does, for
//! comparison, and the driver ends containers of nomad-driver-containerd this way.

use super::{Client, ContainerdError};
use crate::pb::{
    services::{
        containers::v1::{
            Container, CreateContainerRequest, DeleteContainerRequest, GetContainerRequest, container::Runtime,
            containers_client::ContainersClient,
        },
        tasks::v1::{
            CreateTaskRequest, DeleteTaskRequest, KillRequest, StartRequest, WaitRequest, tasks_client::TasksClient,
        },
    },
    types::Mount,
};

impl Client {
    fn tasks(&self) -> TasksClient<tonic::transport::Channel> {
        TasksClient::new(self.channel.clone())
    }

    fn containers(&self) -> ContainersClient<tonic::transport::Channel> {
        ContainersClient::new(self.channel.clone())
    }

    /// Creates the record of a container, which uses the snapshot of the same name and `io.containerd.runc.v2` with its
    /// default runtime.
    ///
    /// # Errors
    /// Fails when the call to containerd fails.
    pub async fn create_container(&self, id: &str, spec: Vec<u8>) -> Result<(), ContainerdError> {
        let spec = prost_types::Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Spec".to_owned(),
            value: spec,
        };
        let container = Container {
            id: id.to_owned(),
            runtime: Some(Runtime { name: "io.containerd.runc.v2".to_owned(), options: None }),
            spec: Some(spec),
            snapshotter: self.snapshotter().to_owned(),
            snapshot_key: id.to_owned(),
            ..Default::default()
        };
        let request = self.request(None, CreateContainerRequest { container: Some(container) });
        self.call("Containers.Create", id, self.containers().create(request)).await.map(drop)
    }

    /// Deletes the record of a container. Succeeds if the container is gone already.
    ///
    /// # Errors
    /// Fails when the call to containerd fails.
    pub async fn delete_container(&self, id: &str) -> Result<(), ContainerdError> {
        let request = self.request(None, DeleteContainerRequest { id: id.to_owned() });
        ignore_not_found(self.call("Containers.Delete", id, self.containers().delete(request)).await)
    }

    /// Creates a container's task, whose process waits to be started.
    ///
    /// # Errors
    /// Fails when the call to containerd fails.
    pub async fn create_task(
        &self,
        id: &str,
        rootfs: Vec<Mount>,
        stdout: &str,
        stderr: &str,
    ) -> Result<(), ContainerdError> {
        let request = CreateTaskRequest {
            container_id: id.to_owned(),
            rootfs,
            stdout: stdout.to_owned(),
            stderr: stderr.to_owned(),
            ..Default::default()
        };
        self.call("Tasks.Create", id, self.tasks().create(self.request(None, request))).await.map(drop)
    }

    /// Starts the process of a created task.
    ///
    /// # Errors
    /// Fails when the call to containerd fails.
    pub async fn start_task(&self, id: &str) -> Result<(), ContainerdError> {
        let request = StartRequest { container_id: id.to_owned(), ..Default::default() };
        self.call("Tasks.Start", id, self.tasks().start(self.request(None, request))).await.map(drop)
    }

    /// Waits until the task has ended, for up to a day, and returns its exit code.
    ///
    /// # Errors
    /// Fails when the call to containerd fails.
    pub async fn wait_task(&self, id: &str) -> Result<u32, ContainerdError> {
        let request = WaitRequest { container_id: id.to_owned(), ..Default::default() };
        let limit = std::time::Duration::from_secs(24 * 3600);
        let answer = self.call_within(limit, "Tasks.Wait", id, self.tasks().wait(self.request(None, request))).await?;
        Ok(answer.exit_status)
    }

    /// Sends a signal to the first process of a task. Succeeds if the process is gone already.
    ///
    /// # Errors
    /// Fails when the call to containerd fails.
    pub async fn kill_task(&self, id: &str, signal: u32) -> Result<(), ContainerdError> {
        self.kill(KillRequest { container_id: id.to_owned(), signal, ..Default::default() }).await
    }

    /// Kills all processes of a task. Succeeds if the task is gone already.
    ///
    /// # Errors
    /// Fails when the call to containerd fails.
    pub async fn kill_all(&self, id: &str) -> Result<(), ContainerdError> {
        let signal = libc::SIGKILL.cast_unsigned();
        self.kill(KillRequest { container_id: id.to_owned(), signal, all: true, ..Default::default() }).await
    }

    async fn kill(&self, request: KillRequest) -> Result<(), ContainerdError> {
        let id = request.container_id.clone();
        ignore_not_found(self.call("Tasks.Kill", &id, self.tasks().kill(self.request(None, request))).await)
    }

    /// Returns whether containerd has a record of the container `id`.
    ///
    /// # Errors
    /// Fails when the call to containerd fails.
    pub async fn has_container(&self, id: &str) -> Result<bool, ContainerdError> {
        let request = self.request(None, GetContainerRequest { id: id.to_owned() });
        match self.call("Containers.Get", id, self.containers().get(request)).await {
            Ok(_) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Deletes a task that has ended. Succeeds if the task is gone already.
    ///
    /// # Errors
    /// Fails when the call to containerd fails.
    pub async fn delete_task(&self, id: &str) -> Result<(), ContainerdError> {
        let request = self.request(None, DeleteTaskRequest { container_id: id.to_owned() });
        ignore_not_found(self.call("Tasks.Delete", id, self.tasks().delete(request)).await)
    }
}

fn ignore_not_found<T>(outcome: Result<T, ContainerdError>) -> Result<(), ContainerdError> {
    match outcome {
        Err(error) if !error.is_not_found() => Err(error),
        _ => Ok(()),
    }
}
