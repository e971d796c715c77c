//! The agent's side of the connection: it runs one plugin at a time, starts it again whenever it ends, and calls it.

use std::{
    future::Future,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use nomad_driver_shim::{host::Plugin, pb::driver::driver_client::DriverClient, process::PidFd};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tonic::{Response, Status, transport::Channel};

use crate::{
    ground::Journal,
    history::History,
    model::{Hit, Model},
    step::Fate,
    support::{Env, patience},
};

/// Interval between two attempts to start a plugin.
const AGAIN: Duration = Duration::from_millis(200);
/// How long after a refusal the plugin's death still counts as its cause.
const DYING: Duration = Duration::from_millis(200);

/// A connection to a plugin that can be called.
#[derive(Clone)]
pub(crate) struct Link {
    pub driver: DriverClient<Channel>,
    pub pid: u32,
    /// Cancelled when the plugin has ended or its agent is dead.
    over: CancellationToken,
}

/// Why a call has no result.
#[derive(Debug)]
pub(crate) enum CallError {
    /// The plugin is dead, and another one will be started.
    PluginDied,
    /// The agent that made the call is dead. All that it had not noted is lost.
    AgentDied,
    /// The plugin answered with an error.
    Refused(Status),
    /// The plugin did not answer in time.
    Hung,
}

/// A request to the supervisor of the plugin.
enum Request {
    /// The agent dies, and another one comes.
    Restart { away: Duration, plugin: Fate, done: oneshot::Sender<()> },
    /// As in a reboot, everything ends, `wipe` is run, and a new agent starts.
    Reboot { wipe: Box<dyn FnOnce(&mut Env) + Send>, done: oneshot::Sender<()> },
    /// A plugin to which the agent has only reconnected is replaced by one that this process starts.
    Own { done: oneshot::Sender<()> },
    /// The run is over.
    End,
}

/// The node: its directories, its plugin, and the model of its tasks.
pub(crate) struct Node {
    pub env: tokio::sync::Mutex<Env>,
    pub dir: PathBuf,
    pub namespace: String,
    model: Mutex<Model>,
    pub history: History,
    link: watch::Sender<Option<Link>>,
    agents: AtomicU64,
    connections: AtomicU64,
    requests: mpsc::UnboundedSender<Request>,
}

impl Node {
    /// Starts a node's plugin, and supervises it until `end` is called.
    pub(crate) fn start(env: Env, model: Model) -> (Arc<Self>, tokio::task::JoinHandle<()>) {
        let (requests, receive) = mpsc::unbounded_channel();
        let node = Arc::new(Self {
            dir: env.dir.clone(),
            namespace: env.namespace.clone(),
            env: tokio::sync::Mutex::new(env),
            model: Mutex::new(model),
            history: History::new(),
            link: watch::Sender::new(None),
            agents: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            requests,
        });
        let supervisor = tokio::spawn(supervise(node.clone(), receive));
        (node, supervisor)
    }

    pub(crate) fn model(&self) -> std::sync::MutexGuard<'_, Model> {
        self.model.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How often an agent has connected to a plugin. If the connection is newer than a task, the agent has to ask the
    /// plugin to recover the task.
    pub(crate) fn connections(&self) -> u64 {
        self.connections.load(Ordering::SeqCst)
    }

    /// The time since the beginning of the run.
    pub(crate) fn now(&self) -> Duration {
        self.history.now()
    }

    /// Adds a line to the history.
    pub(crate) fn note(&self, what: impl AsRef<str>) {
        self.history.note(what.as_ref());
    }

    /// Keeps the warnings of a plugin that is about to be dropped.
    pub(crate) fn listen_to(&self, plugin: &Plugin) {
        self.history.listen_to(&plugin.stderr());
    }

    /// The connection to the plugin, as soon as there is one.
    pub(crate) async fn link(&self) -> Option<Link> {
        let mut link = self.link.subscribe();
        let up = tokio::time::timeout(patience(), link.wait_for(Option::is_some)).await;
        match up {
            Ok(Ok(link)) => link.clone(),
            _ => {
                self.model().violated(format!("no plugin could be started within {} s", patience().as_secs()));
                None
            }
        }
    }

    /// Calls the plugin. An agent waits for WaitTask as long as the agent lives, and for any other call only until
    /// `limit`.
    ///
    /// # Errors
    /// When the plugin does not answer, or refuses.
    pub(crate) async fn call<T, F>(
        &self,
        limit: Option<Duration>,
        request: impl FnOnce(DriverClient<Channel>) -> F,
    ) -> Result<T, CallError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let Some(link) = self.link().await else { return Err(CallError::Hung) };
        let agent = self.agents.load(Ordering::SeqCst);
        let limit = limit.unwrap_or(Duration::from_secs(3600));
        let outcome = tokio::select! {
            answer = tokio::time::timeout(limit, request(link.driver)) => Some(answer),
            () = link.over.cancelled() => None,
        };
        let over = async || tokio::time::timeout(DYING, link.over.cancelled()).await.is_ok();
        match outcome {
            Some(Ok(Ok(response))) => Ok(response.into_inner()),
            // An error of tonic's about the connection has a source. An error that the plugin answers with has none.
            Some(Ok(Err(status))) if std::error::Error::source(&status).is_none() && !over().await => {
                Err(CallError::Refused(status))
            }
            Some(Err(_)) => Err(CallError::Hung),
            Some(Ok(Err(_))) | None => {
                // After a broken connection, the supervisor soon notices the plugin's end.
                let _ = tokio::time::timeout(patience(), link.over.cancelled()).await;
                let is_same = agent == self.agents.load(Ordering::SeqCst);
                Err(if is_same { CallError::PluginDied } else { CallError::AgentDied })
            }
        }
    }

    async fn request(&self, make: impl FnOnce(oneshot::Sender<()>) -> Request) {
        let (done, wait) = oneshot::channel();
        let _ = self.requests.send(make(done));
        let _ = wait.await;
    }

    /// Ends the agent and starts another one.
    pub(crate) async fn restart_agent(&self, away: Duration, plugin: Fate) {
        self.request(|done| Request::Restart { away, plugin, done }).await;
    }

    /// Ends everything, as a reboot does. `wipe` removes what the host's memory held.
    pub(crate) async fn reboot(&self, wipe: impl FnOnce(&mut Env) + Send + 'static) {
        self.request(|done| Request::Reboot { wipe: Box::new(wipe), done }).await;
    }

    /// Makes sure that the plugin was started by the current agent as a child of this process.
    pub(crate) async fn own_plugin(&self) {
        self.request(|done| Request::Own { done }).await;
    }

    /// Ends the supervision of the plugin. The plugin lives on in `env`.
    pub(crate) fn end(&self) {
        let _ = self.requests.send(Request::End);
    }

    fn disconnect(&self) {
        if let Some(link) = self.link.send_replace(None) {
            link.over.cancel();
        }
    }

    fn agent_died(&self) {
        self.agents.fetch_add(1, Ordering::SeqCst);
        self.disconnect();
    }
}

