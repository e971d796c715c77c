//! Counts the calls in which a shim runs an OCI runtime.
//!
//! When the connection of a caller breaks, the shim kills the runtime that it runs for that caller. A plugin that shuts
//! down therefore starts no new calls and waits for the calls in progress.

use std::{sync::Arc, time::Duration};

use tokio::sync::watch;

/// Counts the runtime calls of one plugin. It is cheap to clone, and all clones share one count.
#[derive(Debug, Clone, Default)]
pub struct RuntimeCalls(Arc<watch::Sender<Calls>>);

#[derive(Debug, Clone, Copy, Default)]
struct Calls {
    at_work: usize,
    phase: Phase,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Phase {
    /// All calls are admitted.
    #[default]
    Open,
    /// The plugin shuts down. Calls for existing containers and processes are admitted, calls that create new ones are
    /// not.
    Leaving,
    /// No call is admitted any more.
    Closed,
}

/// Whether a call creates a container or process, or belongs to an existing one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The call creates a container or a process.
    Begin,
    /// The call belongs to a container or process that an earlier call has created.
    Continue,
}

/// A guard that counts a call as in progress until the guard is dropped.
#[derive(Debug)]
pub struct RuntimeCall(RuntimeCalls);

impl Drop for RuntimeCall {
    fn drop(&mut self) {
        self.0.0.send_modify(|calls| calls.at_work -= 1);
    }
}

impl RuntimeCalls {
    /// Counts a call as in progress while the returned guard exists. Once the plugin shuts down and admits no calls of
    /// this kind, this never returns: the next plugin does the remaining work.
    pub async fn begin(&self, purpose: Purpose) -> RuntimeCall {
        let may_begin = self.0.send_if_modified(|calls| {
            let admitted = match calls.phase {
                Phase::Open => true,
                Phase::Leaving => purpose == Purpose::Continue,
                Phase::Closed => false,
            };
            calls.at_work += usize::from(admitted);
            admitted
        });
        if !may_begin {
            std::future::pending::<()>().await;
        }
        RuntimeCall(self.clone())
    }

    /// Waits until the calls in progress have ended, for at most `limit`, and admits no call afterwards. Returns
    /// whether all calls have ended in time.
    pub async fn finish(&self, limit: Duration) -> bool {
        self.0.send_modify(|calls| calls.phase = Phase::Leaving);
        let mut calls = self.0.subscribe();
        let idle = tokio::time::timeout(limit, async {
            // A call may begin after the wait has ended and before the phase is closed.
            while !self.close_if_idle() {
                let _ = calls.wait_for(|calls| calls.at_work == 0).await;
            }
        });
        let all = idle.await.is_ok();
        self.0.send_modify(|calls| calls.phase = Phase::Closed);
        all
    }

    fn close_if_idle(&self) -> bool {
        self.0.send_if_modified(|calls| {
            let idle = calls.at_work == 0;
            if idle {
                calls.phase = Phase::Closed;
            }
            idle
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(20);

    async fn is_made(calls: &RuntimeCalls, purpose: Purpose) -> bool {
        tokio::time::timeout(SOON, calls.begin(purpose)).await.is_ok()
    }

    #[tokio::test]
    async fn calls_at_work_end_and_only_their_sequels_are_made() {
        let calls = RuntimeCalls::default();
        let create = calls.begin(Purpose::Begin).await;
        let leaving = tokio::spawn({
            let calls = calls.clone();
            async move { calls.finish(Duration::from_secs(60)).await }
        });
        tokio::time::sleep(SOON).await;
        assert!(!is_made(&calls, Purpose::Begin).await, "no new container is created");
        assert!(is_made(&calls, Purpose::Continue).await, "an existing container can be ended");
        assert!(!leaving.is_finished());
        drop(create);
        assert!(leaving.await.expect("no panic"));
        assert!(!is_made(&calls, Purpose::Continue).await, "no call is admitted afterwards");
    }

    #[tokio::test]
    async fn a_call_that_hangs_is_not_waited_for_for_ever() {
        let calls = RuntimeCalls::default();
        let _hangs = calls.begin(Purpose::Continue).await;
        assert!(!calls.finish(SOON).await);
        assert!(!is_made(&calls, Purpose::Continue).await);
    }
}
