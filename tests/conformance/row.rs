//! A row: a promise, and the function that checks whether a driver keeps it.

use std::{any::Any, cell::RefCell, future::Future, panic::AssertUnwindSafe, pin::Pin, time::Duration};

use futures_util::FutureExt as _;
use nomad_driver_shim::host::PluginCommand;
use serde_json::{Value, json};

use crate::support::{Env, EnvOptions, NotApplicable, leak, patience};

pub(crate) type Run = for<'a> fn(&'a mut Env) -> Pin<Box<dyn Future<Output = ()> + 'a>>;

pub(crate) struct Row {
    /// The row's number in docs/protocol/nomad-plugin.md#6 (`6.3.4`) or docs/protocol/nomad-driver-containerd.md#9
    /// (`B6`, `001-test-redis`).
    pub id: &'static str,
    /// What a driver promises.
    pub says: &'static str,
    /// The row's function, by module and name.
    pub test: String,
    /// Merged over the plugin's configuration. Options that a driver's schema does not know are left out.
    config: Value,
    /// Whether this driver runs the row under the name `containerd-driver`.
    drop_in: bool,
    run: Run,
}

/// The result of a row.
#[derive(Clone)]
pub(crate) enum Verdict {
    Green,
    /// The row failed, for this reason.
    Red(String),
    /// The driver lacks an option, or this machine lacks something, that the row needs.
    NotApplicable(String),
    /// The runtime has a limit, and the check that replaces the row passed.
    Limited(&'static str),
}

/// Makes a row: `row!(function, id, promise)`.
#[macro_export]
macro_rules! row {
    ($test:ident, $id:literal, $says:literal) => {
        $crate::row::Row::new($id, $says, module_path!(), stringify!($test), |env| Box::pin($test(env)))
    };
}

impl Row {
    pub(crate) fn new(id: &'static str, says: &'static str, module: &str, test: &str, run: Run) -> Self {
        let module = module.rsplit("::").next().unwrap_or(module);
        Self { id, says, test: format!("{module}::{test}"), config: json!({}), drop_in: false, run }
    }

    pub(crate) fn config(self, config: Value) -> Self {
        Self { config, ..self }
    }

    pub(crate) fn drop_in(self) -> Self {
        Self { drop_in: true, ..self }
    }

    /// Returns the same row with another check.
    pub(crate) fn kept_as(self, config: Value, run: Run) -> Self {
        let config = if config == json!({}) { self.config.clone() } else { config };
        Self { config, run, ..self }
    }

    pub(crate) fn name(&self) -> String {
        format!("{} {}", self.id, self.test)
    }

    /// Runs the row on `driver`, or on this driver, with a plugin and directories of its own, and removes what the row
    /// has left.
    pub(crate) fn run(&self, driver: Option<PluginCommand>) -> Verdict {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let verdict = runtime.block_on(async {
            let mut config = self.config.clone();
            if let (true, Ok(text)) = (driver.is_some(), std::env::var("DRIVER_CONFIG")) {
                match serde_json::from_str::<Value>(&text) {
                    Ok(Value::Object(own)) => own.into_iter().for_each(|(key, value)| config[key] = value),
                    other => return Verdict::Red(format!("DRIVER_CONFIG is no JSON object: {other:?}")),
                }
            }
            let name = if self.drop_in { "containerd-driver" } else { "shim" };
            let options = EnvOptions { config, driver, name, ..EnvOptions::default() };
            let mut env = match AssertUnwindSafe(Env::with(options)).catch_unwind().await {
                Ok(env) => env,
                Err(panic) => return Verdict::of(panic.as_ref()),
            };
            let looked = AssertUnwindSafe(tokio::time::timeout(4 * patience(), (self.run)(&mut env)));
            let verdict = match looked.catch_unwind().await {
                Ok(Ok(())) => Verdict::Green,
                Ok(Err(_)) => Verdict::Red("it did not come to an end".to_owned()),
                Err(panic) => Verdict::of(panic.as_ref()),
            };
            clear(env, verdict).await
        });
        runtime.shutdown_timeout(Duration::from_secs(1));
        verdict
    }
}

impl Verdict {
    fn of(panic: &(dyn Any + Send)) -> Self {
        match panic.downcast_ref::<NotApplicable>() {
            Some(NotApplicable(why)) => Self::NotApplicable(why.clone()),
            None => Self::Red(SAID.take()),
        }
    }
}

/// Destroys the tasks that a row has started. A green row must have left nothing else.
async fn clear(mut env: Env, verdict: Verdict) -> Verdict {
    // The checks below are this suite's own.
    env.skip_leak_check();
    if env.plugin.is_none() {
        return verdict;
    }
    env.destroy_all().await;
    let mut leaks = match verdict {
        Verdict::Green => leak::of_tasks(&env).await,
        _ => Vec::new(),
    };
    if let Some(plugin) = env.plugin.take() {
        plugin.shut_down().await;
    }
    // Only this driver must also leave nothing other than tasks: another driver may keep such objects.
    if let (Verdict::Green, false) = (&verdict, env.foreign) {
        leaks.extend(leak::afterwards(&env).await);
    }
    if leaks.is_empty() { verdict } else { Verdict::Red(format!("left behind: {leaks:#?}")) }
}

thread_local! {
    static SAID: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Keeps panic messages as the rows' verdicts instead of printing them.
pub(crate) fn keep_quiet() {
    std::panic::set_hook(Box::new(|info| {
        let payload = info.payload();
        let text = payload.downcast_ref::<&str>().copied().map(str::to_owned);
        let text = text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_default();
        let place = info.location().map(|at| format!("{}:{}", at.file(), at.line())).unwrap_or_default();
        SAID.set(format!("{text} ({place})"));
    }));
}