impl Journal for Node {
    fn note(&self, what: &str) {
        self.history.note(what);
    }

    fn hit(&self, hit: &Hit) {
        self.model().hit(hit);
    }

    fn fault_begins(&self) {
        let now = self.now();
        self.model().fault_begins(now);
    }

    fn fault_ends(&self) {
        let now = self.now();
        self.model().fault_ends(now);
    }

    fn struck(&self, kind: Option<String>) {
        let figures = &mut self.model().figures;
        match kind {
            Some(kind) => figures.struck(kind),
            None => figures.missed += 1,
        }
    }

    fn plugin(&self) -> Option<u32> {
        self.link.borrow().as_ref().map(|link| link.pid)
    }
}

async fn supervise(node: Arc<Node>, mut requests: mpsc::UnboundedReceiver<Request>) {
    // Plugins that an earlier agent of this test has started. They are still children of this process.
    let mut orphans: Vec<tokio::process::Child> = Vec::new();
    let mut pid = launched(&node).await;
    loop {
        let Ok(plugin) = PidFd::open(pid) else {
            pid = relaunched(&node).await;
            continue;
        };
        let request = tokio::select! {
            () = plugin.wait_for_end() => None,
            request = requests.recv() => request.or(Some(Request::End)),
        };
        for orphan in &mut orphans {
            let _ = orphan.try_wait();
        }
        match request {
            None => {
                node.note("the plugin has ended");
                pid = relaunched(&node).await;
            }
            Some(Request::End) => return,
            Some(Request::Own { done }) => {
                let is_own = node.env.lock().await.plugin.as_ref().is_some_and(|plugin| plugin.pid().is_some());
                if !is_own {
                    node.agent_died();
                    let former = node.env.lock().await.plugin.take();
                    if let Some(former) = former {
                        node.listen_to(&former);
                        let _ = former.shut_down().await;
                    }
                    let _ = tokio::time::timeout(patience(), plugin.wait_for_end()).await;
                    pid = launched(&node).await;
                }
                let _ = done.send(());
            }
            Some(Request::Restart { away, plugin: fate, done }) => {
                node.agent_died();
                let former = node.env.lock().await.plugin.take();
                let socket = former.as_ref().map(|plugin| plugin.socket().to_owned());
                former.iter().for_each(|plugin| node.listen_to(plugin));
                orphans.extend(former.and_then(Plugin::detach));
                tokio::time::sleep(away).await;
                if fate == Fate::Killed {
                    plugin.signal(libc::SIGKILL);
                    plugin.wait_for_end().await;
                }
                let again = match (&socket, fate) {
                    (Some(socket), Fate::Kept) => Plugin::reattach(socket).await.ok(),
                    _ => None,
                };
                match again {
                    Some(reattached) if !plugin.has_ended() => {
                        node.env.lock().await.plugin = Some(reattached);
                        node.connected(pid).await;
                        node.note("a new agent has connected to the plugin");
                    }
                    _ => pid = launched(&node).await,
                }
                let _ = done.send(());
            }
            Some(Request::Reboot { wipe, done }) => {
                node.agent_died();
                {
                    let mut env = node.env.lock().await;
                    env.plugin = None;
                    plugin.signal(libc::SIGKILL);
                    plugin.wait_for_end().await;
                    tokio::task::block_in_place(|| wipe(&mut env));
                }
                pid = launched(&node).await;
                let _ = done.send(());
            }
        }
    }
}

impl Node {
    async fn connected(&self, pid: u32) {
        let env = self.env.lock().await;
        let driver = env.driver();
        self.connections.fetch_add(1, Ordering::SeqCst);
        self.link.send_replace(Some(Link { driver, pid, over: CancellationToken::new() }));
    }
}

/// Starts another plugin after the end of the previous one.
async fn relaunched(node: &Arc<Node>) -> u32 {
    node.disconnect();
    launched(node).await
}

/// Starts a plugin, and tries again until one comes up. Returns its process id.
async fn launched(node: &Arc<Node>) -> u32 {
    loop {
        let mut env = node.env.lock().await;
        if let Some(former) = env.plugin.take() {
            // A plugin that was killed has left its socket behind.
            let _ = std::fs::remove_file(former.socket());
            node.listen_to(&former);
        }
        let launch = env.launch_mut().clone();
        let config = env.config.clone();
        drop(env);
        let started = async {
            let plugin = Plugin::launch(&launch).await?;
            plugin.configure(&config).await.map(|()| plugin)
        };
        match started.await {
            Ok(plugin) => {
                let pid = plugin.pid().unwrap_or_default();
                node.env.lock().await.plugin = Some(plugin);
                node.connected(pid).await;
                node.note(format!("plugin {pid} is up"));
                return pid;
            }
            Err(error) => {
                let text = nomad_driver_shim::error_chain(&error).to_string();
                node.note(format!("no plugin: {}", text.lines().last().unwrap_or_default()));
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}
